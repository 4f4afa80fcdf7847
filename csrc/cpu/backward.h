// Backward pass of one layer, against scan order:
//
//   dh(t) = dy(t) + dh
//   dslots(t), dc, dh_direct = cell_backward(slots(t), c(t), c(t-1), h(t-1), dh(t), dc)
//   dh = dh_direct + (the first G slots of dslots(t)) x W_hh
//
// and after the loop, as products over all rows at once (gradients.h): dW_ih, dW_hh, dW_hr, biases
// and dx.
//
// Only dslots x W_hh is inside the loop. W_hh [G*H, O] is read by its rows k, in the order of these
// slots (GRU: m takes the rows of gate n), contiguous along the result, so packing is a copy and
// not a transposition. A member of a team (pass.h) owns the same units in dslots and in dh, and the
// barrier is between writing dslots(t) and reading all of it. The gradients of a step overwrite the
// saved slots if the caller passes the same memory for both.
//
// Recurrent dropout multiplies dslots x W_hh by the mask of h(t-1). Zoneout (noise.h) splits dh and
// dc in each step before the cell: the part that belongs to the states of the step before is held
// back until the cell has run. With layer normalisation (normalised.h), W_hh is multiplied by the
// gradients of the sums instead of dslots, and the gradient of c passes through its normalisation
// between two parts of the cell.
#pragma once

#include <array>

#include "cells/cells.h"
#include "cpu/gradients.h"
#include "cpu/noisy_rows.h"
#include "cpu/normalised.h"
#include "cpu/pass.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

// The loop, on values (kOrders = 1) or on dual numbers (kOrders = 2). On dual numbers, order 0 is
// the values and order 1 their tangents. Then dslots of order 0 is known and only read.
template <typename T, typename Cell, int kOrders>
class BackwardLoop {
  using A = Compute<T>;
  using V = std::conditional_t<kOrders == 1, Vec<T>, Dual<Vec<T>>>;
  static constexpr CellShape kShape = Cell::kShape;
  static constexpr int kStored = kShape.stored();
  static constexpr int kPlanes = kShape.planes();
  static constexpr int kLast = kOrders - 1;  // the order of the results

 public:
  // The pointers of one row in one step. dm is the gradient of h before the projection.
  struct RowPointers {
    struct {
      const T *h_prev, *c_prev, *h, *c, *slots, *dy;
      T *dslots, *dprojected;
      A *dh, *dc, *dm;
    } by[kOrders];  // by[k]: of order k
  };
  struct Scratch {
    LeftRows<T> dslots;     // [block_rows * kOrders][G*H]
    LeftRows<T> projected;  // [kRowsAtOnce][O]
    RowPointers* pointers;  // [block_rows]
    A* kept;                // [max(H, O)], with zoneout
  };

  BackwardLoop(const std::array<const Backward<T>*, kOrders>& by, const Plan& plan, const T* zeros,
               Carver& carver)
      : by_(by),
        sizes_(by[0]->sizes),
        steps_(by[0]->steps),
        packs_(plan.recurrent == Reading::kPacked),
        has_zoneout_(by[0]->noise.zoneout > 0),
        zeros_(zeros),
        directions_{direction(0, carver), direction(1, carver)},
        masks_(DropoutMasks<T>::take(by[0]->noise, sizes_, steps_, carver)),
        norms_(sizes_, steps_, carver) {
    const auto take = [&](int64_t width) {
      return CarriedRows<A, kOrders>::take(sizes_, steps_, width, carver);
    };
    dh_ = take(sizes_.O);
    if (kShape.cell_state) dc_ = take(kPlanes * sizes_.H);
    if (sizes_.projected) dm_ = take(sizes_.H);
    if (masks_) products_ = take(sizes_.O);
    if (has_zoneout_) held_h_ = take(sizes_.O);
    if (has_zoneout_ && kShape.cell_state) held_c_ = take(kPlanes * sizes_.H);
    if (by_[kLast]->dreset_h.data) dreset_h_ = take(sizes_.O);
    if (by_[kLast]->dreset_c.data) dreset_c_ = take(kPlanes * sizes_.H);
  }

