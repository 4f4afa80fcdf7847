// Backward pass of one layer, in reverse scan order:
//
//   dh(t) = dy(t) + dh
//   dslots(t), dc, dh' = cell_backward(slots(t), c(t), c(t-1), h(t-1), dh(t), dc)
//   dh = dh' + dslots(t) x W_hh
//
// and after the loop, as products over all rows at once (gradients.h): dW_ih, dW_hh, dW_hr, biases
// and dx.
//
// Only dslots x W_hh is inside the loop. W_hh [G*H, O] is read by its rows k, contiguous along the
// result, so packing is a copy and not a transposition. Tasks and teams as in forward.h: a member
// owns the same units in dslots and in dh, and the barrier stands between writing dslots(t) and
// reading it whole. The gradients of a step overwrite the saved slots where the caller passes the
// same memory for both.
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
class BackwardScan {
  using A = Compute<T>;
  using E = Operand<T>;
  static constexpr CellShape kShape = Cell::kShape;
  static constexpr int64_t kWidth = kPanelWidth<T>;

 public:
  BackwardScan(const Backward<T>& b, const Plan& plan, Carver& carver)
      : b_(b), plan_(plan), gradients_(products_of(b), plan, carver) {
    const Sizes& z = b.sizes;
    block_rows_ = ceil_div(b.steps.N, plan.row_blocks);
    barriers_ = carver.take<Barrier>(1 + plan.threads);
    for (int d = 0; d < z.D; ++d) {
      const Weights<T>& w = b.weights[d];
      const bool packs = plan.recurrent == Reading::kPacked;
      recurrent_[d] = {kShape.gates * z.H, z.O, w.w_hh, w.w_hh_row, &kShape, packs, nullptr};
      projection_[d] = {z.O, z.H, w.w_hr, w.w_hr_row, nullptr, packs, nullptr};
      if (reads_recurrent()) recurrent_[d].packed = carver.take<A>(recurrent_[d].lanes());
      if (z.projected) projection_[d].packed = carver.take<A>(projection_[d].lanes());
    }
    h_row_ = ceil_div(z.O, kWidth) * kWidth;
    u_row_ = ceil_div(z.H, kWidth) * kWidth;
    dh_ = carver.take<A>(z.D * b.steps.N * h_row_);
    if (kShape.cell_state) dc_ = carver.take<A>(z.D * b.steps.N * u_row_);
    if (z.projected) dm_ = carver.take<A>(z.D * b.steps.N * u_row_);
    Carver count(nullptr);
    scratch(count);
    scratch_bytes_ = int64_t(count.used());
    scratch_ = carver.take<char>(plan.threads * scratch_bytes_);
  }

  void run() {
    gradients_.prepare();
    for (int i = 0; i <= plan_.threads; ++i) barriers_[i] = Barrier();
    parallel(plan_.threads, [this](int thread, int threads) {
      Barrier& everyone = barriers_[plan_.threads];
      pack(thread, threads);
      gradients_.pack(thread, threads);
      everyone.wait(threads);
      const int unit_blocks = threads < plan_.threads ? 1 : plan_.unit_blocks;
      const int teams = threads / unit_blocks, team = thread / unit_blocks;
      for (int task = team; team < teams && task < b_.sizes.D * plan_.row_blocks; task += teams) {
        scan(task, thread % unit_blocks, unit_blocks, barriers_[team], scratch_of(thread));
      }
      everyone.wait(threads);
      gradients_.run(thread, threads);
    });
  }

 private:
  static GradientProducts<T> products_of(const Backward<T>& b) {
    const GradientTerm<T> term = {b.dslots, b.x, b.y, b.h0, b.weights, b.dprojected, b.unprojected};
    return {b.sizes, b.steps, 1, {term}, b.dx, b.gradients, b.adds};
  }

  struct RowPointers {
    const T *h_prev, *c_prev, *h, *c, *slots, *dy;
    T* dslots;
    A *dh, *dc, *dm;
  };
  struct Scratch {
    LeftRows<T> dslots;     // [block_rows_][G*H]
    LeftRows<T> projected;  // [kGroupRows][O]
    RowPointers* pointers;  // [block_rows_]
  };
  struct Part {
    int direction;
    int64_t row_begin, row_end;
    Range units;          // of H: the cell
    Range columns_of_dh;  // of O: the product
    int members;
    Barrier& barrier;
    const Scratch& scratch;
    Rows<const T> y, slots, cells, dy;
    Rows<T> dslots, dprojected;
  };

  Scratch scratch(Carver& carver) const {
    const Sizes& z = b_.sizes;
    return {LeftRows<T>(block_rows_, kShape.gates * z.H, carver),
            LeftRows<T>(z.projected ? kGroupRows : 0, z.O, carver),
            carver.take<RowPointers>(block_rows_)};
  }
  Scratch scratch_of(int thread) const {
    Carver carver(scratch_ + thread * scratch_bytes_);
    return scratch(carver);
  }

  // Nobody asks what a single step passes on.
  bool reads_recurrent() const { return b_.steps.T > 1 || b_.dh0.data; }

