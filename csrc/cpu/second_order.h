// The tangents of the forward and the backward pass (SecondOrder of scan.h):
//
//   ascending    a'(t) = W_ih x'(t) + W_ih' x(t) + W_hh' h(t-1) + W_hh h'(t-1) + b'
//                (h, c)'(t) = tangent of the cell
//   descending   (da, dh, dc)'(t) = backward of the cell on dual numbers
//                dh(t-1)  = dh direct + da(t) x W_hh        for values and tangents at once:
//                dh'(t-1) += da(t) x W_hh'                  two rows of one product for each row
//
// with a projection between cell and state as in forward.h and backward.h, and after the loops, as
// products over all rows at once (gradients.h), the tangents of dW, db and dx.
//
// The descending loop is that of backward.h. The cell's backward needs dh and dc themselves, which
// backward has not kept, so the loop carries the values along with their tangents. Products that no
// tangent of a state enters are computed before the loops: ascending for block_steps steps at once,
// descending for all of them. All in all there are 13 products, while forward has 2 and backward 4:
// for one row in one step 2 G H times 6 I + 7 O operations.
#pragma once

#include "cells/cells.h"
#include "cpu/backward.h"
#include "cpu/gradients.h"
#include "cpu/pass.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

template <typename T, typename Cell>
class SecondOrderScan : public Pass<SecondOrderScan<T, Cell>, T> {
  using Base = Pass<SecondOrderScan, T>;
  using Loop = BackwardLoop<T, Cell, 2>;
  using Panels = UnitPanels<T, Cell>;
  using D = Dual<Vec<T>>;
  using Base::steps_, Base::sizes_;
  friend Base;
  static constexpr CellShape kShape = Cell::kShape;
  static constexpr int kStored = kShape.stored();
  static constexpr int64_t kAccWidth = Panels::kAccWidth;
  static_assert(std::is_same_v<T, Compute<T>>, "tangents are not rounded from step to step");

 public:
  static constexpr int kPlanes = kShape.planes();

  // `up` says how the weights of the ascending products are read, and `down` says everything else.
  SecondOrderScan(const SecondOrder<T>& s, const Plan& up, const Plan& down, Carver& carver)
      : Base(s.sizes, s.steps, down, kPanelWidth<T>, carver),
        s_(s),
        value_(s),
        tangent_(s.tangent),
        block_steps_(up.block_steps),
        panels_{sizes_.H},
        loop_(complete_operands(carver), down, Base::zeros(), carver),
        gradients_(value_, &tangent_, down, Base::zeros(), carver),
        directions_{direction(0, up, carver), direction(1, up, carver)} {
    Base::take_scratch(carver);
  }

 private:
  enum Order { kValue, kTangent };
  // W_ih, W_hh and W_hr, or their tangents, as the ascending products read them.
  struct Matrices {
    StepWeights<T, Cell, Role::kInput> input;
    StepWeights<T, Cell, Role::kRecurrent> recurrent;
    ColumnPanels<T> projection;
  };
  struct Direction {
    Rows<const T> y, slots, cells, unprojected, dslots, tangent_sums;
    Rows<T> tangent_y, tangent_slots, tangent_cells, tangent_unprojected;
    Rows<T> crossing;  // da x W_hh' of all steps, or null
    T* bias;           // tangents
    Matrices by[2];    // Order
  };
  // One row in one step, ascending.
  struct RowPointers {
    const T *slots, *h, *h_prev, *c, *c_prev, *unprojected;
    const T *tangent_sums, *tangent_h_prev, *tangent_c_prev;
    T *tangent_y, *tangent_slots, *tangent_h, *tangent_c;
  };
  struct Scratch {
    T* acc;                         // [panels][capacity][kAccWidth]
    const T **x, **tangent_x, **h;  // [capacity]
    const T** tangent_h;            // [block_rows]
    LeftRows<T> multiplied;         // [kRowsAtOnce]
    RowPointers* pointers;          // [block_rows]
    typename Loop::Scratch descending;
  };
  using Part = rnnkern::RNNKERN_NAMESPACE::Part<Scratch>;

  // The operands, with the memory that the ascending loop writes for the descending loop and the
  // gradients.
  std::array<const Backward<T>*, 2> complete_operands(Carver& carver) {
    const int64_t rows = sizes_.D * steps_.total;
    tangent_.y = constant(s_.tangent_y);
    tangent_.slots = tangent_.dslots;
    if (kShape.cell_state)
      tangent_.cells = tangent_cells_ = carver.take<T>(rows * kPlanes * sizes_.H);
    if (sizes_.projected) {
      tangent_.unprojected = tangent_unprojected_ = carver.take<T>(rows * sizes_.H);
      for (Backward<T>* b : {&value_, &tangent_}) b->dprojected = carver.take<T>(rows * sizes_.O);
    }
    value_.dh0 = value_.dc0 = {};
    return {&value_, &tangent_};
  }

