// The derivative of forward and backward pass in a direction (SecondOrder of scan.h):
//
//   ascending    a'(t) = W_ih x'(t) + W_ih' x(t) + W_hh' h(t-1) + W_hh h'(t-1) + b'
//                (h, c)'(t) = tangent of the cell
//   descending   (da, dh, dc)'(t) = backward of the cell on dual numbers
//                dh(t-1)  = dh direct + da(t) x W_hh        for values and tangents at once:
//                dh'(t-1) += da(t) x W_hh'                  two rows of one product for each row
//
// with a projection between cell and state as in forward.h and backward.h,
// and after the loops, as products over all rows at once (gradients.h), the tangents of dW, db, dx.
//
// The cell's backward needs dh and dc themselves, which backward has not kept: the values are
// carried along with their tangents. What no tangent of a state enters is known before the loops:
// ascending it is made for block_steps steps at once, descending for all of them. Tasks and teams
// as in forward.h and backward.h. All in all 13 products where forward has 2 and backward 4: of one
// step and row 2 G H times 6 I + 7 O operations.
#pragma once

#include "cells/cells.h"
#include "cpu/gradients.h"
#include "cpu/panels.h"
#include "cpu/rows.h"
#include "cpu/threads.h"
#include "plan.h"
#include "workspace.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

template <typename T, typename Cell>
class SecondOrderScan {
  using D = Dual<Vec<T>>;
  using Panels = UnitPanels<T, Cell>;
  static constexpr CellShape kShape = Cell::kShape;
  static constexpr int64_t kWidth = kPanelWidth<T>;
  static constexpr int64_t kAccWidth = Panels::kAccWidth;
  static_assert(std::is_same_v<T, Compute<T>>, "tangents are not rounded from step to step");

 public:
  // `up` says how the weights of the ascending products are read, `down` all else.
  SecondOrderScan(const SecondOrder<T>& s, const Plan& up, const Plan& down, Carver& carver)
      : s_(s),
        plan_(down),
        block_steps_(up.block_steps),
        block_rows_(ceil_div(s.steps.N, down.row_blocks)),
        h_row_(ceil_div(s.sizes.O, kWidth) * kWidth),
        u_row_(ceil_div(s.sizes.H, kWidth) * kWidth),
        panels_{s.sizes.H},
        projected_(projected_of(s, carver)),
        gradients_(products_of(s, projected_), down, carver) {
    const Sizes& z = s.sizes;
    const int64_t states = z.D * s.steps.N, rows = z.D * s.steps.total;
    barriers_ = carver.take<Barrier>(1 + plan_.threads);
    const bool packs = plan_.recurrent == Reading::kPacked;
    for (int d = 0; d < z.D; ++d) {
      bias_[d] = carver.take<T>(panels_.count() * kAccWidth);
      for (int k : {kValue, kTangent}) {
        const Weights<T>& w = k == kValue ? s.weights[d] : s.tangent_weights[d];
        input_[k][d] = {panels_, w.w_ih, w.w_ih_row, z.I, nullptr};
        recurrent_[k][d] = {panels_, w.w_hh, w.w_hh_row, z.O, nullptr};
        back_[k][d] = {kShape.gates * z.H, z.O, w.w_hh, w.w_hh_row, &kShape, packs, nullptr};
        if (w.w_hr) {
          project_[k][d] = {z.H, z.O, w.w_hr, w.w_hr_row, nullptr, true, nullptr};
          project_[k][d].packed = carver.take<T>(project_[k][d].lanes());
          unproject_[k][d] = {z.O, z.H, w.w_hr, w.w_hr_row, nullptr, packs, nullptr};
          unproject_[k][d].packed = carver.take<T>(unproject_[k][d].lanes());
        }
        if (w.w_ih && up.input == Reading::kPacked) {
          input_[k][d].packed = carver.take<T>(input_[k][d].lanes());
        }
        if (!w.w_hh) continue;
        if (up.recurrent == Reading::kPacked) {
          recurrent_[k][d].packed = carver.take<T>(recurrent_[k][d].lanes());
        }
        back_[k][d].packed = carver.take<T>(back_[k][d].lanes());
        if (k == kTangent) crossing_[d] = carver.take<T>(s.steps.total * z.O);
      }
    }
    dh_ = carver.take<T>(2 * states * h_row_);
    if (z.projected) dm_ = carver.take<T>(2 * states * u_row_);
    if (kShape.cell_state) {
      dc_ = carver.take<T>(2 * states * u_row_);
      tangent_cells_ = carver.take<T>(rows * z.H);
    }
    Carver count(nullptr);
    scratch(count);
    scratch_bytes_ = int64_t(count.used());
    scratch_ = carver.take<char>(plan_.threads * scratch_bytes_);
  }