  void pack(int thread, int threads) {
    for (int d = 0; d < b_.sizes.D; ++d) {
      for (int64_t p = thread; reads_recurrent() && p < recurrent_[d].count(); p += threads) {
        recurrent_[d].pack(p);
      }
      if (!b_.sizes.projected) continue;
      for (int64_t p = thread; p < projection_[d].count(); p += threads) projection_[d].pack(p);
    }
  }

  void scan(int task, int member, int members, Barrier& barrier, const Scratch& scratch) {
    const Sizes& z = b_.sizes;
    const Steps& s = b_.steps;
    const int d = task % z.D;
    const Range rows = split(s.N, plan_.row_blocks, task / z.D);
    const Part part = {d,
                       rows.begin,
                       rows.end,
                       split(z.H, members, member, kWidth),
                       split(z.O, members, member, kWidth),
                       members,
                       barrier,
                       scratch,
                       columns(b_.y, d * z.O),
                       saved_rows(s, b_.slots, d, kShape.slots * z.H),
                       saved_rows(s, b_.cells, d, z.H),
                       columns(b_.dy, b_.dy_uniform ? 0 : d * z.O),
                       saved_rows(s, b_.dslots, d, kShape.slots * z.H),
                       saved_rows(s, b_.dprojected, d, z.O)};
    for (int64_t i = 0; i < s.T; ++i) step(part, visit(s, d == 1, i, part.row_begin, part.row_end));
    finish_idle_rows(part);
  }

  void step(const Part& part, const Visit& v) const {
    const int64_t count = v.active_end - part.row_begin;
    for (int64_t slot = v.entering; slot < v.active_end; ++slot) enter_row(part, slot);
    for (int64_t k = 0; k < count; ++k) {
      part.scratch.pointers[k] = pointers(part, v.t, part.row_begin + k);
      part.scratch.dslots[k] = part.scratch.pointers[k].dslots;
    }
    if (b_.sizes.projected) unproject(part, v, count);
    for (int64_t k = 0; k < count; ++k) cell(part, part.scratch.pointers[k]);
    part.barrier.wait(part.members);
    const bool wanted = v.leaving > part.row_begin || b_.dh0.data;
    if (wanted) recurrent_product(part, count);
    for (int64_t slot = part.row_begin; b_.steps.reset && slot < v.active_end; ++slot) {
      if (cut(b_.steps, part.direction, v.t, slot)) zero_carry(part, slot);
    }
    for (int64_t slot = v.leaving; slot < v.active_end; ++slot) leave_row(part, slot);
  }

  A* dh_row(int d, int64_t slot) const { return dh_ + (d * b_.steps.N + slot) * h_row_; }
  A* dc_row(int d, int64_t slot) const { return dc_ + (d * b_.steps.N + slot) * u_row_; }

  RowPointers pointers(const Part& part, int64_t t, int64_t slot) const {
    const Steps& s = b_.steps;
    const int d = part.direction;
    RowPointers r = {};
    r.dh = dh_row(d, slot);
    r.dslots = row_at(s, part.dslots, t, slot);
    r.slots = part.slots.data ? row_at(s, part.slots, t, slot) : nullptr;
    r.dy = part.dy.data ? row_at(s, part.dy, t, slot) : nullptr;
    if constexpr (!kShape.saves_slots) r.h = row_at(s, part.y, t, slot);
    if constexpr (kShape.reads_h)
      r.h_prev = previous_state(s, d, t, slot, part.y, b_.h0, gradients_.zeros());
    if constexpr (kShape.cell_state) {
      r.c = row_at(s, part.cells, t, slot);
      r.c_prev = previous_state(s, d, t, slot, part.cells, b_.c0, gradients_.zeros());
      r.dc = dc_row(d, slot);
    }
    if (b_.sizes.projected) r.dm = dm_ + (d * s.N + slot) * u_row_;
    return r;
  }

  // The gradients a row starts from at its last step: those of its final states.
  void enter_row(const Part& part, int64_t slot) const {
    const Steps& s = b_.steps;
    const auto begin = [&](A* to, const State<const T>& from, Range r) {
      if (from.data) {
        copy_row(to, state_at(s, from, part.direction, slot), r.begin, r.end);
      } else {
        zero_row(to, r.begin, r.end);
      }
    };
    begin(dh_row(part.direction, slot), b_.dhn, part.columns_of_dh);
    if (kShape.cell_state) begin(dc_row(part.direction, slot), b_.dcn, part.units);
  }

  void zero_carry(const Part& part, int64_t slot) const {
    zero_row(dh_row(part.direction, slot), part.columns_of_dh.begin, part.columns_of_dh.end);
    if (kShape.cell_state) zero_row(dc_row(part.direction, slot), part.units.begin, part.units.end);
  }