  Direction direction(int d, const Plan& up, Carver& carver) const {
    if (d >= sizes_.D) return {};
    const int64_t H = sizes_.H, S = kStored * H, O = sizes_.O;
    const Weights<T>&w = value_.weights[d], &tangent_w = tangent_.weights[d];
    T* const crossing = tangent_w.w_hh ? carver.take<T>(steps_.total * O) : nullptr;
    return {.y = columns(value_.y, d * O),
            .slots = saved_rows(steps_, value_.slots, d, S),
            .cells = saved_rows(steps_, value_.cells, d, kPlanes * H),
            .unprojected = saved_rows(steps_, value_.unprojected, d, H),
            .dslots = constant(saved_rows(steps_, value_.dslots, d, S)),
            .tangent_sums = saved_rows(steps_, s_.tangent_sums, d, S),
            .tangent_y = columns(s_.tangent_y, d * O),
            .tangent_slots = saved_rows(steps_, tangent_.dslots, d, S),
            .tangent_cells = saved_rows(steps_, tangent_cells_, d, kPlanes * H),
            .tangent_unprojected = saved_rows(steps_, tangent_unprojected_, d, H),
            .crossing = {crossing, steps_.N * O, O},
            .bias = carver.take<T>(panels_.count() * kAccWidth),
            .by = {matrices(w, up, carver), matrices(tangent_w, up, carver)}};
  }

  Matrices matrices(const Weights<T>& w, const Plan& up, Carver& carver) const {
    Matrices m = {
        .input = {.panels = panels_, .w = w.w_ih, .row_stride = w.w_ih_row, .K = sizes_.I},
        .recurrent = {.panels = panels_, .w = w.w_hh, .row_stride = w.w_hh_row, .K = sizes_.O},
        .projection = {.K = sizes_.H,
                       .width = sizes_.O,
                       .w = w.w_hr,
                       .row_stride = w.w_hr_row,
                       .transposed = true}};
    if (w.w_ih && up.input == Reading::kPacked) m.input.take_room(carver);
    if (w.w_hh && up.recurrent == Reading::kPacked) m.recurrent.take_room(carver);
    if (w.w_hr) m.projection.take_room(carver);
    return m;
  }

  int64_t capacity() const { return block_steps_ * Base::block_rows(); }

  Scratch scratch(Carver& carver) const {
    const int64_t rows = Base::block_rows();
    return {.acc = carver.take<T>(panels_.count() * capacity() * kAccWidth),
            .x = carver.take<const T*>(capacity()),
            .tangent_x = carver.take<const T*>(capacity()),
            .h = carver.take<const T*>(capacity()),
            .tangent_h = carver.take<const T*>(rows),
            .multiplied = LeftRows<T>(kRowsAtOnce, 0, carver),
            .pointers = carver.take<RowPointers>(rows),
            .descending = loop_.scratch(rows, carver)};
  }

  void pack(int thread, int threads) {
    for (int d = 0; d < sizes_.D; ++d) {
      const Direction& of = directions_[d];
      for_share(panels_.count(), thread, threads, [&](int64_t p) {
        panels_.pack_bias(p, tangent_.weights[d], of.bias + p * kAccWidth);
      });
      for (const Matrices& m : of.by) {
        pack_share(m.input, thread, threads);
        pack_share(m.recurrent, thread, threads);
        pack_share(m.projection, thread, threads);
      }
    }
    loop_.pack(thread, threads);
    gradients_.pack(thread, threads);
  }

  void run_task(const Part& part) const {
    const int d = part.direction;
    Base::for_blocks(
        part, block_steps_,
        [&](int64_t k, int64_t t, int64_t rank) {
          part.scratch.x[k] = row_at(steps_, value_.x, t, rank);
          part.scratch.tangent_x[k] = row_or_null(steps_, tangent_.x, t, rank);
          part.scratch.h[k] = Base::entering_state(d, t, rank, directions_[d].y, value_.h0);
        },
        [&](int64_t count) { add_known_products(part, count); },
        [&](const Visit& v, int64_t first) { ascend(part, v, first); });
    Base::finish_empty_rows(part, s_.tangent_hn, tangent_.h0, s_.tangent_cn, tangent_.c0);
    cross(part);
    Base::for_steps_back(part, [&](const Visit& v) { descend(part, v); });
    Base::for_empty_rows(part, [&](int64_t rank) { loop_.pass_empty_row(part, rank); });
  }

