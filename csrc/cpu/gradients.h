// After the backward loop: products over all active rows (t, n) at once, R of them.
//
//   dW_ih[G*H, I] = dslots^T x x        db_ih = sum of dslots    (slots of the input product)
//   dW_hh[G*H, O] = dslots^T x h(t-1)   db_hh = sum of dslots    (of the recurrent product)
//   dW_hr[P, H]   = dprojected^T x h before the projection
//   the cell's own parameters: sums of what backward has stored for them
//   dx[R, I]      = dslots x W_ih
//
// If the layer is normalised (normalised.h), the gradients of the sums that were normalised take
// the place of dslots in the products. The gradient of a bias is still a sum of dslots, and that of
// a gain is the sum of dslots times the numbers that the gain scales.
//
// The operands are read through row pointers as everywhere else. So packed, ragged, reset and
// batch-first sequences need no copy, and a call of a few microseconds needs no further library
// calls. Blocks of kBlockRows rows are packed: the right operand into panels, the left one
// transposed. The sum of a block consists of sums of at most kDepth rows and is added to the
// result once, so that rounding grows with kDepth and R / kBlockRows, and not with R. Sums of
// biases and gains are sums of sums of 16 rows. Threads own rows of the weight gradients, and rows
// or columns of dx. Gradients of 16-bit weights are summed in float, in memory of their own if
// there are several blocks, and rounded once.
#pragma once

#include "cpu/noisy_rows.h"
#include "cpu/normalised.h"
#include "cpu/pass.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

constexpr int64_t kBlockRows = 384;
constexpr int kOuterRows = 4;  // a block of at most so many rows is not packed

// Lists all active rows, step by step.
class ActiveRows {
 public:
  explicit ActiveRows(const Steps& steps) : steps_(steps) {}

  // Writes the next rows, at most `limit`, and returns their number, which is 0 at the end.
  int64_t next(int64_t* t, int64_t* rank, int64_t limit) {
    int64_t count = 0;
    while (count < limit && t_ < steps_.T) {
      const int64_t active = active_rows(steps_, t_);
      for (; rank_ < active && count < limit; ++rank_, ++count) {
        t[count] = t_;
        rank[count] = rank_;
      }
      if (rank_ < active) break;
      rank_ = 0;
      ++t_;
    }
    return count;
  }

 private:
  const Steps& steps_;
  int64_t t_ = 0, rank_ = 0;
};

// If `tangent` is given, the results are the tangents of these gradients, and `tangent` says where
// they go. Each product becomes a sum of two terms: the tangent of its left factor times the value
// of its right factor, and the value of its left factor times the tangent of its right factor. In
// that second term null is zeros. db is a sum of the first term only.
template <typename T, typename Cell>
class Gradients {
  using A = Compute<T>;
  using E = Operand<T>;
  static constexpr CellShape kShape = Cell::kShape;
  static constexpr int kStored = kShape.stored();
  static constexpr int64_t kWidth = kPanelWidth<T>;
  // A block has a multiple of this many rows, because they are transposed to whole vectors, and to
  // whole tiles.
  static constexpr int64_t kMultiple = filled<E>(kLanes<T>);
  static_assert(kBlockRows % kMultiple == 0 && kRowsAtOnce % kLanes<T> == 0,
                "transposition works on whole vectors");

 public:
  Gradients(const Backward<T>& value, const Backward<T>* tangent, const Plan& plan, const T* zeros,
            Carver& carver, const DropoutMasks<T>& masks = {})
      : value_(value),
        tangent_(tangent),
        to_(tangent ? *tangent : value),
        terms_(tangent ? 2 : 1),
        sizes_(value.sizes),
        steps_(value.steps),
        zeros_(zeros),
        masks_(masks),
        block_rows_(min_of(kBlockRows, ceil_div(steps_.total, kMultiple) * kMultiple)) {
    const Sizes& z = sizes_;
    each_input([&](ColumnPanels<T>& panels, const Weights<T>& w) {
      panels = {.K = kShape.gates * z.H,
                .width = z.I,
                .w = w.w_ih,
                .row_stride = w.w_ih_row,
                .packs = plan.input == Reading::kPacked};
      panels.take_room(carver);
    });
    for (int d = 0; kNarrow<T> && !is_one_block() && d < z.D; ++d) {
      for (int m = 0; m < matrices(); ++m) {
        const Result to = result(d, m);
        if (to.weight) sums_[d][m].weight = carver.take<A>(to.rows * to.width);
        if (to.bias) sums_[d][m].bias = carver.take<A>(to.rows);
        if (to.gain) sums_[d][m].gain = carver.take<A>(to.rows);
      }
    }
    scratch_ = PerThread(plan.threads, carver, [this](Carver& c) { scratch(c); });
  }