  Scratch scratch(int64_t rows, Carver& carver) const {
    return {
        .dslots = LeftRows<T>(rows * kOrders, kShape.gates * sizes_.H, carver),
        .projected = LeftRows<T>(sizes_.projected ? kRowsAtOnce : 0, sizes_.O, carver),
        .pointers = carver.take<RowPointers>(rows),
        .kept = carver.take<A>(has_zoneout_ ? max_of(max_of(1, kPlanes) * sizes_.H, sizes_.O) : 0)};
  }

  void pack(int thread, int threads) const {
    for (int d = 0; d < sizes_.D; ++d) {
      for (const Operands& of : directions_[d].by) {
        pack_share(of.recurrent, thread, threads);
        pack_share(of.projection, thread, threads);
      }
    }
    masks_.draw(by_[0]->noise, sizes_, steps_, thread, threads);
  }

  const DropoutMasks<T>& masks() const { return masks_; }

  // The driver calls `begin` before the first step of a task, and `end` after the last one.
  template <typename Part>
  void begin(const Part& part) const {
    for_resets(part, [](A* sum, T*, Range own) { zero_row(sum, own); });
  }
  template <typename Part>
  void end(const Part& part) const {
    for_resets(part, [](const A* sum, T* to, Range own) { copy_row(to, sum, own); });
  }

  template <typename Part>
  void step(const Part& part, const Scratch& scratch, const Visit& v) const {
    const int64_t count = part.active(v);
    for (int64_t rank = v.entering; rank < v.active_end; ++rank) enter(part, rank);
    for (int64_t m = 0; m < count; ++m) {
      const RowPointers& row = scratch.pointers[m] =
          pointers(part.direction, v.t, part.rows.begin + m);
      for (int k = 0; k < kOrders; ++k) scratch.dslots[m * kOrders + k] = row.by[k].dslots;
    }
    if (by_[0]->dcells.data) add_gradients_of_cells(part, v.t, count);
    if (has_zoneout_) hold(part, scratch, v.t, count);
    if (sizes_.projected) unproject(part, scratch, count);
    if (sizes_.normalised) {
      normalised_cells(part, scratch, v.t, count);
    } else {
      for (int64_t m = 0; m < count; ++m) cell(part.direction, part.units, scratch.pointers[m]);
    }
    part.wait_for_team();
    if (v.leaving > part.rows.begin || wants_first_product()) {
      recurrent_product(part, scratch, count);
    }
    if (has_zoneout_) let_go(part, count);
  }

  // Ends a step. If an episode begins with the step, the gradients that it would pass on belong to
  // the states of a reset, or to nothing. If a row leaves, they are those of its initial states.
  template <typename Part>
  void end_step(const Part& part, const Visit& v) const {
    for (int64_t rank = part.rows.begin; steps_.reset && rank < v.active_end; ++rank) {
      for (int k = 0; k < kOrders && cut(steps_, part.direction, v.t, rank); ++k) {
        end_episode(dreset_h_, dh_, part, rank, k, part.columns);
        for_planes<kPlanes>(part.units, sizes_.H,
                            [&](Range own) { end_episode(dreset_c_, dc_, part, rank, k, own); });
      }
    }
    for (int64_t rank = v.leaving; rank < v.active_end; ++rank) leave(part, rank);
  }

  // A row that takes part in no step.
  template <typename Part>
  void pass_empty_row(const Part& part, int64_t rank) const {
    enter(part, rank);
    leave(part, rank);
  }

  bool wants_dh0() const { return by_[kLast]->dh0.data; }

  const ColumnPanels<T>& recurrent(int direction, int order) const {
    return directions_[direction].by[order].recurrent;
  }
  A* dh(int direction, int64_t rank, int order) const { return dh_.at(direction, rank, order); }

 private:
  using Carried = CarriedRows<A, kOrders>;
  struct Operands {
    Rows<const T> y, slots, cells, candidates, unprojected, normalised, dy;
    Rows<T> dslots, dprojected, dnormalised;
    ColumnPanels<T> recurrent, projection;
  };
  struct Direction {
    Operands by[kOrders];
  };

