// Backward pass, plain tier, in reverse scan order:
//
//   dh(t) = dy(t) + dh          dslots(t), dc, dh' = cell_backward(slots(t), c(t), c(t-1), h(t-1),
//   dh(t), dc) dh    = dh' + dslots(t) x W_hh
//
// and after the loop (PlainGradients) the gradients of weights, biases and x, one thread an
// element. Shapes as in scan.h, teams as in teams.cuh. A block owns the same units in dslots and
// in dh; between writing dslots(t) and reading it whole stands one epoch; with a projection
// another, between dy + dh and its product with W_hr.
#pragma once

#include "cuda/teams.cuh"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

template <typename T, typename Cell>
class PlainBackward {
  using A = Compute<T>;
  static constexpr CellShape kShape = Cell::kShape;

 public:
  struct Arguments {
    Backward<T> b;
    Teams teams;
    const T* zeros;  // [max(H, O)]
    A *dh, *dc;      // [D, N, O], [D, N, H]: what passes from step to step
    A* dm;           // [D, N, H] where there is a projection: the gradient of what is projected
  };

  static constexpr bool kBlocksWait = true;
  static constexpr int kMostThreads = kPlainThreads;
  static constexpr int64_t kSharedBytes = sizeof(A) * kRowTile * kChunk;

  RNNKERN_DEVICE static void run(const Arguments& arguments) { PlainBackward(arguments).scan(); }

 private:
  RNNKERN_DEVICE explicit PlainBackward(const Arguments& a)
      : a_(a),
        b_(a.b),
        z_(a.b.sizes),
        s_(a.b.steps),
        share_(share_of(z_, s_, a.teams, block_index())),
        d_(share_.direction),
        loads_(b_, a.zeros, d_),
        dslots_(saved_rows(s_, b_.dslots, d_, kShape.slots * z_.H)),
        dprojected_(saved_rows(s_, b_.dprojected, d_, z_.O)) {}

  RNNKERN_DEVICE void scan() {
    int epoch = 0;
    for (int64_t i = 0; i < s_.T; ++i) {
      const Visit v = visit(s_, d_ == 1, i, share_.rows.begin, share_.rows.end);
      const Range active = {share_.rows.begin, v.active_end};
      zero_inactive(v);
      enter({v.entering, v.active_end});
      sync_block();  // dh of these rows, and of the step before
      if (z_.projected) {
        for_each_element(active, share_.outputs, [&](int64_t slot, int64_t o) {
          put(row_at(s_, dprojected_, v.t, slot) + o, dh(slot)[o] + loads_.dy(v.t, slot, o));
        });
        publish(share_, ++epoch);
        wait_for(share_, a_.teams, epoch);
        for_each_tile(active, share_.units, [&](int64_t row, int64_t u) { unproject(v, row, u); });
        sync_block();
      }
      for_each_element(active, share_.units, [&](int64_t slot, int64_t u) { cell(v, slot, u); });
      publish(share_, ++epoch);
      wait_for(share_, a_.teams, epoch);
      for_each_tile(active, share_.outputs, [&](int64_t row, int64_t o) { product(v, row, o); });
    }
    pass_idle_rows(s_, share_, share_.outputs, b_.dhn, b_.dh0);
    if (kShape.cell_state) pass_idle_rows(s_, share_, share_.units, b_.dcn, b_.dc0);
  }

  RNNKERN_DEVICE A* dh(int64_t slot) const { return a_.dh + (d_ * s_.N + slot) * z_.O; }
  RNNKERN_DEVICE A* dc(int64_t slot) const { return a_.dc + (d_ * s_.N + slot) * z_.H; }
  RNNKERN_DEVICE A* dm(int64_t slot) const { return a_.dm + (d_ * s_.N + slot) * z_.H; }

  // Padded rows past their end: the products after the loop take all rows.
  RNNKERN_DEVICE void zero_inactive(const Visit& v) const {
    if (!s_.active || s_.start) return;
    const Range rows = {v.active_end, share_.rows.end};
    for_each_element(rows, share_.units, [&](int64_t slot, int64_t u) {
      T* to = row_at(s_, dslots_, v.t, slot) + u;
#pragma unroll
      for (int i = 0; i < kShape.slots; ++i) to[i * z_.H] = T{};
    });
    if (!z_.projected) return;
    for_each_element(rows, share_.outputs,
                     [&](int64_t slot, int64_t o) { row_at(s_, dprojected_, v.t, slot)[o] = T{}; });
  }