  void run() {
    gradients_.prepare();
    for (int i = 0; i <= plan_.threads; ++i) barriers_[i] = Barrier();
    parallel(plan_.threads, [this](int thread, int threads) {
      Barrier& everyone = barriers_[plan_.threads];
      pack(thread, threads);
      gradients_.pack(thread, threads);
      everyone.wait(threads);
      const int members = threads < plan_.threads ? 1 : plan_.unit_blocks;
      const int teams = threads / members, team = thread / members;
      for (int task = team; team < teams && task < s_.sizes.D * plan_.row_blocks; task += teams) {
        scan(task, thread % members, members, barriers_[team], scratch_of(thread));
      }
      everyone.wait(threads);
      gradients_.run(thread, threads);
    });
  }

 private:
  enum Of { kValue, kTangent };
  // Where one row of one step stands.
  struct RowPointers {
    const T *slots, *h, *h_prev, *c, *c_prev;
    const T *tangent_sums, *tangent_h_prev, *tangent_c_prev;
    const T *dslots, *dy, *tangent_dy, *crossing;
    T *tangent_slots, *tangent_h, *tangent_c;
    T *dh, *dc, *dm;  // of the value, with that of the tangent behind
  };
  struct Scratch {
    T* acc;                         // [panels][capacity][kAccWidth]
    const T **x, **tangent_x, **h;  // [capacity]
    const T** left;                 // [2 * block_rows_]
    RowPointers* pointers;          // [block_rows_]
  };
  // One thread's part of one task.
  struct Part {
    int direction;
    Range rows;
    Range units;    // of H: the cell
    Range columns;  // of O
    int members;
    Barrier& barrier;
    const Scratch& scratch;
    Rows<const T> y, slots, cells, dslots, dy, tangent_sums, tangent_dy;
    Rows<T> tangent_y, tangent_slots, tangent_cells, crossing;
    Rows<const T> unprojected;
    Rows<T> tangent_unprojected, dprojected, tangent_dprojected;
  };
  // Of all steps, where there is a projection: tangents before it, and gradients behind it.
  struct Projected {
    T *tangent_h = nullptr, *dh = nullptr, *tangent_dh = nullptr;
  };

  static Projected projected_of(const SecondOrder<T>& s, Carver& carver) {
    const Sizes& z = s.sizes;
    if (!z.projected) return {};
    const int64_t rows = z.D * s.steps.total;
    return {carver.take<T>(rows * z.H), carver.take<T>(rows * z.O), carver.take<T>(rows * z.O)};
  }

  static GradientProducts<T> products_of(const SecondOrder<T>& s, const Projected& projected) {
    const GradientTerm<T> by_tangents = {s.tangent_dslots,     s.x,          s.y, s.h0, s.weights,
                                         projected.tangent_dh, s.unprojected};
    const GradientTerm<T> by_values = {s.dslots,           s.tangent_x,       constant(s.tangent_y),
                                       s.tangent_h0,       s.tangent_weights, projected.dh,
                                       projected.tangent_h};
    return {s.sizes, s.steps, 2, {by_tangents, by_values}, s.tangent_dx, s.tangent_gradients,
            false};
  }

  static Rows<const T> constant(const Rows<T>& rows) { return {rows.data, rows.step, rows.row}; }

  Scratch scratch(Carver& carver) const {
    const int64_t capacity = block_steps_ * block_rows_;
    return {carver.take<T>(panels_.count() * capacity * kAccWidth),
            carver.take<const T*>(capacity),
            carver.take<const T*>(capacity),
            carver.take<const T*>(capacity),
            carver.take<const T*>(2 * block_rows_),
            carver.take<RowPointers>(block_rows_)};
  }
  Scratch scratch_of(int thread) const {
    Carver carver(scratch_ + thread * scratch_bytes_);
    return scratch(carver);
  }