  RowPointers pointers(int d, int64_t t, int64_t rank) const {
    const Direction& of = directions_[d];
    const auto row = [&](const auto& rows) { return row_or_null(steps_, rows, t, rank); };
    const auto previous = [&](const Rows<const T>& states, const State<const T>& initial) {
      return Base::entering_state(d, t, rank, states, initial);
    };
    RowPointers r = {};
    r.slots = row(of.slots);
    r.h = row(of.y);
    r.h_prev = previous(of.y, value_.h0);
    r.unprojected = row(of.unprojected);
    r.tangent_sums = row(of.tangent_sums);
    r.tangent_h_prev = previous(constant(of.tangent_y), tangent_.h0);
    r.tangent_y = row(of.tangent_y);
    r.tangent_slots = row(of.tangent_slots);
    r.tangent_h = sizes_.projected ? row(of.tangent_unprojected) : r.tangent_y;
    if constexpr (kShape.cell_state) {
      r.c = row(of.cells);
      r.tangent_c = row(of.tangent_cells);
      r.c_prev = previous(of.cells, value_.c0);
      r.tangent_c_prev = previous(constant(of.tangent_cells), tangent_.c0);
    }
    return r;
  }

  // Computes the products that no tangent of a state enters, for `count` rows.
  void add_known_products(const Part& part, int64_t count) const {
    const Direction& of = directions_[part.direction];
    for_panels(part, [&](int64_t p, T* acc) {
      for (int64_t m = 0; m < count; ++m) {
        copy_row(acc + m * kAccWidth, of.bias + p * kAccWidth, 0, kAccWidth);
      }
      const auto add = [&](const auto& weights, const T* const* rows) {
        if (weights.w) weights.add(p, count, rows, acc, kAccWidth);
      };
      if (tangent_.x.data) add(of.by[kValue].input, part.scratch.tangent_x);
      add(of.by[kTangent].input, part.scratch.x);
      add(of.by[kTangent].recurrent, part.scratch.h);
    });
  }