  // Called before the barrier that precedes the loop.
  void pack(int thread, int threads) {
    each_input([&](const ColumnPanels<T>& panels, const Weights<T>&) {
      pack_share(panels, thread, threads);
    });
  }

  void run(int thread, int threads) const {
    Carver carver = scratch_.of(thread);
    const Scratch s = scratch(carver);
    for (int d = 0; d < sizes_.D; ++d) weight_gradients(d, thread, threads, s);
    if (to_.dx.data) input_gradient(thread, threads, s);
  }

 private:
  struct Scratch {
    A* right;                           // [panels][groups of block_rows_][kWidth]
    E* left;                            // [kRowsAtOnce][left_stride()]
    int64_t *t, *rank;                  // [block_rows_]
    const T **left_rows, **right_rows;  // [block_rows_]
    LeftRows<T> dslots;                 // [kRowsAtOnce][G*H], if dx is wanted
    T* masked;                          // [block_rows_][O], with recurrent dropout
  };
  // A parameter of the cell's own counts as a matrix that has a bias alone, and so does each of
  // `Normed`, with a gain.
  enum Matrix { kInput, kRecurrent, kProjection, kParameters };
  static constexpr int kNormed = kParameters + kShape.parameters, kMatrices = kNormed + 3;
  // The gradients of one matrix of weights and its bias. They are null if they are not wanted.
  struct Result {
    int64_t rows, width;
    T* weight;
    T* bias;
    T* gain = nullptr;
  };
  // The memory in which they are summed.
  struct Sums {
    A* weight = nullptr;
    A* bias = nullptr;
    A* gain = nullptr;
  };
  // One weight gradient: weight[row_of(j)] = or += the sum over rows of left[j] * right, and
  // bias[row_of(j)] = or += that of left[j].
  template <typename Out>
  struct Target {
    int64_t rows, width;
    Out* weight;
    Out* bias;
    Out* gain;
    int64_t H;      // rows of one gate
    bool by_slots;  // left has the order of the recurrent slots, the result that of the gates

    int64_t row_of(int64_t j) const {
      return by_slots ? kShape.recurrent_gate(int(j / H)) * H + j % H : j;
    }
    explicit operator bool() const { return weight || bias || gain; }
  };

  // Calls f(panels, weights) for each W_ih that dx needs.
  template <typename F>
  void each_input(F f) {
    for (int k = 0; to_.dx.data && k < terms_; ++k) {
      for (int d = 0; d < sizes_.D; ++d) {
        const Weights<T>& weights = of_right(k).weights[d];
        if (weights.w_ih) f(input_[k][d], weights);
      }
    }
  }