  void pack(int thread, int threads) const {
    for (int d = 0; d < s_.sizes.D; ++d) {
      for (int64_t p = thread; p < panels_.count(); p += threads) {
        panels_.pack_bias(p, s_.tangent_weights[d], bias_[d] + p * kAccWidth);
        for (int k : {kValue, kTangent}) {
          if (input_[k][d].packed) input_[k][d].pack(p);
          if (recurrent_[k][d].packed) recurrent_[k][d].pack(p);
        }
      }
      for (int k : {kValue, kTangent}) {
        const auto each = [&](const ColumnPanels<T>& w, auto pack) {
          for (int64_t p = thread; w.w && p < w.count(); p += threads) pack(w, p);
        };
        each(back_[k][d], [](const ColumnPanels<T>& w, int64_t p) { w.pack(p); });
        each(unproject_[k][d], [](const ColumnPanels<T>& w, int64_t p) { w.pack(p); });
        each(project_[k][d], [](const ColumnPanels<T>& w, int64_t p) { w.pack_transpose(p); });
      }
    }
  }

  void scan(int task, int member, int members, Barrier& barrier, const Scratch& scratch) const {
    const Sizes& z = s_.sizes;
    const Steps& s = s_.steps;
    const int d = task % z.D;
    const int64_t S = kShape.slots * z.H;
    const Part part = {d,
                       split(s.N, plan_.row_blocks, task / z.D),
                       split(z.H, members, member, kWidth),
                       split(z.O, members, member, kWidth),
                       members,
                       barrier,
                       scratch,
                       columns(s_.y, d * z.O),
                       saved_rows(s, s_.slots, d, S),
                       saved_rows(s, s_.cells, d, z.H),
                       saved_rows(s, s_.dslots, d, S),
                       columns(s_.dy, d * z.O),
                       saved_rows(s, s_.tangent_sums, d, S),
                       columns(s_.tangent_dy, d * z.O),
                       columns(s_.tangent_y, d * z.O),
                       saved_rows(s, s_.tangent_dslots, d, S),
                       saved_rows(s, tangent_cells_, d, z.H),
                       {crossing_[d], s.N * z.O, z.O},
                       saved_rows(s, s_.unprojected, d, z.H),
                       saved_rows(s, projected_.tangent_h, d, z.H),
                       saved_rows(s, projected_.dh, d, z.O),
                       saved_rows(s, projected_.tangent_dh, d, z.O)};
    ascend(part);
    cross(part);
    for (int64_t i = 0; i < s.T; ++i) {
      descend(part, visit(s, d == 1, i, part.rows.begin, part.rows.end));
    }
    const int64_t idle = s.T ? max_of(part.rows.begin, active_rows(s, 0)) : part.rows.begin;
    for (int64_t slot = idle; slot < part.rows.end; ++slot) {
      begin(state_at(s, s_.tangent_hn, d, slot), s_.tangent_h0, d, slot, part.columns);
      if (kShape.cell_state) {
        begin(state_at(s, s_.tangent_cn, d, slot), s_.tangent_c0, d, slot, part.units);
      }
      enter_row(part, slot);
      leave_row(part, slot);
    }
  }

  RowPointers pointers(const Part& part, int64_t t, int64_t slot) const {
    const Steps& s = s_.steps;
    const int d = part.direction;
    const auto row = [&](const auto& rows) {
      return rows.data ? row_at(s, rows, t, slot) : nullptr;
    };
    const auto before = [&](const Rows<const T>& rows, const State<const T>& initial) {
      return previous_state(s, d, t, slot, rows, initial, gradients_.zeros());
    };
    RowPointers r = {};
    r.slots = row(part.slots);
    r.dslots = row(part.dslots);
    r.dy = row(part.dy);
    r.tangent_sums = row(part.tangent_sums);
    r.tangent_dy = row(part.tangent_dy);
    r.tangent_slots = row(part.tangent_slots);
    r.crossing = row(part.crossing);
    r.h = row(part.y);
    r.tangent_h = row(s_.sizes.projected ? part.tangent_unprojected : part.tangent_y);
    r.h_prev = before(part.y, s_.h0);
    r.tangent_h_prev = before(constant(part.tangent_y), s_.tangent_h0);
    r.dh = dh_row(d, slot);
    if constexpr (kShape.cell_state) {
      r.c = row(part.cells);
      r.tangent_c = row(part.tangent_cells);
      r.c_prev = before(part.cells, s_.c0);
      r.tangent_c_prev = before(constant(part.tangent_cells), s_.tangent_c0);
      r.dc = dc_row(d, slot);
    }
    if (s_.sizes.projected) r.dm = dm_ + 2 * (d * s.N + slot) * u_row_;
    return r;
  }