  Direction direction(int d, Carver& carver) const {
    Direction made = {};
    for (int k = 0; k < kOrders && d < sizes_.D; ++k) made.by[k] = operands(*by_[k], d, carver);
    return made;
  }
  Operands operands(const Backward<T>& b, int d, Carver& carver) const {
    const int64_t H = sizes_.H, S = kStored * H, O = sizes_.O;
    const Weights<T>& w = b.weights[d];
    Operands of = {
        .y = columns(b.y, d * O),
        .slots = saved_rows(steps_, b.slots, d, S),
        .cells = saved_rows(steps_, b.cells, d, kPlanes * H),
        .candidates = saved_rows(steps_, b.candidates, d, kPlanes * H),
        .unprojected = saved_rows(steps_, b.unprojected, d, H),
        .normalised = saved_rows(steps_, b.normalised, d, normalised_width<T>(kShape, H)),
        .dy = columns(b.dy, b.dy_uniform ? 0 : d * O),
        .dslots = saved_rows(steps_, b.dslots, d, S),
        .dprojected = saved_rows(steps_, b.dprojected, d, O),
        .dnormalised = saved_rows(steps_, b.dnormalised, d, normalised_width<T>(kShape, H)),
        .recurrent = {.K = kShape.gates * H,
                      .width = O,
                      .w = w.w_hh,
                      .row_stride = w.w_hh_row,
                      .shape = &kShape,
                      .packs = packs_},
        .projection = {.K = O, .width = H, .w = w.w_hr, .row_stride = w.w_hr_row, .packs = packs_}};
    // Nothing reads what a single step passes on, unless the gradient of its first state is wanted.
    if (w.w_hh && (steps_.T > 1 || wants_first_product())) of.recurrent.take_room(carver);
    if (w.w_hr) of.projection.take_room(carver);
    return of;
  }

  RowPointers pointers(int d, int64_t t, int64_t rank) const {
    RowPointers row = {};
    for (int k = 0; k < kOrders; ++k) {
      const Operands& of = directions_[d].by[k];
      auto& r = row.by[k];
      const auto previous = [&](const Rows<const T>& states, const State<const T>& initial,
                                const State<const T>& reset_to) {
        return previous_state(steps_, d, t, rank, states, initial, zeros_, reset_to);
      };
      r.dh = dh_.at(d, rank, k);
      r.dslots = row_at(steps_, of.dslots, t, rank);
      r.slots = row_or_null(steps_, of.slots, t, rank);
      r.dy = row_or_null(steps_, of.dy, t, rank);
      if constexpr (!kShape.saves_slots) {
        r.h = row_at(steps_, has_zoneout_ ? of.unprojected : of.y, t, rank);
      }
      if constexpr (kShape.reads_h) r.h_prev = previous(of.y, by_[k]->h0, by_[k]->reset_h);
      if constexpr (kShape.cell_state) {
        r.c = row_at(steps_, has_zoneout_ ? of.candidates : of.cells, t, rank);
        r.c_prev = previous(of.cells, by_[k]->c0, by_[k]->reset_c);
        r.dc = dc_.at(d, rank, k);
      }
      if (sizes_.projected) {
        r.dm = dm_.at(d, rank, k);
        r.dprojected = row_at(steps_, of.dprojected, t, rank);
      }
    }
    return row;
  }

  // A row enters with the gradients of its final states.
  template <typename Part>
  void enter(const Part& part, int64_t rank) const {
    const int d = part.direction;
    for (int k = 0; k < kOrders; ++k) {
      const Backward<T>& b = *by_[k];
      copy_or_zero_row(dh_.at(d, rank, k), state_or_null(steps_, b.dhn, d, rank), part.columns);
      for_planes<kPlanes>(part.units, sizes_.H, [&](Range own) {
        copy_or_zero_row(dc_.at(d, rank, k), state_or_null(steps_, b.dcn, d, rank), own);
      });
    }
  }
  template <typename Part>
  void leave(const Part& part, int64_t rank) const {
    const int d = part.direction;
    for (int k = 0; k < kOrders; ++k) {
      const Backward<T>& b = *by_[k];
      copy_row_if_wanted(state_or_null(steps_, b.dh0, d, rank), dh_.at(d, rank, k), part.columns);
      for_planes<kPlanes>(part.units, sizes_.H, [&](Range own) {
        copy_row_if_wanted(state_or_null(steps_, b.dc0, d, rank), dc_.at(d, rank, k), own);
      });
    }
  }