  // Calls f(panel, its accumulators) for the panels of the thread's units.
  template <typename F>
  void for_panels(const Part& part, F f) const {
    const Range panels = Panels::panels_of(part.units);
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      f(p, part.scratch.acc + p * capacity() * kAccWidth);
    }
  }

  // One step. `first` is the number of its first row in the block.
  void ascend(const Part& part, const Visit& v, int64_t first) const {
    const int d = part.direction;
    const Direction& of = directions_[d];
    const int64_t count = part.active(v);
    const RowPointers* rows = part.scratch.pointers;
    for (int64_t k = 0; k < count; ++k) {
      part.scratch.pointers[k] = pointers(d, v.t, part.rows.begin + k);
      part.scratch.tangent_h[k] = rows[k].tangent_h_prev;
    }
    for_panels(part, [&](int64_t p, T* acc) {
      acc += first * kAccWidth;
      if constexpr (kShape.recurrent) {
        of.by[kValue].recurrent.add(p, count, part.scratch.tangent_h, acc, kAccWidth);
      }
      for (int64_t k = 0; k < count; ++k) tangent(d, p, rows[k], acc + k * kAccWidth);
    });
    if (sizes_.projected) project(part, count);
    Base::zero_padding(part, v, of.tangent_y);
    for (int64_t rank = v.leaving; rank < v.active_end; ++rank) {
      const auto finish = [&](const State<T>& to, const Rows<T>& from, Range own) {
        copy_row(state_at(steps_, to, d, rank), row_at(steps_, from, v.t, rank), own);
      };
      finish(s_.tangent_hn, of.tangent_y, part.columns);
      for_planes<kPlanes>(part.units, sizes_.H,
                          [&](Range own) { finish(s_.tangent_cn, of.tangent_cells, own); });
    }
    part.wait_for_team();
  }

  // y' = W_hr m' + W_hr' m, once the whole team has written m'. m is h before the projection.
  void project(const Part& part, int64_t count) const {
    const RowPointers* rows = part.scratch.pointers;
    const LeftRows<T>& left = part.scratch.multiplied;
    const auto& by = directions_[part.direction].by;
    const auto values = [&](int64_t k) { return rows[k].unprojected; };
    const auto tangents = [&](int64_t k) { return rows[k].tangent_h; };
    const auto y = [&](int64_t k) { return rows[k].tangent_y; };
    part.wait_for_team();
    by[kValue].projection.multiply_rows(part.columns, count, left, tangents, y, false);
    by[kTangent].projection.multiply_rows(part.columns, count, left, values, y, true);
  }

  // The cell on the units of a panel of one row.
  void tangent(int d, int64_t p, const RowPointers& row, const T* acc) const {
    const int64_t H = sizes_.H, width = panels_.width(p);
    for (int64_t v = 0; v < width; v += kLanes<T>) {
      const int64_t u = panels_.first_unit(p) + v, n = H - u;
      Step<D> s;
      if constexpr (kShape.saves_slots) {
#pragma GCC unroll 8
        for (int k = 0; k < kStored; ++k) s.slot[k].value = load_up_to(row.slots + k * H + u, n);
      }
#pragma GCC unroll 8
      for (int k = 0; k < kShape.slots; ++k) {
        s.slot[k].tangent = load(acc + Panels::slot_at(k, width) + v);
        if (row.tangent_sums) s.slot[k].tangent += load_up_to(row.tangent_sums + k * H + u, n);
      }
      load_parameters<kShape>(value_.weights[d], u, n,
                              [&](int k) -> auto& { return s.parameter[k].value; });
      load_parameters<kShape>(tangent_.weights[d], u, n,
                              [&](int k) -> auto& { return s.parameter[k].tangent; });
      if constexpr (!kShape.saves_slots) s.h.value = load_up_to(row.h + u, n);
      if constexpr (kShape.reads_h) {
        s.h_prev = {load_up_to(row.h_prev + u, n), load_up_to(row.tangent_h_prev + u, n)};
      }
      if constexpr (kShape.cell_state) {
        s.c.value = load_up_to(row.c + u, n);
        s.c_prev = {load_up_to(row.c_prev + u, n), load_up_to(row.tangent_c_prev + u, n)};
      }
      for (int k = 0; k < kShape.more_states; ++k) {
        const int64_t place = (k + 1) * H + u;
        s.more[k].value = load_up_to(row.c + place, n);
        s.more_prev[k] = {load_up_to(row.c_prev + place, n),
                          load_up_to(row.tangent_c_prev + place, n)};
      }
      Cell::tangent(s);
      if constexpr (kShape.saves_slots) {
#pragma GCC unroll 8
        for (int k = 0; k < kStored; ++k) {
          store_up_to(row.tangent_slots + k * H + u, s.slot[k].tangent, n);
        }
      }
      store_up_to(row.tangent_h + u, s.h.tangent, n);
      if constexpr (kShape.cell_state) store_up_to(row.tangent_c + u, s.c.tangent, n);
      for (int k = 0; k < kShape.more_states; ++k) {
        store_up_to(row.tangent_c + (k + 1) * H + u, s.more[k].tangent, n);
      }
    }
  }

  // crossing = da x W_hh' for all steps, in the thread's columns.
  void cross(const Part& part) const {
    const Direction& of = directions_[part.direction];
    if (!of.crossing.data) return;
    const T* da[kRowsAtOnce];
    T* to[kRowsAtOnce];
    int64_t count = 0;
    const auto multiply = [&] {
      loop_.recurrent(part.direction, kTangent)
          .multiply_rows(
              part.columns, count, part.scratch.multiplied, [&](int64_t k) { return da[k]; },
              [&](int64_t k) { return to[k]; }, false);
      count = 0;
    };
    for (int64_t t = 0; t < steps_.T; ++t) {
      const int64_t end = min_of(part.rows.end, active_rows(steps_, t));
      for (int64_t rank = part.rows.begin; rank < end; ++rank) {
        if (is_last(part, t, rank)) continue;
        da[count] = row_at(steps_, of.dslots, t, rank);
        to[count] = row_at(steps_, of.crossing, t, rank);
        if (++count == kRowsAtOnce) multiply();
      }
    }
    multiply();
  }

  // True if nothing reads the gradient that this step of the row passes on.
  bool is_last(const Part& part, int64_t t, int64_t rank) const {
    return !loop_.wants_dh0() && enters(steps_, part.direction, t, rank);
  }

  void descend(const Part& part, const Visit& v) const {
    const Direction& of = directions_[part.direction];
    loop_.step(part, part.scratch.descending, v);
    for (int64_t rank = part.rows.begin; of.crossing.data && rank < v.active_end; ++rank) {
      if (is_last(part, v.t, rank)) continue;
      const T* const crossing = row_at(steps_, of.crossing, v.t, rank);
      T* const to = loop_.dh(part.direction, rank, kTangent);
      for (int64_t i = part.columns.begin; i < part.columns.end; ++i) to[i] += crossing[i];
    }
    loop_.end_step(part, v);
  }

  void finish(int thread, int threads) const { gradients_.run(thread, threads); }

  const SecondOrder<T>& s_;
  Backward<T> value_, tangent_;
  T *tangent_cells_ = nullptr, *tangent_unprojected_ = nullptr;  // [D, total, H]
  const int64_t block_steps_;
  Panels panels_;
  Loop loop_;
  Gradients<T, Cell> gradients_;
  Direction directions_[kMaxDirections];
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