  void leave_row(const Part& part, int64_t slot) const {
    const Steps& s = b_.steps;
    const int d = part.direction;
    const Range h = part.columns_of_dh, c = part.units;
    if (b_.dh0.data) copy_row(state_at(s, b_.dh0, d, slot), dh_row(d, slot), h.begin, h.end);
    if (kShape.cell_state && b_.dc0.data)
      copy_row(state_at(s, b_.dc0, d, slot), dc_row(d, slot), c.begin, c.end);
  }

  // dm = (dy + dh) x W_hr; dy + dh is kept for the gradient of W_hr.
  void unproject(const Part& part, const Visit& v, int64_t count) const {
    const Range own = part.columns_of_dh;
    for (int64_t k = 0; k < count; ++k) {
      const RowPointers& r = part.scratch.pointers[k];
      T* sum = row_at(b_.steps, part.dprojected, v.t, part.row_begin + k);
      for (int64_t i = own.begin; i < own.end; i += kLanes<T>) {
        store_up_to(sum + i, load(r.dh + i) + dy_at(r, i, own.end - i), own.end - i);
      }
    }
    part.barrier.wait(part.members);
    const ColumnPanels<T>& w = projection_[part.direction];
    A* to[kGroupRows];
    for (int64_t begin = 0; begin < count; begin += kGroupRows) {
      const int64_t rows = min_of(kGroupRows, count - begin);
      for (int64_t k = 0; k < rows; ++k) {
        part.scratch.projected[k] =
            row_at(b_.steps, part.dprojected, v.t, part.row_begin + begin + k);
      }
      const E* const* from = part.scratch.projected.operands(rows);
      for (int64_t p = part.units.begin / kWidth; p * kWidth < part.units.end; ++p) {
        for (int64_t k = 0; k < rows; ++k) {
          to[k] = part.scratch.pointers[begin + k].dm + p * kWidth;
        }
        w.multiply(p, rows, from, to, false);
      }
    }
  }

  // Up to n elements of dy from column i on.
  Vec<T> dy_at(const RowPointers& row, int64_t i, int64_t n) const {
    if (!row.dy) return Vec<T>{};
    return b_.dy_uniform ? Vec<T>{} + value(row.dy[0]) : load_up_to(row.dy + i, n);
  }

  void cell(const Part& part, const RowPointers& row) const {
    const int64_t H = b_.sizes.H;
    for (int64_t u = part.units.begin; u < part.units.end; u += kLanes<T>) {
      const int64_t n = H - u;
      Step<Vec<T>> s;
      if constexpr (kShape.saves_slots) {
#pragma GCC unroll 8
        for (int i = 0; i < kShape.slots; ++i) s.slot[i] = load_up_to(row.slots + i * H + u, n);
      } else {
        s.h = load_up_to(row.h + u, n);
      }
      if constexpr (kShape.reads_h) s.h_prev = load_up_to(row.h_prev + u, n);
      if constexpr (kShape.cell_state) {
        s.c = load_up_to(row.c + u, n);
        s.c_prev = load_up_to(row.c_prev + u, n);
        s.dc = load(row.dc + u);
      }
      if (row.dm) {
        s.dh = load(row.dm + u);
      } else {
        s.dh = load(row.dh + u) + dy_at(row, u, n);
      }
      Cell::backward(s);
#pragma GCC unroll 8
      for (int i = 0; i < kShape.slots; ++i) store_up_to(row.dslots + i * H + u, s.slot[i], n);
      if constexpr (kShape.cell_state) store(row.dc + u, s.dc);
      if constexpr (kShape.reads_h) store(row.dh + u, s.dh_direct);
    }
  }

  // dh = dh' + dslots x W_hh, for the member's own columns; dh rows are padded to whole panels.
  void recurrent_product(const Part& part, int64_t count) const {
    const ColumnPanels<T>& w = recurrent_[part.direction];
    const E* const* dslots = part.scratch.dslots.operands(count);
    A* dh = dh_row(part.direction, part.row_begin);
    for (int64_t p = part.columns_of_dh.begin / kWidth; p * kWidth < part.columns_of_dh.end; ++p) {
      A* acc = dh + p * kWidth;
      if constexpr (!kShape.reads_h) {
        for (int64_t k = 0; k < count; ++k) zero_row(acc + k * h_row_, 0, kWidth);
      }
      w.add(p, count, dslots, acc, h_row_);
    }
  }

  // Rows that never take part pass the gradients of their final states on to their initial ones.
  void finish_idle_rows(const Part& part) const {
    const int64_t first =
        b_.steps.T == 0 ? part.row_begin : max_of(part.row_begin, active_rows(b_.steps, 0));
    for (int64_t slot = first; slot < part.row_end; ++slot) {
      enter_row(part, slot);
      leave_row(part, slot);
    }
  }

  const Backward<T>& b_;
  const Plan& plan_;
  Gradients<T, Cell> gradients_;
  int64_t block_rows_, h_row_, u_row_;
  Barrier* barriers_;
  ColumnPanels<T> recurrent_[kMaxDirections];
  ColumnPanels<T> projection_[kMaxDirections];
  A *dh_, *dc_ = nullptr, *dm_ = nullptr;
  char* scratch_;
  int64_t scratch_bytes_;
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