  bool wants_first_product() const { return wants_dh0() || by_[kLast]->dreset_h.data; }

  // f(sum, result, the thread's units or columns) for the states of a reset whose gradients are
  // wanted.
  template <typename Part, typename F>
  void for_resets(const Part& part, F f) const {
    const auto each = [&](const Carried& sums, const State<T>& to, Range own) {
      for (int64_t rank = part.rows.begin; sums.data && rank < part.rows.end; ++rank) {
        f(sums.at(part.direction, rank), state_at(steps_, to, part.direction, rank), own);
      }
    };
    each(dreset_h_, by_[kLast]->dreset_h, part.columns);
    for_planes<kPlanes>(part.units, sizes_.H,
                        [&](Range own) { each(dreset_c_, by_[kLast]->dreset_c, own); });
  }

  // Adds the gradients of a state to the sums of a reset, if these are wanted, and zeroes the
  // gradients.
  template <typename Part>
  static void end_episode(const Carried& sums, const Carried& gradients, const Part& part,
                          int64_t rank, int order, Range own) {
    A* const from = gradients.at(part.direction, rank, order);
    if (sums.data) add_row(sums.at(part.direction, rank, order), from, own);
    zero_row(from, own);
  }
  template <typename Part>
  void add_gradients_of_cells(const Part& part, int64_t t, int64_t count) const {
    const Rows<const T> dcells = columns(by_[0]->dcells, part.direction * sizes_.H);
    for (int64_t rank = part.rows.begin; rank < part.rows.begin + count; ++rank) {
      add_row(dc_.at(part.direction, rank), row_at(steps_, dcells, t, rank), part.units);
    }
  }

  // Splits the gradients of the states after zoneout: holds back the part of the states before, and
  // leaves that of the cell. dy is then part of dh.
  template <typename Part>
  void hold(const Part& part, const Scratch& scratch, int64_t t, int64_t count) const {
    const int d = part.direction;
    const auto split = [&](A* gradient, A* held, const T* dy, Purpose purpose, int64_t rank,
                           Range own) {
      draw_kept(by_[0]->noise, purpose, d, t, batch_row(steps_, rank), own, scratch.kept);
      for (int64_t i = own.begin; i < own.end; i += kLanes<T>) {
        const int64_t n = own.end - i;
        const Vec<T> all = load_up_to(gradient + i, n) + dy_at(dy, i, n);
        const Vec<T> before = all * load_up_to(scratch.kept + i, n);
        store_up_to(held + i, before, n);
        store_up_to(gradient + i, all - before, n);
      }
    };
    for (int64_t m = 0; m < count; ++m) {
      const int64_t rank = part.rows.begin + m;
      auto& row = scratch.pointers[m].by[0];
      split(row.dh, held_h_.at(d, rank), row.dy, Purpose::kHidden, rank, part.columns);
      row.dy = nullptr;
      for_planes<kPlanes>(part.units, sizes_.H, [&](Range own) {
        split(row.dc, held_c_.at(d, rank), nullptr, Purpose::kCell, rank, own);
      });
    }
  }
  template <typename Part>
  void let_go(const Part& part, int64_t count) const {
    for (int64_t rank = part.rows.begin; rank < part.rows.begin + count; ++rank) {
      const int d = part.direction;
      add_row(dh_.at(d, rank), held_h_.at(d, rank), part.columns);
      for_planes<kPlanes>(part.units, sizes_.H,
                          [&](Range own) { add_row(dc_.at(d, rank), held_c_.at(d, rank), own); });
    }
  }

