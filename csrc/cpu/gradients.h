// After the backward loop: products over all active rows (t, n) at once, R of them.
//
//   dW_ih[G*H, I] = dslots^T x x        db_ih = sum of dslots    (slots of the input product)
//   dW_hh[G*H, O] = dslots^T x h(t-1)   db_hh = sum of dslots    (of the recurrent product)
//   dW_hr[P, H]   = dprojected^T x h before the projection
//   dx[R, I]      = dslots x W_ih
//
// The operands are found through row pointers like everywhere else, so packed, ragged, reset and
// batch-first sequences need no copy, and a call of a few microseconds needs no further library
// calls. Blocks of kBlockRows rows are packed (the right operand into panels, the left one
// transposed) and each block's sums, of at most kDepth rows, are added to the result: rounding
// grows with R / kDepth and kDepth, not with R. Threads own rows of the weight gradients and blocks
// of dx. Gradients of 16-bit weights are summed in float and rounded once.
#pragma once

#include "cpu/gemm.h"
#include "cpu/panels.h"
#include "cpu/rows.h"
#include "cpu/threads.h"
#include "plan.h"
#include "workspace.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

constexpr int64_t kBlockRows = 384;
constexpr int kOuterRows = 4;  // at most, of a block that is not worth panels

// Walks all active rows, step by step.
class ActiveRows {
 public:
  explicit ActiveRows(const Steps& steps) : steps_(steps) {}

  // The next rows, at most `limit`; 0 at the end.
  int64_t next(int64_t* t, int64_t* slot, int64_t limit) {
    int64_t count = 0;
    while (count < limit && t_ < steps_.T) {
      const int64_t active = active_rows(steps_, t_);
      for (; slot_ < active && count < limit; ++slot_, ++count) {
        t[count] = t_;
        slot[count] = slot_;
      }
      if (slot_ < active) break;
      slot_ = 0;
      ++t_;
    }
    return count;
  }

 private:
  const Steps& steps_;
  int64_t t_ = 0, slot_ = 0;
};

// What is multiplied: gradients of slots, and operands of the layer. With two terms, dW is the sum
// of both products, dx likewise; db is of the first term alone. In the second one null is zeros.
template <typename T>
struct GradientTerm {
  const T* dslots;  // [D, total, S*H]
  Rows<const T> x, y;
  State<const T> h0;
  const Weights<T>* weights;
  const T *dprojected, *unprojected;  // [D, total, O] and [D, total, H]
};

template <typename T>
struct GradientProducts {
  const Sizes& sizes;
  const Steps& steps;
  int terms;
  GradientTerm<T> term[2];
  Rows<T> dx;
  const WeightGradients<T>* gradients;
  bool adds;  // to what the gradients of the weights hold
};

template <typename T, typename Cell>
class Gradients {
  using A = Compute<T>;
  using E = Operand<T>;
  static constexpr CellShape kShape = Cell::kShape;
  static constexpr int64_t kWidth = kPanelWidth<T>;
  static_assert(kBlockRows % kLanes<T> == 0 && kGroupRows % kLanes<T> == 0,
                "transposition works on whole vectors");

 public:
  Gradients(const GradientProducts<T>& of, const Plan& plan, Carver& carver)
      : of_(of), block_rows_(min_of(kBlockRows, ceil_div(of.steps.total, kLanes<T>) * kLanes<T>)) {
    const Sizes& z = of.sizes;
    zeros_ = carver.take<T>(max_of(z.H, z.O));
    each_input([&](ColumnPanels<T>& panels, const Weights<T>& w) {
      const bool packs = plan.input == Reading::kPacked;
      panels = {kShape.gates * z.H, z.I, w.w_ih, w.w_ih_row, nullptr, packs, nullptr};
      panels.packed = carver.take<A>(panels.lanes());
    });
    for (int d = 0; kNarrow<T> && d < z.D; ++d) {
      for (Matrix m : {kInput, kRecurrent, kProjection}) {
        const Result to = result(d, m);
        if (to.weight) sums_[d][m].weight = carver.take<A>(to.rows * to.width);
        if (to.bias) sums_[d][m].bias = carver.take<A>(to.rows);
      }
    }
    Carver count(nullptr);
    scratch(count);
    scratch_bytes_ = int64_t(count.used());
    scratch_ = carver.take<char>(plan.threads * scratch_bytes_);
  }

