// Forward pass, plain tier:  slots(t) = W_ih x(t) + W_hh h(t-1) + biases,  (h, c)(t) = cell(slots,
// c(t-1), h(t-1)).  Shapes as in scan.h, teams as in teams.cuh.
//
// Both products are made step by step, with nothing prepared before the loop. A thread keeps the
// units and rows of its cell states through all steps, so that only h passes between threads. With
// a projection there are two epochs a step: h before it, and y.
#pragma once

#include "cuda/teams.cuh"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

template <typename T, typename Cell>
class PlainForward {
  using A = Compute<T>;
  static constexpr CellShape kShape = Cell::kShape;
  static constexpr bool kCarries = kCarriesCells<T, Cell>;

 public:
  struct Arguments {
    Forward<T> f;
    Teams teams;
    const T* zeros;  // [max(H, O)]
    T* unprojected;  // [D, N, H] where there is a projection and nothing is saved
    A* carried;      // [D, N, H] where kCarriesCells
  };

  static constexpr bool kBlocksWait = true;
  static constexpr int kMostThreads = kPlainThreads;
  static constexpr int64_t kSharedBytes = sizeof(A) * kRowTile * kChunk;

  RNNKERN_DEVICE static void run(const Arguments& arguments) { PlainForward(arguments).scan(); }

 private:
  RNNKERN_DEVICE explicit PlainForward(const Arguments& a)
      : a_(a),
        f_(a.f),
        z_(a.f.sizes),
        s_(a.f.steps),
        share_(share_of(z_, s_, a.teams, block_index())),
        d_(share_.direction),
        y_(columns(f_.y, d_ * z_.O)),
        h_(y_),
        stores_(f_, d_) {
    if (!z_.projected) return;
    h_ = f_.unprojected ? saved_rows(s_, f_.unprojected, d_, z_.H)
                        : Rows<T>{a.unprojected + d_ * s_.N * z_.H, 0, z_.H};
  }

  RNNKERN_DEVICE void scan() {
    int epoch = 0;
    for (int64_t i = 0; i < s_.T; ++i) {
      const Visit v = visit(s_, d_ == 0, i, share_.rows.begin, share_.rows.end);
      wait_for(share_, a_.teams, epoch);
      for_each_tile(active(v), share_.units,
                    [&](int64_t row, int64_t unit) { step(v, row, unit); });
      if (z_.projected) {
        publish(share_, ++epoch);
        wait_for(share_, a_.teams, epoch);
        for_each_tile(active(v), share_.outputs,
                      [&](int64_t row, int64_t o) { project(v, row, o); });
      }
      zero_inactive(v);
      publish(share_, ++epoch);
    }
    pass_idle_rows(s_, share_, share_.outputs, f_.h0, f_.hn);
    if (kShape.cell_state) pass_idle_rows(s_, share_, share_.units, f_.c0, f_.cn);
  }

  RNNKERN_DEVICE Range active(const Visit& v) const { return {share_.rows.begin, v.active_end}; }

  // One unit (none where it is beyond the block's own) of up to kRowTile rows.
  RNNKERN_DEVICE void step(const Visit& v, int64_t row, int64_t unit) const {
    const int rows = int(least(kRowTile, v.active_end - row));
    const bool mine = unit < share_.units.end;
    const Weights<T>& w = f_.weights[d_];
    const int64_t H = z_.H;
    A sums[kShape.slots][kRowTile] = {};
    add_product<kShape.gates>(
        z_.I, rows, mine, [&](int r) { return row_at(s_, f_.x, v.t, row + r); },
        [&](int i, int64_t k) {
          return w.w_ih[(input_gate<Cell>(i + kShape.input_slot) * H + unit) * w.w_ih_row + k];
        },
        sums + kShape.input_slot);
    add_product<kShape.gates>(
        z_.O, rows, mine, [&](int r) { return h_before(v.t, row + r); },
        [&](int i, int64_t k) {
          return w.w_hh[(recurrent_gate<Cell>(i) * H + unit) * w.w_hh_row + k];
        },
        sums);
    Step<A> s = {};
#pragma unroll
    for (int i = 0; i < kShape.slots; ++i) {
      sum_over_warp(sums[i]);
      if (mine) s.slot[i] = own_row(sums[i]) + bias_of<Cell>(w, H, i, unit);
    }
    if (mine && lane_index() < rows) cell(v, row + lane_index(), unit, &s);
  }