  // dm = (dy + dh) x W_hr. Keeps dy + dh for the gradient of W_hr.
  template <typename Part>
  void unproject(const Part& part, const Scratch& scratch, int64_t count) const {
    const RowPointers* rows = scratch.pointers;
    const auto dprojected = [&](int k) {
      return [rows, k](int64_t m) { return rows[m].by[k].dprojected; };
    };
    const auto dm = [&](int k) { return [rows, k](int64_t m) { return rows[m].by[k].dm; }; };
    const Range own = part.columns;
    for (int64_t i = 0; i < count * kOrders; ++i) {
      const auto& row = rows[i / kOrders].by[i % kOrders];
      for (int64_t j = own.begin; j < own.end; j += kLanes<T>) {
        const Vec<T> sum = load(row.dh + j) + dy_at(row.dy, j, own.end - j);
        store_up_to(row.dprojected + j, sum, own.end - j);
      }
    }
    part.wait_for_team();
    const auto& by = directions_[part.direction].by;
    const auto multiply = [&](int of_w, int of_dy, int of_dm, bool adds) {
      by[of_w].projection.multiply_rows(part.units, count, scratch.projected, dprojected(of_dy),
                                        dm(of_dm), adds);
    };
    multiply(0, 0, 0, false);
    if constexpr (kOrders == 2) {
      multiply(0, 1, 1, false);
      multiply(1, 0, 1, true);
    }
  }

  // At most n elements of a row of dy, from column i on. A null row is zeros.
  Vec<T> dy_at(const T* dy, int64_t i, int64_t n) const {
    if (!dy) return Vec<T>{};
    return by_[0]->dy_uniform ? Vec<T>{} + value(dy[0]) : load_up_to(dy + i, n);
  }

  // A value or a dual number of f(order).
  template <typename F>
  static RNNKERN_INLINE V by_order(F f) {
    if constexpr (kOrders == 1) {
      return f(0);
    } else {
      return {f(0), f(1)};
    }
  }
  static RNNKERN_INLINE Vec<T>& value_of(V& x) {
    if constexpr (kOrders == 1) {
      return x;
    } else {
      return x.value;
    }
  }
  static RNNKERN_INLINE Vec<T> of_order(const V& x, int k) {
    if constexpr (kOrders == 1) {
      return x;
    } else {
      return k == 0 ? x.value : x.tangent;
    }
  }

  // The cells of the thread's units, and the gradients of the sums that were normalised.
  template <typename Part>
  __attribute__((noinline)) void normalised_cells(const Part& part, const Scratch& scratch,
                                                  int64_t t, int64_t count) const {
    if constexpr (kOrders == 1) {
      const int d = part.direction;
      const Gains<const T>& gains = by_[0]->weights[d].gains;
      const auto of_row = [&](int64_t m) {
        const Operands& of = directions_[d].by[0];
        const int64_t rank = part.rows.begin + m;
        return typename NormGradients<T, Cell>::Row{
            .direction = d,
            .rank = rank,
            .saved = row_at(steps_, of.normalised, t, rank),
            .gradients = row_at(steps_, of.dnormalised, t, rank),
            .dslots = scratch.pointers[m].by[0].dslots};
      };
      if constexpr (kShape.normalises_c) {
        for (int64_t m = 0; m < count; ++m) {
          const auto row = of_row(m);
          norms_.publish_c(gains, row, part.units, [&](int64_t u, int64_t n) {
            return output_of(scratch.pointers[m], row, gains, u, n).dc;
          });
        }
        part.wait_for_team();
        for (int64_t m = 0; m < count; ++m) {
          const auto row = of_row(m);
          const auto means = norms_.means(row, Normed::kCell);
          cell(d, part.units, scratch.pointers[m], [&](Step<V>& s, int64_t u, int64_t n) {
            const Vec<T> dc = s.dc;
            const Step<V> output = output_of(scratch.pointers[m], row, gains, u, n);
            for (int i = 0; i < kStored; ++i) s.slot[i] = output.slot[i];
            s.dc =
                means.gradient(output.dc * load_up_to(gains.c + u, n), norms_.normal_c(row, u, n)) +
                dc;
            Cell::backward_state(s);
          });
        }
      } else {
        for (int64_t m = 0; m < count; ++m) cell(d, part.units, scratch.pointers[m]);
      }
      for (int64_t m = 0; m < count; ++m) norms_.publish(gains, of_row(m), part.units);
      part.wait_for_team();
      for (int64_t m = 0; m < count; ++m) {
        const auto row = of_row(m);
        norms_.apply(gains, row, part.units);
        scratch.dslots[m] =
            row.gradients + NormalisedRow<T, Cell>::place(Normed::kRecurrent, sizes_.H);
      }
    }
  }
  // The cell after `backward_output`, for n units from u on: its slots, and dc of the normalised c.
  template <typename Row>
  Step<V> output_of(const RowPointers& row, const Row& norms, const Gains<const T>& gains,
                    int64_t u, int64_t n) const {
    Step<V> s = {};
    for (int i = 0; i < kStored; ++i) {
      s.slot[i] = load_up_to(row.by[0].slots + i * sizes_.H + u, n);
    }
    s.c = read_by_output<T>(gains, norms_.normal_c(norms, u, n), u, n);
    s.dh = dh_of_cell(row, 0, u, n);
    Cell::backward_output(s);
    return s;
  }
  // The gradient of h as the cell computed it, before a projection.
  RNNKERN_INLINE Vec<T> dh_of_cell(const RowPointers& row, int k, int64_t u, int64_t n) const {
    const auto& of = row.by[k];
    return of.dm ? load(of.dm + u) : load(of.dh + u) + dy_at(of.dy, u, n);
  }