  // Ascending

  void ascend(const Part& part) const {
    const Steps& s = s_.steps;
    for (int64_t i = 0; i < s.T; i += block_steps_) {
      const int64_t end = min_of(i + block_steps_, s.T);
      add_known_products(part, gather(part, i, end));
      int64_t first = 0;
      for (int64_t j = i; j < end; ++j) {
        const Visit v = visit(s, part.direction == 0, j, part.rows.begin, part.rows.end);
        ascend(part, v, first);
        first += v.active_end - part.rows.begin;
      }
    }
  }

  // The rows of the steps [begin, end), one step after the other; returns their number.
  int64_t gather(const Part& part, int64_t begin, int64_t end) const {
    const Steps& s = s_.steps;
    const int d = part.direction;
    int64_t count = 0;
    for (int64_t j = begin; j < end; ++j) {
      const Visit v = visit(s, d == 0, j, part.rows.begin, part.rows.end);
      for (int64_t slot = part.rows.begin; slot < v.active_end; ++slot, ++count) {
        part.scratch.x[count] = row_at(s, s_.x, v.t, slot);
        if (s_.tangent_x.data) part.scratch.tangent_x[count] = row_at(s, s_.tangent_x, v.t, slot);
        part.scratch.h[count] = previous_state(s, d, v.t, slot, part.y, s_.h0, gradients_.zeros());
      }
    }
    return count;
  }

  void add_known_products(const Part& part, int64_t count) const {
    const int d = part.direction;
    for_panels(part, [&](int64_t p, T* acc) {
      for (int64_t m = 0; m < count; ++m) {
        copy_row(acc + m * kAccWidth, bias_[d] + p * kAccWidth, 0, kAccWidth);
      }
      const auto add = [&](const auto& weights, const T* const* rows) {
        if (weights.w) weights.add(p, count, rows, acc, kAccWidth);
      };
      if (s_.tangent_x.data) add(input_[kValue][d], part.scratch.tangent_x);
      add(input_[kTangent][d], part.scratch.x);
      add(recurrent_[kTangent][d], part.scratch.h);
    });
  }

  // f(panel, its accumulators) for those of the member's units.
  template <typename F>
  void for_panels(const Part& part, F f) const {
    const int64_t lanes = block_steps_ * block_rows_ * kAccWidth;
    for (int64_t p = part.units.begin / Panels::kUnits; panels_.first_unit(p) < part.units.end;
         ++p) {
      f(p, part.scratch.acc + p * lanes);
    }
  }

  // One step; first: of its rows among those gathered.
  void ascend(const Part& part, const Visit& v, int64_t first) const {
    const Steps& s = s_.steps;
    const int d = part.direction;
    const int64_t count = v.active_end - part.rows.begin;
    for (int64_t k = 0; k < count; ++k) {
      part.scratch.pointers[k] = pointers(part, v.t, part.rows.begin + k);
      part.scratch.left[k] = part.scratch.pointers[k].tangent_h_prev;
    }
    for_panels(part, [&](int64_t p, T* acc) {
      acc += first * kAccWidth;
      recurrent_[kValue][d].add(p, count, part.scratch.left, acc, kAccWidth);
      for (int64_t k = 0; k < count; ++k) tangent(p, part.scratch.pointers[k], acc + k * kAccWidth);
    });
    if (s_.sizes.projected) project(part, v, count);
    for (int64_t slot = v.active_end; s.active && !s.start && slot < part.rows.end; ++slot) {
      zero_row(row_at(s, part.tangent_y, v.t, slot), part.columns.begin, part.columns.end);
    }
    for (int64_t slot = v.leaving; slot < v.active_end; ++slot) {
      const auto finish = [&](const State<T>& to, const Rows<T>& from, Range own) {
        copy_row(state_at(s, to, d, slot), row_at(s, from, v.t, slot), own.begin, own.end);
      };
      finish(s_.tangent_hn, part.tangent_y, part.columns);
      if (kShape.cell_state) finish(s_.tangent_cn, part.tangent_cells, part.units);
    }
    part.barrier.wait(part.members);
  }