  int matrices() const { return sizes_.normalised ? kMatrices : kNormed; }
  Result result(int d, int matrix) const {
    const Sizes& z = sizes_;
    const WeightGradients<T>& g = to_.gradients[d];
    const int64_t rows = kShape.gates * z.H;
    if (matrix >= kNormed) {
      const auto what = Normed(matrix - kNormed);
      return what == Normed::kInput       ? Result{rows, 0, nullptr, g.b_ih, g.gains.ih}
             : what == Normed::kRecurrent ? Result{rows, 0, nullptr, g.b_hh, g.gains.hh}
                                          : Result{z.H, 0, nullptr, g.gains.bias_c, g.gains.c};
    }
    if (matrix >= kParameters) return {z.H, 0, nullptr, g.parameters[matrix - kParameters]};
    const bool has_bias = !z.normalised;
    return matrix == kInput       ? Result{rows, z.I, g.w_ih, has_bias ? g.b_ih : nullptr}
           : matrix == kRecurrent ? Result{rows, z.O, g.w_hh, has_bias ? g.b_hh : nullptr}
                                  : Result{z.O, z.H, g.w_hr, nullptr};
  }
  template <typename Out>
  Target<Out> target(int matrix, const Result& to, Out* weight, Out* bias, Out* gain) const {
    return {.rows = to.rows,
            .width = to.width,
            .weight = weight,
            .bias = bias,
            .gain = gain,
            .H = sizes_.H,
            .by_slots = matrix == kRecurrent || matrix == kNormed + int(Normed::kRecurrent)};
  }
  Target<A> sums(int d, int matrix) const {
    const Sums& s = sums_[d][matrix];
    return target(matrix, result(d, matrix), s.weight, s.bias, s.gain);
  }
  // Whether all rows are one block. Its sums are then the results, and are written as such.
  bool is_one_block() const { return terms_ == 1 && steps_.total <= block_rows_; }
  // Calls f with the place where the gradient of a matrix is summed.
  template <typename F>
  void with_target(int d, int matrix, F f) const {
    const Result to = result(d, matrix);
    if constexpr (!kNarrow<T>) {
      f(target(matrix, to, numbers(to.weight), numbers(to.bias), numbers(to.gain)));
    } else if (is_one_block()) {
      f(target(matrix, to, to.weight, to.bias, to.gain));
    } else {
      f(sums(d, matrix));
    }
  }

  Scratch scratch(Carver& carver) const {
    const Sizes& z = sizes_;
    const int64_t widest = max_of(max_of(z.I, z.O), z.H);
    return {.right = carver.take<A>(ceil_div(widest, kWidth) * kWidth * kParts<T> *
                                    groups_in_memory<E>(block_rows_)),
            .left = carver.take<E>(kRowsAtOnce * left_stride()),
            .t = carver.take<int64_t>(block_rows_),
            .rank = carver.take<int64_t>(block_rows_),
            .left_rows = carver.take<const T*>(block_rows_),
            .right_rows = carver.take<const T*>(block_rows_),
            .dslots = LeftRows<T>(to_.dx.data ? kRowsAtOnce : 0, kShape.gates * z.H, carver),
            .masked = carver.take<T>(masks_ ? block_rows_ * z.O : 0)};
  }

  int64_t left_stride() const { return kParts<T> * block_rows_; }

  void weight_gradients(int d, int thread, int threads, const Scratch& s) const {
    ActiveRows rows(steps_);
    bool add = to_.adds && (!kNarrow<T> || is_one_block());
    for (bool first = true;; first = false) {
      const int64_t count = rows.next(s.t, s.rank, block_rows_);
      if (count == 0 && !first) break;  // without any rows, one empty block writes zeros
      for (int k = 0; k < terms_; ++k) {
        for (int m = 0; m < matrices(); ++m) {
          const Rows<const T> factor = left(k, d, m), other = right(k, d, m);
          if (k && !other.data) continue;
          with_target(d, m, [&](auto to) {
            if (k) to.bias = nullptr;
            if (!to) return;
            for (int64_t r = 0; r < count; ++r) {
              s.left_rows[r] = row_at(steps_, factor, s.t[r], s.rank[r]);
              if (!to.weight && !to.gain) continue;
              s.right_rows[r] = m == kRecurrent
                                    ? previous_state(steps_, d, s.t[r], s.rank[r], other,
                                                     of_right(k).h0, zeros_, of_right(k).reset_h)
                                    : row_at(steps_, other, s.t[r], s.rank[r]);
            }
            if (m == kRecurrent && to.weight && masks_) mask_right(d, count, s);
            accumulate(to, count, thread, threads, s, add || k);
          });
        }
      }
      add = true;
    }
    if constexpr (kNarrow<T>) {
      for (int m = 0; !is_one_block() && m < matrices(); ++m) round(d, m, thread, threads);
    }
  }

  // Replaces h by what the recurrent product has read of it.
  void mask_right(int d, int64_t count, const Scratch& s) const {
    for (int64_t r = 0; r < count; ++r) {
      T* const to = s.masked + r * sizes_.O;
      masks_.apply(d, s.rank[r], s.right_rows[r], {0, sizes_.O}, to);
      s.right_rows[r] = to;
    }
  }