  void cell(int direction, Range units, const RowPointers& row) const {
    cell(direction, units, row, [](Step<V>& s, int64_t, int64_t) { Cell::backward(s); });
  }
  // The same with backward(s, u, n) in place of Cell::backward(s).
  template <typename Back>
  RNNKERN_INLINE void cell(int direction, Range units, const RowPointers& row,
                           Back backward) const {
    const int64_t H = sizes_.H;
    const auto& by = row.by;
    for (int64_t u = units.begin; u < units.end; u += kLanes<T>) {
      const int64_t n = H - u;
      Step<V> s;
      if constexpr (kShape.saves_slots) {
#pragma GCC unroll 8
        for (int i = 0; i < kStored; ++i) {
          s.slot[i] = by_order([&](int k) { return load_up_to(by[k].slots + i * H + u, n); });
        }
      } else {
        s.h = by_order([&](int k) { return load_up_to(by[k].h + u, n); });
      }
      load_parameters<kShape>(by_[0]->weights[direction], u, n,
                              [&](int i) -> auto& { return value_of(s.parameter[i]); });
      if constexpr (kOrders == 2) {
        load_parameters<kShape>(by_[kLast]->weights[direction], u, n,
                                [&](int i) -> auto& { return s.parameter[i].tangent; });
      }
      if constexpr (kShape.reads_h) {
        s.h_prev = by_order([&](int k) { return load_up_to(by[k].h_prev + u, n); });
      }
      if constexpr (kShape.cell_state) {
        s.c = by_order([&](int k) { return load_up_to(by[k].c + u, n); });
        s.c_prev = by_order([&](int k) { return load_up_to(by[k].c_prev + u, n); });
        s.dc = by_order([&](int k) { return load(by[k].dc + u); });
      }
      for (int i = 0; i < kShape.more_states; ++i) {
        const int64_t place = (i + 1) * H + u;
        s.more[i] = by_order([&](int k) { return load_up_to(by[k].c + place, n); });
        s.more_prev[i] = by_order([&](int k) { return load_up_to(by[k].c_prev + place, n); });
        s.dmore[i] = by_order([&](int k) { return load_up_to(by[k].dc + place, n); });
      }
      s.dh = by_order([&](int k) { return dh_of_cell(row, k, u, n); });
      backward(s, u, n);
#pragma GCC unroll 8
      for (int i = 0; i < kStored; ++i) {
        store_up_to(by[kLast].dslots + i * H + u, of_order(s.slot[i], kLast), n);
      }
#pragma GCC unroll 2
      for (int k = 0; k < kOrders; ++k) {
        for (int i = 0; i < kShape.more_states; ++i) {  // a plane ends where the next one begins
          store_up_to(by[k].dc + (i + 1) * H + u, of_order(s.dmore[i], k), n);
        }
        if constexpr (kShape.cell_state && kShape.more_states == 0) {
          store(by[k].dc + u, of_order(s.dc, k));
        } else if constexpr (kShape.cell_state) {
          store_up_to(by[k].dc + u, of_order(s.dc, k), n);
        }
        if constexpr (kShape.reads_h) store(by[k].dh + u, of_order(s.dh_direct, k));
      }
    }
  }