  const T* zeros() const { return zeros_; }

  void prepare() { zero_row(zeros_, 0, max_of(of_.sizes.H, of_.sizes.O)); }

  // Before the barrier that precedes the loop.
  void pack(int thread, int threads) {
    each_input([&](const ColumnPanels<T>& panels, const Weights<T>&) {
      for (int64_t p = thread; p < panels.count(); p += threads) panels.pack(p);
    });
  }

  void run(int thread, int threads) const {
    Carver carver(scratch_ + thread * scratch_bytes_);
    const Scratch s = scratch(carver);
    for (int d = 0; d < of_.sizes.D; ++d) weight_gradients(d, thread, threads, s);
    if (of_.dx.data) input_gradient(thread, threads, s);
  }

 private:
  struct Scratch {
    A* right;                           // [panels][groups of block_rows_][kWidth]
    E* left;                            // [kGroupRows][block_rows_]
    int64_t *t, *slot;                  // [block_rows_]
    const T **left_rows, **right_rows;  // [block_rows_]
    LeftRows<T> dslots;                 // [kGroupRows][G*H], where dx is wanted
  };
  enum Matrix { kInput, kRecurrent, kProjection, kMatrices };
  // The gradients of one matrix of weights, null where not wanted.
  struct Result {
    int64_t rows, width;
    T* weight;
    T* bias;
  };
  // Where they are summed.
  struct Sums {
    A* weight = nullptr;
    A* bias = nullptr;
  };
  // One weight gradient: out[row_of(j)] (+)= sum over rows of left[j] * right, and the sum of left
  // itself.
  struct Target {
    int64_t rows, width;
    A* weight;
    A* bias;
    int64_t H;     // rows of one gate
    bool rotated;  // recurrent slots stand in another order than the gates

    int64_t row_of(int64_t j) const {
      return rotated ? kShape.recurrent_gate(int(j / H)) * H + j % H : j;
    }
    explicit operator bool() const { return weight || bias; }
  };

  // f(panels, weights) for each W_ih that dx needs.
  template <typename F>
  void each_input(F f) {
    for (int k = 0; of_.dx.data && k < of_.terms; ++k) {
      for (int d = 0; d < of_.sizes.D; ++d) {
        const Weights<T>& weights = of_.term[k].weights[d];
        if (weights.w_ih) f(input_[k][d], weights);
      }
    }
  }

  Result result(int d, Matrix matrix) const {
    const Sizes& z = of_.sizes;
    const WeightGradients<T>& g = of_.gradients[d];
    const int64_t rows = kShape.gates * z.H;
    return matrix == kInput       ? Result{rows, z.I, g.w_ih, g.b_ih}
           : matrix == kRecurrent ? Result{rows, z.O, g.w_hh, g.b_hh}
                                  : Result{z.O, z.H, g.w_hr, nullptr};
  }
  Target target(int d, Matrix matrix) const {
    const Result to = result(d, matrix);
    Sums sums;
    if constexpr (kNarrow<T>) {
      sums = sums_[d][matrix];
    } else {
      sums = {numbers(to.weight), numbers(to.bias)};
    }
    return {to.rows, to.width, sums.weight, sums.bias, of_.sizes.H, matrix == kRecurrent};
  }

  Scratch scratch(Carver& carver) const {
    const Sizes& z = of_.sizes;
    const int64_t widest = max_of(max_of(z.I, z.O), z.H);
    return {carver.take<A>(ceil_div(widest, kWidth) * kWidth * groups<E>(block_rows_)),
            carver.take<E>(kGroupRows * block_rows_),
            carver.take<int64_t>(block_rows_),
            carver.take<int64_t>(block_rows_),
            carver.take<const T*>(block_rows_),
            carver.take<const T*>(block_rows_),
            LeftRows<T>(of_.dx.data ? kGroupRows : 0, kShape.gates * z.H, carver)};
  }