  // y' = W_hr m' + W_hr' m, once the whole team has written m'.
  void project(const Part& part, const Visit& v, int64_t count) const {
    part.barrier.wait(part.members);
    for_groups(count, [&](int64_t first, int64_t rows) {
      const T *values[kGroupRows], *tangents[kGroupRows];
      T* to[kGroupRows];
      for (int64_t k = 0; k < rows; ++k) {
        const int64_t slot = part.rows.begin + first + k;
        values[k] = row_at(s_.steps, part.unprojected, v.t, slot);
        tangents[k] = row_at(s_.steps, part.tangent_unprojected, v.t, slot);
        to[k] = row_at(s_.steps, part.tangent_y, v.t, slot);
      }
      multiply(project_[kValue][part.direction], part.columns, rows, tangents, to, false);
      multiply(project_[kTangent][part.direction], part.columns, rows, values, to, true);
    });
  }

  // f(first, rows) for groups of at most kGroupRows.
  template <typename F>
  static void for_groups(int64_t count, F f) {
    for (int64_t first = 0; first < count; first += kGroupRows) {
      f(first, min_of(kGroupRows, count - first));
    }
  }

  // The columns `own` of to = or += left x w; nothing where w is zeros.
  static void multiply(const ColumnPanels<T>& w, Range own, int64_t rows, const T* const* left,
                       T* const* to, bool adds) {
    T* out[kGroupRows];
    for (int64_t p = own.begin / kWidth; w.w && p * kWidth < own.end; ++p) {
      for (int64_t k = 0; k < rows; ++k) out[k] = to[k] + p * kWidth;
      w.multiply(p, rows, left, out, adds);
    }
  }

  // What both ways know of a step: values, and tangents of the states that enter it.
  Step<D> load_step(const RowPointers& row, int64_t u) const {
    const int64_t H = s_.sizes.H, n = H - u;
    Step<D> s;
    if constexpr (kShape.saves_slots) {
#pragma GCC unroll 8
      for (int k = 0; k < kShape.slots; ++k) s.slot[k].value = load_up_to(row.slots + k * H + u, n);
    } else {
      s.h.value = load_up_to(row.h + u, n);
    }
    if constexpr (kShape.reads_h) {
      s.h_prev = {load_up_to(row.h_prev + u, n), load_up_to(row.tangent_h_prev + u, n)};
    }
    if constexpr (kShape.cell_state) {
      s.c_prev = {load_up_to(row.c_prev + u, n), load_up_to(row.tangent_c_prev + u, n)};
    }
    return s;
  }

  void store_slots(const RowPointers& row, int64_t u, const Step<D>& s) const {
    const int64_t H = s_.sizes.H;
#pragma GCC unroll 8
    for (int k = 0; k < kShape.slots; ++k) {
      store_up_to(row.tangent_slots + k * H + u, s.slot[k].tangent, H - u);
    }
  }

  // On the units of a panel of one row.
  void tangent(int64_t p, const RowPointers& row, const T* acc) const {
    const int64_t H = s_.sizes.H, width = panels_.width(p);
    for (int64_t v = 0; v < width; v += kLanes<T>) {
      const int64_t u = panels_.first_unit(p) + v, n = H - u;
      Step<D> s = load_step(row, u);
#pragma GCC unroll 8
      for (int k = 0; k < kShape.slots; ++k) {
        s.slot[k].tangent = load(acc + Panels::slot_at(k, width) + v);
        if (row.tangent_sums) s.slot[k].tangent += load_up_to(row.tangent_sums + k * H + u, n);
      }
      Cell::tangent(s);
      if constexpr (kShape.saves_slots) store_slots(row, u, s);
      store_up_to(row.tangent_h + u, s.h.tangent, n);
      if constexpr (kShape.cell_state) store_up_to(row.tangent_c + u, s.c.tangent, n);
    }
  }

  // Descending

  // crossing = da x W_hh', of all steps, for the member's own columns.
  void cross(const Part& part) const {
    const ColumnPanels<T>& w = back_[kTangent][part.direction];
    const T* left[kGroupRows];
    T* to[kGroupRows];
    int64_t count = 0;
    const auto make = [&] {
      multiply(w, part.columns, count, left, to, false);
      count = 0;
    };
    for (int64_t t = 0; w.w && t < s_.steps.T; ++t) {
      const int64_t end = min_of(part.rows.end, active_rows(s_.steps, t));
      for (int64_t slot = part.rows.begin; slot < end; ++slot) {
        if (is_last(part, t, slot)) continue;
        left[count] = row_at(s_.steps, part.dslots, t, slot);
        to[count] = row_at(s_.steps, part.crossing, t, slot);
        if (++count == kGroupRows) make();
      }
    }
    make();
  }