  // Adds the product to dh, for the thread's own columns. `cell` has left dh_direct there if the
  // cell reads h, else dh is cleared first. Rows of dh are padded to whole panels.
  template <typename Part>
  void recurrent_product(const Part& part, const Scratch& scratch, int64_t count) const {
    constexpr int64_t kWidth = kPanelWidth<T>;
    const auto* dslots = scratch.dslots.operands(count * kOrders);
    const Carried& to = masks_ ? products_ : dh_;
    for (int64_t p = part.columns.begin / kWidth; p * kWidth < part.columns.end; ++p) {
      A* const acc = to.at(part.direction, part.rows.begin) + p * kWidth;
      for (int64_t m = 0; (!kShape.reads_h || masks_) && m < count * kOrders; ++m) {
        zero_row(acc + m * to.stride, 0, kWidth);
      }
      if constexpr (kShape.recurrent) {
        recurrent(part.direction, 0).add(p, count * kOrders, dslots, acc, to.stride);
      }
    }
    if (masks_) add_masked_products(part, count);
  }
  template <typename Part>
  void add_masked_products(const Part& part, int64_t count) const {
    const int d = part.direction;
    for (int64_t rank = part.rows.begin; rank < part.rows.begin + count; ++rank) {
      A* const dh = dh_.at(d, rank);
      const A *const product = products_.at(d, rank), *const mask = masks_.at(d, rank);
      for (int64_t i = part.columns.begin; i < part.columns.end; ++i) {
        dh[i] = (kShape.reads_h ? dh[i] : A(0)) + product[i] * mask[i];
      }
    }
  }

  const std::array<const Backward<T>*, kOrders> by_;
  const Sizes& sizes_;
  const Steps& steps_;
  const bool packs_, has_zoneout_;
  const T* zeros_;
  Direction directions_[kMaxDirections];
  const DropoutMasks<T> masks_;
  const NormGradients<T, Cell> norms_;
  Carried dh_, dc_, dm_;
  Carried products_;         // dslots x W_hh before the mask
  Carried held_h_, held_c_;  // held back by zoneout
  Carried dreset_h_, dreset_c_;
};

template <typename T, typename Cell>
class BackwardScan : public Pass<BackwardScan<T, Cell>, T> {
  using Base = Pass<BackwardScan, T>;
  using Loop = BackwardLoop<T, Cell, 1>;
  friend Base;

 public:
  static constexpr int kPlanes = Cell::kShape.planes();

  BackwardScan(const Backward<T>& b, const Plan& plan, Carver& carver)
      : Base(b.sizes, b.steps, plan, kPanelWidth<T>, carver),
        loop_({&b}, plan, Base::zeros(), carver),
        gradients_(b, nullptr, plan, Base::zeros(), carver, loop_.masks()) {
    Base::take_scratch(carver);
  }

 private:
  using Scratch = typename Loop::Scratch;
  using Part = rnnkern::RNNKERN_NAMESPACE::Part<Scratch>;

  Scratch scratch(Carver& carver) const { return loop_.scratch(Base::block_rows(), carver); }

  void pack(int thread, int threads) {
    loop_.pack(thread, threads);
    gradients_.pack(thread, threads);
  }

  void run_task(const Part& part) const {
    loop_.begin(part);
    Base::for_steps_back(part, [&](const Visit& v) {
      loop_.step(part, part.scratch, v);
      loop_.end_step(part, v);
    });
    loop_.end(part);
    Base::for_empty_rows(part, [&](int64_t rank) { loop_.pass_empty_row(part, rank); });
  }

  void finish(int thread, int threads) const { gradients_.run(thread, threads); }

  Loop loop_;
  Gradients<T, Cell> gradients_;
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