  RNNKERN_DEVICE const T* h_before(int64_t t, int64_t slot) const {
    const Rows<const T> y = {y_.data, y_.step, y_.row};
    return previous_state(s_, d_, t, slot, y, f_.h0, a_.zeros);
  }

  RNNKERN_DEVICE A c_before(int64_t t, int64_t slot, int64_t unit) const {
    if (cut(s_, d_, t, slot)) return 0;
    if (enters(s_, d_, t, slot)) return element_of(s_, f_.c0, d_, slot, unit);
    if constexpr (kCarries) return carried(slot)[unit];
    if (stores_.cells().data)
      return value(row_at(s_, stores_.cells(), previous(d_, t), slot)[unit]);
    return value(state_at(s_, f_.cn, d_, slot)[unit]);  // kept there from step to step
  }

  RNNKERN_DEVICE A* carried(int64_t slot) const { return a_.carried + (d_ * s_.N + slot) * z_.H; }

  // h first: others wait for it.
  RNNKERN_DEVICE void cell(const Visit& v, int64_t slot, int64_t unit, Step<A>* s) const {
    if constexpr (kShape.reads_h) s->h_prev = value(h_before(v.t, slot)[unit]);
    if constexpr (kShape.cell_state) s->c_prev = c_before(v.t, slot, unit);
    Cell::forward(*s);
    put(row_at(s_, h_, z_.projected && !f_.unprojected ? 0 : v.t, slot) + unit, s->h);
    if constexpr (kCarries) {
      if (f_.rounds_cells) s->c = rounded<T>(s->c);
      carried(slot)[unit] = s->c;
    } else if (kShape.cell_state && !stores_.cells().data) {
      put(state_at(s_, f_.cn, d_, slot) + unit, s->c);
    }
    stores_.put_step(v, slot, unit, *s);
  }

  // y = W_hr h
  RNNKERN_DEVICE void project(const Visit& v, int64_t row, int64_t o) const {
    const int rows = int(least(kRowTile, v.active_end - row));
    const bool mine = o < share_.outputs.end;
    const int64_t t_of_h = f_.unprojected ? v.t : 0;
    A sums[1][kRowTile] = {};
    add_product<1>(
        z_.H, rows, mine, [&](int r) { return row_at(s_, h_, t_of_h, row + r); },
        [&](int, int64_t k) { return f_.weights[d_].w_hr[o * f_.weights[d_].w_hr_row + k]; }, sums);
    sum_over_warp(sums[0]);
    if (!mine || lane_index() >= rows) return;
    const int64_t slot = row + lane_index();
    const A y = own_row(sums[0]);
    put(row_at(s_, y_, v.t, slot) + o, y);
    if (slot >= v.leaving) put(state_at(s_, f_.hn, d_, slot) + o, y);
  }

  // Padded rows past their end; what was to be projected too, for backward's products take all
  // rows.
  RNNKERN_DEVICE void zero_inactive(const Visit& v) const {
    if (!s_.active || s_.start) return;
    const Range rows = {v.active_end, share_.rows.end};
    for_each_element(rows, share_.outputs,
                     [&](int64_t slot, int64_t o) { row_at(s_, y_, v.t, slot)[o] = T{}; });
    if (!f_.unprojected) return;
    for_each_element(rows, share_.units,
                     [&](int64_t slot, int64_t unit) { row_at(s_, h_, v.t, slot)[unit] = T{}; });
  }

  const Arguments& a_;
  const Forward<T>& f_;
  const Sizes& z_;
  const Steps& s_;
  const Share share_;
  const int d_;
  const Rows<T> y_;
  Rows<T> h_;  // y, or what is projected to y
  const ForwardStores<T, Cell> stores_;
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