  void weight_gradients(int d, int thread, int threads, const Scratch& s) const {
    const Sizes& z = of_.sizes;
    ActiveRows rows(of_.steps);
    bool add = of_.adds && !kNarrow<T>;
    for (bool first = true;; first = false) {
      const int64_t count = rows.next(s.t, s.slot, block_rows_);
      if (count == 0 && !first) break;
      const auto gather = [&](const T** to, auto row) {
        for (int64_t r = 0; r < count; ++r) to[r] = row(s.t[r], s.slot[r]);
      };
      const auto of = [&](const Rows<const T>& from, int64_t first) {
        return [&, first](int64_t t, int64_t slot) {
          return row_at(of_.steps, from, t, slot) + first;
        };
      };
      for (int k = 0; k < of_.terms; ++k) {
        const GradientTerm<T>& term = of_.term[k];
        const Rows<const T> dslots = saved_rows(of_.steps, term.dslots, d, kShape.slots * z.H);
        const Rows<const T> y = columns(term.y, d * z.O);
        Target input = target(d, kInput), recurrent = target(d, kRecurrent);
        const Target projection = target(d, kProjection);
        if (k) input.bias = recurrent.bias = nullptr;
        if (input && (k == 0 || term.x.data)) {
          gather(s.left_rows, of(dslots, kShape.input_slot * z.H));
          gather(s.right_rows, of(term.x, 0));
          accumulate(input, count, thread, threads, s, add || k);
        }
        if (recurrent) {
          gather(s.left_rows, of(dslots, 0));
          gather(s.right_rows, [&](int64_t t, int64_t slot) {
            return previous_state(of_.steps, d, t, slot, y, term.h0, zeros_);
          });
          accumulate(recurrent, count, thread, threads, s, add || k);
        }
        if (projection) {
          gather(s.left_rows, of(saved_rows(of_.steps, term.dprojected, d, z.O), 0));
          gather(s.right_rows, of(saved_rows(of_.steps, term.unprojected, d, z.H), 0));
          accumulate(projection, count, thread, threads, s, add || k);
        }
      }
      add = true;
    }
    if constexpr (kNarrow<T>) {
      for (Matrix m : {kInput, kRecurrent, kProjection}) round(d, m, thread, threads);
    }
  }