  // The gradients a row starts from at its last step: those of its final states.
  RNNKERN_DEVICE void enter(const Range& rows) const {
    for_each_element(rows, share_.outputs, [&](int64_t slot, int64_t o) {
      dh(slot)[o] = b_.dhn.data ? value(state_at(s_, b_.dhn, d_, slot)[o]) : A(0);
    });
    if (!kShape.cell_state) return;
    for_each_element(rows, share_.units, [&](int64_t slot, int64_t u) {
      dc(slot)[u] = b_.dcn.data ? value(state_at(s_, b_.dcn, d_, slot)[u]) : A(0);
    });
  }

  // What a step hands on to the one before it in time: to the carry, where no episode begins at
  // this step; and to the gradient of the initial state where it is the row's first.
  RNNKERN_DEVICE void hand_on(const Visit& v, int64_t slot, int64_t column, A value, A* carry,
                              const State<T>& initial) const {
    if (cut(s_, d_, v.t, slot)) value = 0;
    carry[column] = value;
    if (slot >= v.leaving && initial.data) put(state_at(s_, initial, d_, slot) + column, value);
  }

  // dm = (dy + dh) x W_hr
  RNNKERN_DEVICE void unproject(const Visit& v, int64_t row, int64_t unit) const {
    const int rows = int(least(kRowTile, v.active_end - row));
    const bool mine = unit < share_.units.end;
    const Weights<T>& w = b_.weights[d_];
    A sums[1][kRowTile] = {};
    add_product<1>(
        z_.O, rows, mine, [&](int r) { return row_at(s_, dprojected_, v.t, row + r); },
        [&](int, int64_t k) { return w.w_hr[k * w.w_hr_row + unit]; }, sums);
    sum_over_warp(sums[0]);
    if (mine && lane_index() < rows) dm(row + lane_index())[unit] = own_row(sums[0]);
  }

  RNNKERN_DEVICE void cell(const Visit& v, int64_t slot, int64_t unit) const {
    Step<A> s = {};
    const int64_t H = z_.H;
    loads_.get_step(v.t, slot, unit, &s);
    if constexpr (kShape.cell_state) s.dc = dc(slot)[unit];
    s.dh = z_.projected ? dm(slot)[unit] : dh(slot)[unit] + loads_.dy(v.t, slot, unit);
    Cell::backward(s);
    T* to = row_at(s_, dslots_, v.t, slot) + unit;
#pragma unroll
    for (int i = 0; i < kShape.slots; ++i) put(to + i * H, s.slot[i]);
    if constexpr (kShape.cell_state) hand_on(v, slot, unit, s.dc, dc(slot), b_.dc0);
    if constexpr (kShape.reads_h) dh(slot)[unit] = s.dh_direct;
  }

  // dh = dh' + dslots x W_hh
  RNNKERN_DEVICE void product(const Visit& v, int64_t row, int64_t o) const {
    const int rows = int(least(kRowTile, v.active_end - row));
    const bool mine = o < share_.outputs.end;
    const Weights<T>& w = b_.weights[d_];
    const int64_t H = z_.H;
    A sums[1][kRowTile] = {};
    add_product<1>(
        kShape.gates * H, rows, mine, [&](int r) { return row_at(s_, dslots_, v.t, row + r); },
        [&](int, int64_t k) {
          return w.w_hh[(recurrent_gate<Cell>(int(k / H)) * H + k % H) * w.w_hh_row + o];
        },
        sums);
    sum_over_warp(sums[0]);
    if (!mine || lane_index() >= rows) return;
    const int64_t slot = row + lane_index();
    const A direct = kShape.reads_h ? dh(slot)[o] : A(0);
    hand_on(v, slot, o, direct + own_row(sums[0]), dh(slot), b_.dh0);
  }

  const Arguments& a_;
  const Backward<T>& b_;
  const Sizes& z_;
  const Steps& s_;
  const Share share_;
  const int d_;
  const BackwardLoads<T, Cell> loads_;
  const Rows<T> dslots_, dprojected_;
};

// After the loop: dW_ih, dW_hh, dW_hr, biases and dx. Sums of sums over at most kSumRows rows (or
// k), so that rounding does not grow with their number.
template <typename T, typename Cell>
class PlainGradients {
  using A = Compute<T>;
  static constexpr CellShape kShape = Cell::kShape;
  static constexpr int kSumRows = 256;

 public:
  struct Arguments {
    Backward<T> b;
    const T* zeros;
  };

  static constexpr bool kBlocksWait = false;
  static constexpr int kMostThreads = kPlainThreads;

  RNNKERN_DEVICE static void run(const Arguments& arguments) { PlainGradients(arguments).all(); }

 private:
  RNNKERN_DEVICE explicit PlainGradients(const Arguments& a)
      : a_(a), b_(a.b), z_(a.b.sizes), s_(a.b.steps) {}

  RNNKERN_DEVICE void all() const {
    for (int d = 0; d < z_.D; ++d) weights(d);
    if (b_.dx.data) input();
  }