  // Nobody wants what this step of the row hands on.
  bool is_last(const Part& part, int64_t t, int64_t slot) const {
    return !s_.tangent_dh0.data && enters(s_.steps, part.direction, t, slot);
  }

  T* dh_row(int d, int64_t slot) const { return dh_ + 2 * (d * s_.steps.N + slot) * h_row_; }
  T* dc_row(int d, int64_t slot) const { return dc_ + 2 * (d * s_.steps.N + slot) * u_row_; }

  void descend(const Part& part, const Visit& v) const {
    const Steps& s = s_.steps;
    const int d = part.direction;
    const int64_t count = v.active_end - part.rows.begin;
    for (int64_t slot = v.entering; slot < v.active_end; ++slot) enter_row(part, slot);
    for (int64_t k = 0; k < count; ++k) {
      RowPointers& row = part.scratch.pointers[k];
      row = pointers(part, v.t, part.rows.begin + k);
      part.scratch.left[2 * k] = row.dslots;
      part.scratch.left[2 * k + 1] = row.tangent_slots;
    }
    if (s_.sizes.projected) unproject(part, v, count);
    for (int64_t k = 0; k < count; ++k) cell(part, part.scratch.pointers[k]);
    part.barrier.wait(part.members);
    const bool wanted = v.leaving > part.rows.begin || s_.tangent_dh0.data;
    for (int64_t p = part.columns.begin / kWidth; wanted && p * kWidth < part.columns.end; ++p) {
      T* dh = dh_row(d, part.rows.begin) + p * kWidth;
      for (int64_t k = 0; !kShape.reads_h && k < 2 * count; ++k)
        zero_row(dh + k * h_row_, 0, kWidth);
      back_[kValue][d].add(p, 2 * count, part.scratch.left, dh, h_row_);
    }
    for (int64_t k = 0; crossing_[d] && k < count; ++k) {
      if (is_last(part, v.t, part.rows.begin + k)) continue;
      const RowPointers& row = part.scratch.pointers[k];
      for (int64_t i = part.columns.begin; i < part.columns.end; ++i) {
        row.dh[h_row_ + i] += row.crossing[i];
      }
    }
    for (int64_t slot = part.rows.begin; s.reset && slot < v.active_end; ++slot) {
      if (cut(s, d, v.t, slot)) zero_carry(part, slot);
    }
    for (int64_t slot = v.leaving; slot < v.active_end; ++slot) leave_row(part, slot);
  }

  // dm = (dy + dh) x W_hr, and its tangent; dy + dh is kept for the gradient of W_hr.
  void unproject(const Part& part, const Visit& v, int64_t count) const {
    const int d = part.direction;
    const auto sum = [&](T* to, const T* dh, const T* dy) {
      for (int64_t i = part.columns.begin; i < part.columns.end; ++i) {
        to[i] = dy ? dh[i] + dy[i] : dh[i];
      }
    };
    for (int64_t k = 0; k < count; ++k) {
      const RowPointers& row = part.scratch.pointers[k];
      const int64_t slot = part.rows.begin + k;
      sum(row_at(s_.steps, part.dprojected, v.t, slot), row.dh, row.dy);
      sum(row_at(s_.steps, part.tangent_dprojected, v.t, slot), row.dh + h_row_, row.tangent_dy);
    }
    part.barrier.wait(part.members);
    for_groups(count, [&](int64_t first, int64_t rows) {
      const T *values[kGroupRows], *tangents[kGroupRows];
      T *to[kGroupRows], *tangent_to[kGroupRows];
      for (int64_t k = 0; k < rows; ++k) {
        const int64_t slot = part.rows.begin + first + k;
        values[k] = row_at(s_.steps, part.dprojected, v.t, slot);
        tangents[k] = row_at(s_.steps, part.tangent_dprojected, v.t, slot);
        to[k] = part.scratch.pointers[first + k].dm;
        tangent_to[k] = to[k] + u_row_;
      }
      multiply(unproject_[kValue][d], part.units, rows, values, to, false);
      multiply(unproject_[kValue][d], part.units, rows, tangents, tangent_to, false);
      multiply(unproject_[kTangent][d], part.units, rows, values, tangent_to, true);
    });
  }