  // The thread's own rows, from where they were summed.
  void round(int d, Matrix matrix, int thread, int threads) const {
    const Target from = target(d, matrix);
    const Result to = result(d, matrix);
    const Range own = own_rows(from, thread, threads);
    for (int64_t j = own.begin; from.weight && j < own.end; ++j) {
      const int64_t row = from.row_of(j) * from.width;
      round_row(to.weight + row, from.weight + row, 0, from.width);
    }
    for (int64_t j = own.begin; from.bias && j < own.end; ++j) {
      round_row(to.bias, from.bias, from.row_of(j), from.row_of(j) + 1);
    }
  }
  void round_row(T* to, const A* from, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; i += kLanes<T>) {
      Vec<T> sum = load_up_to(from + i, end - i);
      if (of_.adds) sum += load_up_to(to + i, end - i);
      store_up_to(to + i, sum, end - i);
    }
  }

  static Range own_rows(const Target& target, int thread, int threads) {
    return split(target.rows, threads, thread, kLanes<T>);
  }

  // One block of rows of one weight gradient, the thread's own rows of the result.
  void accumulate(const Target& target, int64_t count, int thread, int threads, const Scratch& s,
                  bool add) const {
    const Range own = own_rows(target, thread, threads);
    if (own.begin == own.end) return;
    const bool few = count > 0 && count <= kOuterRows;
    const ColumnPanels<T> right = {count, target.width, nullptr, 0, nullptr, true, s.right};
    for (int64_t p = 0; target.weight && !few && p < right.count(); ++p) {
      right.pack_rows(p, [&](int64_t r) { return s.right_rows[r]; });
    }
    const E* left[kGroupRows];
    A* out[kGroupRows];
    for (int64_t i = 0; i < kGroupRows; ++i) left[i] = s.left + i * block_rows_;
    for (int64_t j = own.begin, rows; j < own.end; j += rows) {
      // Of one gate: rows that stand side by side in the result as well.
      rows = min_of(min_of(kGroupRows, own.end - j), target.H - j % target.H);
      if (target.bias) add_bias(target, count, j, rows, s, add);
      if (!target.weight) continue;
      A* const to = target.weight + target.row_of(j) * target.width;
      if (few) {
        outer_products(count, target.width, j, rows, to, s, add);
        continue;
      }
      transpose_left(count, j, rows, s);
      for (int64_t p = 0; p < right.count(); ++p) {
        if (right.columns(p) % kLanes<T> == 0 && (!add || count <= kDepth)) {
          right.put(p, rows, left, to + p * kWidth, target.width, add);
          continue;
        }
        for (int64_t i = 0; i < rows; ++i) out[i] = to + i * target.width + p * kWidth;
        right.multiply(p, rows, left, out, add);
      }
    }
  }

  // Of few rows, which are written once: nothing is packed.
  static void outer_products(int64_t count, int64_t width, int64_t j, int64_t rows, A* to,
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
  template <int kRows>
  static void outer_products(int64_t width, int64_t j, int64_t rows, A* to, const Scratch& s,
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

  // Rows j to j + rows, of one gate.
  void add_bias(const Target& target, int64_t count, int64_t j, int64_t rows, const Scratch& s,
                bool add) const {
    A* const to = target.bias + target.row_of(j);
    for (int64_t i = 0; i < rows; i += kLanes<T>) {
      constexpr int64_t kPart = 16;  // rows of one sum, so that rounding grows slowly
      Vec<T> sum{};
      for (int64_t r = 0; r < count; r += kPart) {
        Vec<T> part{};
        const int64_t end = min_of(r + kPart, count);
        for (int64_t q = r; q < end; ++q) part += load_up_to(s.left_rows[q] + j + i, rows - i);
        sum += part;
      }
      if (add) sum += load_up_to(to + i, rows - i);
      store_up_to(to + i, sum, rows - i);
    }
  }

  // s.left[i][r] = left row r, column j + i.
  void transpose_left(int64_t count, int64_t j, int64_t rows, const Scratch& s) const {
    constexpr int kL = kLanes<T>;
    for (int64_t i = 0; i < rows; i += kL) {
      for (int64_t r = 0; r < count; r += kL) {
        Vec<T> block[kL];
#pragma GCC unroll 16
        for (int l = 0; l < kL; ++l) {
          block[l] = r + l < count ? load_up_to(s.left_rows[r + l] + j + i, rows - i) : Vec<T>{};
        }
        transpose<A>(block);
#pragma GCC unroll 16
        for (int l = 0; l < kL; ++l) store(s.left + (i + l) * block_rows_ + r, block[l]);
      }
    }
  }

  void input_gradient(int thread, int threads, const Scratch& s) const {
    const Sizes& z = of_.sizes;
    T* out[kGroupRows];
    T* shifted[kGroupRows];
    ActiveRows rows(of_.steps);
    int64_t count;
    for (int64_t block = 0; (count = rows.next(s.t, s.slot, kGroupRows)) > 0; ++block) {
      if (block % threads != thread) continue;
      for (int64_t r = 0; r < count; ++r) out[r] = row_at(of_.steps, of_.dx, s.t[r], s.slot[r]);
      for (int i = 0; i < of_.terms * z.D; ++i) {
        const int k = i / z.D, d = i % z.D;
        const GradientTerm<T>& term = of_.term[k];
        if (!term.weights[d].w_ih) continue;
        const Rows<const T> dslots = saved_rows(of_.steps, term.dslots, d, kShape.slots * z.H);
        for (int64_t r = 0; r < count; ++r) {
          s.dslots[r] = row_at(of_.steps, dslots, s.t[r], s.slot[r]) + kShape.input_slot * z.H;
        }
        const E* const* left = s.dslots.operands(count);
        const ColumnPanels<T>& w = input_[k][d];
        for (int64_t p = 0; p < w.count(); ++p) {
          for (int64_t r = 0; r < count; ++r) shifted[r] = out[r] + p * kWidth;
          w.multiply(p, count, left, shifted, i > 0);
        }
      }
    }
    zero_idle_rows(thread, threads);
  }

  void zero_idle_rows(int thread, int threads) const {
    if (!of_.steps.active || of_.steps.start) return;
    for (int64_t t = thread; t < of_.steps.T; t += threads) {
      for (int64_t slot = active_rows(of_.steps, t); slot < of_.steps.N; ++slot) {
        zero_row(row_at(of_.steps, of_.dx, t, slot), 0, of_.sizes.I);
      }
    }
  }

  const GradientProducts<T> of_;
  int64_t block_rows_;  // at most kBlockRows, less where there are less
  T* zeros_;
  ColumnPanels<T> input_[2][kMaxDirections];
  Sums sums_[kMaxDirections][kMatrices];
  char* scratch_;
  int64_t scratch_bytes_;
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