  // Rounds the thread's own rows into the result.
  void round(int d, int matrix, int thread, int threads) const {
    const Target<A> from = sums(d, matrix);
    const Result to = result(d, matrix);
    const Range own = own_rows(from, thread, threads);
    for (int64_t j = own.begin; from.weight && j < own.end; ++j) {
      const int64_t row = from.row_of(j) * from.width;
      round_row(to.weight + row, from.weight + row, 0, from.width);
    }
    const auto round_vector = [&](T* to, const A* from_vector) {
      for (int64_t j = own.begin; from_vector && j < own.end; ++j) {
        round_row(to, from_vector, from.row_of(j), from.row_of(j) + 1);
      }
    };
    round_vector(to.bias, from.bias);
    round_vector(to.gain, from.gain);
  }
  void round_row(T* to, const A* from, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; i += kLanes<T>) {
      Vec<T> sum = load_up_to(from + i, end - i);
      if (to_.adds) sum += load_up_to(to + i, end - i);
      store_up_to(to + i, sum, end - i);
    }
  }

  template <typename Out>
  static Range own_rows(const Target<Out>& target, int thread, int threads) {
    return split(target.rows, threads, thread, kLanes<T>);
  }

  // Adds one block of rows to the thread's own rows of one weight gradient.
  template <typename Out>
  void accumulate(const Target<Out>& target, int64_t count, int thread, int threads,
                  const Scratch& s, bool add) const {
    const Range own = own_rows(target, thread, threads);
    if (own.begin == own.end) return;
    const bool few = count > 0 && count <= kOuterRows;
    const ColumnPanels<T> right = {.K = count, .width = target.width, .packed = s.right};
    for (int64_t p = 0; target.weight && !few && p < right.count(); ++p) {
      right.pack_rows(p, [&](int64_t r) { return s.right_rows[r]; });
    }
    const E* left[kRowsAtOnce];
    Out* out[kRowsAtOnce];
    for (int64_t i = 0; i < kRowsAtOnce; ++i) left[i] = s.left + i * left_stride();
    for (int64_t j = own.begin, rows; j < own.end; j += rows) {
      // Rows of one gate are neighbours in the result as well.
      rows = min_of(min_of(kRowsAtOnce, own.end - j), target.H - j % target.H);
      if (target.bias) {
        sum_of_rows(target.bias + target.row_of(j), count, j, rows, add,
                    [&](int64_t r, int64_t at, int64_t n) __attribute__((always_inline)) {
                      return load_up_to(s.left_rows[r] + at, n);
                    });
      }
      if (target.gain) {
        sum_of_rows(target.gain + target.row_of(j), count, j, rows, add,
                    [&](int64_t r, int64_t at, int64_t n) __attribute__((always_inline)) {
                      return load_up_to(s.left_rows[r] + at, n) *
                             load_up_to(s.right_rows[r] + at, n);
                    });
      }
      if (!target.weight) continue;
      Out* const to = target.weight + target.row_of(j) * target.width;
      if (few) {
        outer_products(count, target.width, j, rows, to, s, add);
        continue;
      }
      transpose_left(count, j, rows, s);
      for (int64_t p = 0; p < right.count(); ++p) {
        if constexpr (std::is_same_v<Out, A>) {
          // A longer block is summed apart first.
          if (right.columns(p) % kLanes<T> == 0 && (!add || count <= kDepth)) {
            right.put(p, rows, left, to + p * kWidth, target.width, add);
            continue;
          }
        }
        for (int64_t i = 0; i < rows; ++i) out[i] = to + i * target.width + p * kWidth;
        right.multiply(p, rows, left, out, add);
      }
    }
  }

  // Packs nothing, because there are so few rows that the result is written only once.
  template <typename Out>
  static void outer_products(int64_t count, int64_t width, int64_t j, int64_t rows, Out* to,
                             const Scratch& s, bool add) {
    static_assert(kOuterRows == 4, "extend the switch");
    switch (count) {
      case 1:
        return outer_products<1>(width, j, rows, to, s, add);
      case 2:
        return outer_products<2>(width, j, rows, to, s, add);
      case 3:
        return outer_products<3>(width, j, rows, to, s, add);
      default:
        return outer_products<4>(width, j, rows, to, s, add);
    }
  }
  template <int kRows, typename Out>
  static void outer_products(int64_t width, int64_t j, int64_t rows, Out* to, const Scratch& s,
                             bool add) {
    const int64_t whole = width / kLanes<T> * kLanes<T>;
    for (int64_t k = 0; k < rows; ++k, to += width) {
      A left[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) left[r] = value(s.left_rows[r][j + k]);
      const auto sum_at = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        Vec<T> sum{};
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          sum = left[r] * load_up_to(s.right_rows[r] + i, n) + sum;
        }
        if (add) sum += load_up_to(to + i, n);
        store_up_to(to + i, sum, n);
      };
      for (int64_t i = 0; i < whole; i += kLanes<T>) sum_at(i, kLanes<T>);
      if (whole < width) sum_at(whole, width - whole);
    }
  }

  // to[i] = or += the sum of term(r, j + i, columns left) over `count` rows r, for `columns`
  // columns of one gate.
  template <typename Out, typename Term>
  static void sum_of_rows(Out* to, int64_t count, int64_t j, int64_t columns, bool add, Term term) {
    constexpr int kVectors = 3;
    constexpr int64_t kWhole = kVectors * kLanes<T>;
    int64_t i = 0;
    // Several vectors at once, because each row is elsewhere in memory.
    for (; i + kWhole <= columns; i += kWhole) {
      sum_of_rows<kVectors>(to + i, count, j + i, kLanes<T>, add, term);
    }
    for (; i < columns; i += kLanes<T>)
      sum_of_rows<1>(to + i, count, j + i, columns - i, add, term);
  }
  template <int kVectors, typename Out, typename Term>
  static RNNKERN_INLINE void sum_of_rows(Out* to, int64_t count, int64_t column, int64_t n,
                                         bool add, Term term) {
    constexpr int64_t kPart = 16;  // rows of one sum, so that rounding grows slowly
    Vec<T> sums[kVectors] = {};
    for (int64_t r = 0; r < count; r += kPart) {
      Vec<T> parts[kVectors] = {};
      const int64_t end = min_of(r + kPart, count);
      for (int64_t q = r; q < end; ++q) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) parts[v] += term(q, column + v * kLanes<T>, n);
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[v] += parts[v];
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if (add) sums[v] += load_up_to(to + v * kLanes<T>, n);
      store_up_to(to + v * kLanes<T>, sums[v], n);
    }
  }

  // s.left[i][r] = left row r, column j + i.
  void transpose_left(int64_t count, int64_t j, int64_t rows, const Scratch& s) const {
    constexpr int kL = kLanes<T>;
    for (int64_t i = 0; i < rows; i += kL) {
      for (int64_t r = 0; r < filled<E>(count); r += kL) {
        Vec<T> block[kL];
#pragma GCC unroll 16
        for (int l = 0; l < kL; ++l) {
          block[l] = r + l < count ? load_up_to(s.left_rows[r + l] + j + i, rows - i) : Vec<T>{};
        }
        transpose<A>(block);
#pragma GCC unroll 16
        for (int l = 0; l < kL; ++l) {
          E* const to = s.left + (i + l) * left_stride() + r;
          store(to, block[l]);
          if constexpr (kSplit<T>) store(to + filled<E>(count), part_of<T, 1>(block[l]));
        }
      }
    }
  }

  void input_gradient(int thread, int threads, const Scratch& s) const {
    const Sizes& z = sizes_;
    T* out[kRowsAtOnce];
    ActiveRows rows(steps_);
    const bool by_columns = splits_columns_of_dx(threads);
    const Range columns = by_columns ? split(z.I, threads, thread, kWidth) : Range{0, z.I};
    int64_t count;
    for (int64_t block = 0; (count = rows.next(s.t, s.rank, kRowsAtOnce)) > 0; ++block) {
      if (by_columns ? columns.begin == columns.end : block % threads != thread) continue;
      for (int64_t r = 0; r < count; ++r) out[r] = row_at(steps_, to_.dx, s.t[r], s.rank[r]);
      for (int i = 0; i < terms_ * z.D; ++i) {
        const int k = i / z.D, d = i % z.D;
        if (!of_right(k).weights[d].w_ih) continue;
        const Rows<const T> dslots = left(k, d, kInput);
        input_[k][d].multiply_rows(
            columns, count, s.dslots,
            [&](int64_t r) { return row_at(steps_, dslots, s.t[r], s.rank[r]); },
            [&](int64_t r) { return out[r]; }, i > 0);
      }
    }
    zero_padding_of_dx(thread, threads);
  }

  // Whether threads own columns of dx in place of blocks of rows: if that shares them out so much
  // more evenly that it pays to have each thread read every row of dslots.
  bool splits_columns_of_dx(int threads) const {
    constexpr double kWorth = 0.9;
    const auto largest_share = [&](int64_t count, int64_t unit) {
      const int64_t units = ceil_div(ceil_div(count, unit), threads);
      return count ? double(min_of(count, units * unit)) / double(count) : 0;
    };
    return largest_share(sizes_.I, kWidth) < kWorth * largest_share(steps_.total, kRowsAtOnce);
  }

  void zero_padding_of_dx(int thread, int threads) const {
    if (!steps_.active || steps_.is_packed()) return;
    for (int64_t t = thread; t < steps_.T; t += threads) {
      for (int64_t rank = active_rows(steps_, t); rank < steps_.N; ++rank) {
        zero_row(row_at(steps_, to_.dx, t, rank), 0, sizes_.I);
      }
    }
  }

  // The operands that are the left or the right factors of term k: values, or tangents.
  const Backward<T>& of_left(int k) const { return k == terms_ - 1 ? value_ : *tangent_; }
  const Backward<T>& of_right(int k) const { return k == 0 ? value_ : *tangent_; }

  // The gradient of a matrix is left^T x right. For W_hh, right is the state that enters the step
  // (previous_state).
  Rows<const T> left(int k, int d, int matrix) const {
    const Backward<T>& of = of_left(k);
    const int64_t width = normalised_width<T>(kShape, sizes_.H);
    const auto gradients_of = [&](Normed what) {
      return constant(columns(saved_rows(steps_, of.dnormalised, d, width),
                              NormalisedRow<T, Cell>::place(what, sizes_.H)));
    };
    if (sizes_.normalised && matrix <= kRecurrent) return gradients_of(Normed(matrix));
    if (matrix == kNormed + int(Normed::kCell)) return gradients_of(Normed::kCell);
    if (matrix >= kNormed) matrix -= kNormed;
    if (matrix == kProjection) return constant(saved_rows(steps_, of.dprojected, d, sizes_.O));
    const Rows<T> dslots = saved_rows(steps_, of.dslots, d, kStored * sizes_.H);
    const int slot = matrix >= kParameters ? kShape.slots + matrix - kParameters
                     : matrix == kInput    ? kShape.input_slot
                                           : 0;
    return constant(columns(dslots, slot * sizes_.H));
  }
  Rows<const T> right(int k, int d, int matrix) const {
    const Backward<T>& of = of_right(k);
    if (matrix >= kNormed) {
      const int64_t width = normalised_width<T>(kShape, sizes_.H);
      return columns(saved_rows(steps_, of.normalised, d, width),
                     NormalisedRow<T, Cell>::place(Normed(matrix - kNormed), sizes_.H));
    }
    return matrix == kInput       ? of.x
           : matrix == kRecurrent ? columns(of.y, d * sizes_.O)
                                  : saved_rows(steps_, of.unprojected, d, sizes_.H);
  }

  const Backward<T>& value_;
  const Backward<T>* tangent_;
  const Backward<T>& to_;  // has the pointers to the results
  const int terms_;
  const Sizes& sizes_;
  const Steps& steps_;
  const T* zeros_;
  const DropoutMasks<T> masks_;
  int64_t block_rows_;  // kBlockRows, or less if there are fewer rows
  ColumnPanels<T> input_[2][kMaxDirections];
  Sums sums_[kMaxDirections][kMatrices];
  PerThread scratch_;
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