  void cell(const Part& part, const RowPointers& row) const {
    const int64_t H = s_.sizes.H;
    const auto incoming = [&](const T* dy, int64_t u) {
      return dy ? load_up_to(dy + u, H - u) : Vec<T>{};
    };
    for (int64_t u = part.units.begin; u < part.units.end; u += kLanes<T>) {
      const int64_t n = H - u;
      Step<D> s = load_step(row, u);
      if constexpr (kShape.saves_slots) {
#pragma GCC unroll 8
        for (int k = 0; k < kShape.slots; ++k) {
          s.slot[k].tangent = load_up_to(row.tangent_slots + k * H + u, n);
        }
      } else {
        s.h.tangent = load_up_to(row.tangent_h + u, n);
      }
      if (row.dm) {
        s.dh = {load(row.dm + u), load(row.dm + u_row_ + u)};
      } else {
        s.dh = {load(row.dh + u) + incoming(row.dy, u),
                load(row.dh + h_row_ + u) + incoming(row.tangent_dy, u)};
      }
      if constexpr (kShape.cell_state) {
        s.c = {load_up_to(row.c + u, n), load_up_to(row.tangent_c + u, n)};
        s.dc = {load(row.dc + u), load(row.dc + u_row_ + u)};
      }
      Cell::backward(s);
      store_slots(row, u, s);
      if constexpr (kShape.cell_state) {
        store(row.dc + u, s.dc.value);
        store(row.dc + u_row_ + u, s.dc.tangent);
      }
      if constexpr (kShape.reads_h) {
        store(row.dh + u, s.dh_direct.value);
        store(row.dh + h_row_ + u, s.dh_direct.tangent);
      }
    }
  }

  void begin(T* to, const State<const T>& from, int d, int64_t slot, Range own) const {
    if (from.data) {
      copy_row(to, state_at(s_.steps, from, d, slot), own.begin, own.end);
    } else {
      zero_row(to, own.begin, own.end);
    }
  }

  // The gradients a row starts from at its last step: those of its final states.
  void enter_row(const Part& part, int64_t slot) const {
    const int d = part.direction;
    begin(dh_row(d, slot), s_.dhn, d, slot, part.columns);
    begin(dh_row(d, slot) + h_row_, s_.tangent_dhn, d, slot, part.columns);
    if constexpr (kShape.cell_state) {
      begin(dc_row(d, slot), s_.dcn, d, slot, part.units);
      begin(dc_row(d, slot) + u_row_, s_.tangent_dcn, d, slot, part.units);
    }
  }

  void zero_carry(const Part& part, int64_t slot) const {
    const auto zero = [&](T* row, int64_t of_value, Range own) {
      zero_row(row, own.begin, own.end);
      zero_row(row + of_value, own.begin, own.end);
    };
    zero(dh_row(part.direction, slot), h_row_, part.columns);
    if (kShape.cell_state) zero(dc_row(part.direction, slot), u_row_, part.units);
  }

  void leave_row(const Part& part, int64_t slot) const {
    const int d = part.direction;
    const auto leave = [&](const State<T>& to, const T* from, Range own) {
      if (to.data) copy_row(state_at(s_.steps, to, d, slot), from, own.begin, own.end);
    };
    leave(s_.tangent_dh0, dh_row(d, slot) + h_row_, part.columns);
    if (kShape.cell_state) leave(s_.tangent_dc0, dc_row(d, slot) + u_row_, part.units);
  }

  const SecondOrder<T>& s_;
  const Plan& plan_;
  int64_t block_steps_, block_rows_, h_row_, u_row_;
  Panels panels_;
  Projected projected_;
  Gradients<T, Cell> gradients_;
  Barrier* barriers_;
  T* bias_[kMaxDirections];
  StepWeights<T, Cell, Role::kInput> input_[2][kMaxDirections];          // by Of
  StepWeights<T, Cell, Role::kRecurrent> recurrent_[2][kMaxDirections];  // likewise
  ColumnPanels<T> project_[2][kMaxDirections] = {};                      // W_hr
  ColumnPanels<T> back_[2][kMaxDirections];                              // W_hh, descending
  ColumnPanels<T> unproject_[2][kMaxDirections] = {};                    // W_hr, descending
  T* crossing_[kMaxDirections] = {};                                     // [total, O]
  T *dh_, *dc_ = nullptr, *dm_ = nullptr;  // [D, N, 2, h_row_ or u_row_]
  T* tangent_cells_ = nullptr;             // [D, total, H]
  char* scratch_;
  int64_t scratch_bytes_;
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