  // Sums of sums.
  class Sum {
   public:
    RNNKERN_DEVICE void add(A term) {
      part_ += term;
      if (++count_ % kSumRows) return;
      all_ += part_;
      part_ = 0;
    }
    RNNKERN_DEVICE A total() const { return all_ + part_; }

   private:
    A all_ = 0, part_ = 0;
    int64_t count_ = 0;
  };

  // f(i) for i < count, shared out among all threads of the grid.
  template <typename F>
  RNNKERN_DEVICE static void for_all(int64_t count, F f) {
    const int64_t first = int64_t(block_index()) * threads_per_block() + thread_index();
    for (int64_t i = first; i < count; i += int64_t(blocks_in_grid()) * threads_per_block()) f(i);
  }

  // The sum of term(t, slot) over all rows that take part.
  template <typename F>
  RNNKERN_DEVICE A sum_over_rows(F term) const {
    Sum sum;
    for (int64_t t = 0; t < s_.T; ++t) {
      for (int64_t slot = 0; slot < active_rows(s_, t); ++slot) sum.add(term(t, slot));
    }
    return sum.total();
  }

  // to[row_of(j)][i] = sum of left[j] right[i], bias[row_of(j)] = sum of left[j], for j < rows.
  template <typename Left, typename Right, typename RowOf>
  RNNKERN_DEVICE void matrix(int64_t rows, int64_t width, T* to, T* bias, Left left, Right right,
                             RowOf row_of) const {
    if (to) {
      for_all(rows * width, [&](int64_t e) {
        const int64_t j = e / width, i = e % width;
        put(to + row_of(j) * width + i, sum_over_rows([&](int64_t t, int64_t slot) {
              return value(left(t, slot)[j]) * value(right(t, slot)[i]);
            }));
      });
    }
    if (bias) {
      for_all(rows, [&](int64_t j) {
        put(bias + row_of(j),
            sum_over_rows([&](int64_t t, int64_t slot) { return value(left(t, slot)[j]); }));
      });
    }
  }

  RNNKERN_DEVICE Rows<const T> dslots(int d) const {
    return saved_rows(s_, static_cast<const T*>(b_.dslots), d, kShape.slots * z_.H);
  }

  RNNKERN_DEVICE void weights(int d) const {
    const int64_t H = z_.H, rows = kShape.gates * H;
    const WeightGradients<T>& g = b_.gradients[d];
    const Rows<const T> slots = dslots(d), y = columns(b_.y, d * z_.O);
    matrix(
        rows, z_.I, g.w_ih, g.b_ih,
        [&](int64_t t, int64_t slot) { return row_at(s_, slots, t, slot) + kShape.input_slot * H; },
        [&](int64_t t, int64_t slot) { return row_at(s_, b_.x, t, slot); },
        [](int64_t j) { return j; });
    matrix(
        rows, z_.O, g.w_hh, g.b_hh,
        [&](int64_t t, int64_t slot) { return row_at(s_, slots, t, slot); },
        [&](int64_t t, int64_t slot) { return previous_state(s_, d, t, slot, y, b_.h0, a_.zeros); },
        [&](int64_t j) { return recurrent_gate<Cell>(int(j / H)) * H + j % H; });
    if (!z_.projected) return;
    const Rows<const T> left = saved_rows(s_, static_cast<const T*>(b_.dprojected), d, z_.O),
                        right = saved_rows(s_, b_.unprojected, d, H);
    matrix(
        z_.O, H, g.w_hr, static_cast<T*>(nullptr),
        [&](int64_t t, int64_t slot) { return row_at(s_, left, t, slot); },
        [&](int64_t t, int64_t slot) { return row_at(s_, right, t, slot); },
        [](int64_t j) { return j; });
  }

  // dx = dslots x W_ih; zero where a row takes no part.
  RNNKERN_DEVICE void input() const {
    const int64_t H = z_.H;
    for_all(s_.T * s_.N * z_.I, [&](int64_t e) {
      const int64_t i = e % z_.I, slot = e / z_.I % s_.N, t = e / z_.I / s_.N;
      const bool active = slot < active_rows(s_, t);
      if (!active && s_.start) return;
      Sum sum;
      for (int d = 0; active && d < z_.D; ++d) {
        const T* left = row_at(s_, dslots(d), t, slot) + kShape.input_slot * H;
        const Weights<T>& w = b_.weights[d];
        for (int64_t k = 0; k < kShape.gates * H; ++k) {
          sum.add(value(left[k]) * value(w.w_ih[k * w.w_ih_row + i]));
        }
      }
      put(row_at(s_, b_.dx, t, slot) + i, sum.total());
    });
  }

  const Arguments& a_;
  const Backward<T>& b_;
  const Sizes& z_;
  const Steps& s_;
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
