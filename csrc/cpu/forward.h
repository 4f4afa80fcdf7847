// Forward pass of one layer:
//
//   slots(t) = W_ih x(t) + W_hh h(t-1) + biases
//   (h, c)(t) = cell(slots(t), c(t-1), h(t-1))
//
//   x [T, N, I]   y [T, N, D*O]   saved: slots [D, total, S*H], cells [D, total, H]
//
// Who owns what. A task is one direction of one block of batch rows, and runs through all steps
// with no word to any other task. Its team (one thread, or unit_blocks of them) splits the hidden
// units; h(t) is read by the whole team, so there is one barrier a step. Nothing is copied to feed
// a product: h(t-1) is read from y through row pointers, c lives in the saved states or in c_n.
//
// The input product of block_steps steps is made at once, into the accumulators where the recurrent
// product of each step then adds: weights of the input are read once per block instead of once per
// step. In a closed loop (Readout of scan.h) each step makes the input of the next, with one more
// barrier behind it. Of one step and row the products cost 2 G H (I + O) operations and, per block
// of rows, G H O weights from the cache.
#pragma once

#include "cells/cells.h"
#include "cpu/panels.h"
#include "cpu/rows.h"
#include "cpu/threads.h"
#include "plan.h"
#include "workspace.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

template <typename T, typename Cell>
class ForwardScan {
  using Panels = UnitPanels<T, Cell>;
  using A = Compute<T>;
  using E = Operand<T>;
  static constexpr CellShape kShape = Cell::kShape;
  static constexpr int64_t kWidth = kPanelWidth<T>;
  static constexpr int64_t kAccWidth = Panels::kAccWidth;
  // Cell states of narrow types are carried from step to step as what is computed with.
  static constexpr bool kCarriesCells = kShape.cell_state && kNarrow<T>;
  using Carried = std::conditional_t<kCarriesCells, A, T>;  // else as they are stored

 public:
  ForwardScan(const Forward<T>& f, const Plan& plan, Carver& carver)
      : f_(f), plan_(plan), panels_{f.sizes.H} {
    const Sizes& z = f.sizes;
    block_rows_ = ceil_div(f.steps.N, plan.row_blocks);
    zeros_ = carver.take<T>(max_of(z.H, z.O));
    barriers_ = carver.take<Barrier>(1 + plan.threads);
    for (int d = 0; d < z.D; ++d) {
      bias_[d] = carver.take<A>(panels_.count() * kAccWidth);
      const Weights<T>& w = f.weights[d];
      input_[d] = {panels_, w.w_ih, w.w_ih_row, z.I, nullptr};
      recurrent_[d] = {panels_, w.w_hh, w.w_hh_row, z.O, nullptr};
      if (plan.input == Reading::kPacked) input_[d].packed = carver.take<A>(input_[d].lanes());
      if (plan.recurrent == Reading::kPacked) {
        recurrent_[d].packed = carver.take<A>(recurrent_[d].lanes());
      }
      if (z.projected) {
        projection_[d] = {z.H, z.O, w.w_hr, w.w_hr_row, nullptr, true, nullptr};
        projection_[d].packed = carver.take<A>(projection_[d].lanes());
      }
    }
    if (f.readout.w) {
      readout_ = {z.O, z.I, f.readout.w, f.readout.row, nullptr, true, nullptr};
      readout_.packed = carver.take<A>(readout_.lanes());
    }
    const int64_t batch = f.steps.N;
    if (z.projected && !f.unprojected) unprojected_ = carver.take<T>(z.D * batch * z.H);
    if (kCarriesCells) carried_ = carver.take<A>(z.D * batch * z.H);
    capacity_ = plan.block_steps * block_rows_;
    Carver count(nullptr);
    scratch(count);
    scratch_bytes_ = int64_t(count.used());
    scratch_ = carver.take<char>(plan.threads * scratch_bytes_);
  }

  void run() {
    zero_row(zeros_, 0, max_of(f_.sizes.H, f_.sizes.O));
    for (int i = 0; i <= plan_.threads; ++i) barriers_[i] = Barrier();
    parallel(plan_.threads, [this](int thread, int threads) {
      pack(thread, threads);
      barriers_[plan_.threads].wait(threads);
      const int unit_blocks = threads < plan_.threads ? 1 : plan_.unit_blocks;
      const int teams = threads / unit_blocks, team = thread / unit_blocks;
      for (int task = team; team < teams && task < f_.sizes.D * plan_.row_blocks; task += teams) {
        scan(task, thread % unit_blocks, unit_blocks, barriers_[team], scratch_of(thread));
      }
    });
  }

 private:
  // Where one row of one step stands.
  struct RowPointers {
    const T* h_prev;
    const Carried* c_prev;
    T* h;
    Carried* c;
    T *slots, *saved_c;  // saved_c: where c is carried elsewhere
  };
  struct Scratch {
    A* acc;         // [panels, or 1 where fused][capacity_][kAccWidth]
    LeftRows<T> x;  // [capacity_][I]
    LeftRows<T> h;  // [block_rows_][O]
    // Of a panel, where the matrix is broadcast.
    LeftRows<T> rows_of_w_ih;  // [kPanelWidth][I]
    LeftRows<T> rows_of_w_hh;  // [kPanelWidth][O]
    LeftRows<T> projected;     // [kGroupRows][H]
    LeftRows<T> output;        // [kGroupRows][O], where there is a readout
    RowPointers* pointers;     // [block_rows_]
  };
  // One thread's part of one task.
  struct Part {
    int direction;
    int64_t row_begin, row_end;
    int64_t panel_begin, panel_end;
    int64_t column_begin, column_end;  // of y
    Range fed;                         // columns of what the readout makes
    int members;
    Barrier& barrier;
    const Scratch& scratch;
    Rows<T> y, slots, cells, unprojected;
  };

  Scratch scratch(Carver& carver) const {
    const Sizes& z = f_.sizes;
    return {carver.take<A>((fused() ? 1 : panels_.count()) * capacity_ * kAccWidth),
            LeftRows<T>(capacity_, z.I, carver, broadcasts(plan_.input)),
            LeftRows<T>(block_rows_, z.O, carver, broadcasts(plan_.recurrent)),
            LeftRows<T>(broadcasts(plan_.input) ? kAccWidth : 0, z.I, carver),
            LeftRows<T>(broadcasts(plan_.recurrent) ? kAccWidth : 0, z.O, carver),
            LeftRows<T>(z.projected ? kGroupRows : 0, z.H, carver),
            LeftRows<T>(f_.readout.w ? kGroupRows : 0, z.O, carver),
            carver.take<RowPointers>(block_rows_)};
  }
  Scratch scratch_of(int thread) const {
    Carver carver(scratch_ + thread * scratch_bytes_);
    return scratch(carver);
  }

  void pack(int thread, int threads) {
    for (int d = 0; d < f_.sizes.D; ++d) {
      for (int64_t p = thread; p < panels_.count(); p += threads) {
        panels_.pack_bias(p, f_.weights[d], bias_[d] + p * kAccWidth);
        if (plan_.input == Reading::kPacked) input_[d].pack(p);
        if (plan_.recurrent == Reading::kPacked) recurrent_[d].pack(p);
      }
      if (!f_.sizes.projected) continue;
      for (int64_t p = thread; p < projection_[d].count(); p += threads) {
        projection_[d].pack_transpose(p);
      }
    }
    for (int64_t p = thread; f_.readout.w && p < readout_.count(); p += threads) {
      readout_.pack_transpose(p);
    }
  }

  void scan(int task, int member, int members, Barrier& barrier, const Scratch& scratch) {
    const Sizes& z = f_.sizes;
    const int d = task % z.D;
    const Range rows = split(f_.steps.N, plan_.row_blocks, task / z.D);
    const Range panels = split(panels_.count(), members, member);
    const Range units = {min_of(panels.begin * Panels::kUnits, z.H),
                         min_of(panels.end * Panels::kUnits, z.H)};
    const Range columns_of_y = z.projected ? split(z.O, members, member, kWidth) : units;
    T* unprojected = f_.unprojected ? f_.unprojected : unprojected_;
    Rows<T> unprojected_rows = saved_rows(f_.steps, f_.unprojected, d, z.H);
    if (unprojected_) unprojected_rows = {unprojected + d * f_.steps.N * z.H, 0, z.H};
    const Part part = {d,
                       rows.begin,
                       rows.end,
                       panels.begin,
                       panels.end,
                       columns_of_y.begin,
                       columns_of_y.end,
                       split(z.I, members, member, kWidth),
                       members,
                       barrier,
                       scratch,
                       columns(f_.y, d * z.O),
                       saved_rows(f_.steps, f_.slots, d, kShape.slots * z.H),
                       saved_rows(f_.steps, f_.cells, d, z.H),
                       unprojected_rows};
    for (int64_t i = 0; i < f_.steps.T; i += plan_.block_steps) {
      const int64_t end = min_of(i + plan_.block_steps, f_.steps.T);
      const int64_t count = gather_input(part, i, end);
      const BatchRows<T> x = part.scratch.x.batch(count);
      if (!fused()) {
        for (int64_t p = part.panel_begin; p < part.panel_end; ++p) {
          input_product(part, p, x, count);
        }
      }
      int64_t first = 0;
      for (int64_t j = i; j < end; ++j) {
        const Visit v = visit(f_.steps, d == 0, j, part.row_begin, part.row_end);
        step(part, v, x, first, j % 2 != 0);
        first += v.active_end - part.row_begin;
      }
    }
    finish_idle_rows(part);
  }

  // A block of one step is finished panel by panel: its accumulators never leave the first-level
  // cache.
  bool fused() const { return plan_.block_steps == 1; }
  A* accumulators(const Part& part, int64_t p) const {
    return part.scratch.acc + (fused() ? 0 : p * capacity_ * kAccWidth);
  }

  // The input rows of all active rows of the steps [begin, end), one step after the other; returns
  // their number.
  int64_t gather_input(const Part& part, int64_t begin, int64_t end) const {
    int64_t count = 0;
    for (int64_t j = begin; j < end; ++j) {
      const Visit v = visit(f_.steps, part.direction == 0, j, part.row_begin, part.row_end);
      for (int64_t slot = part.row_begin; slot < v.active_end; ++slot) {
        part.scratch.x[count++] = row_at(f_.steps, f_.x, v.t, slot);
      }
    }
    return count;
  }

  // acc = biases + W_ih x for the units of panel p and the rows gathered.
  void input_product(const Part& part, int64_t p, const BatchRows<T>& x, int64_t count) const {
    A* acc = accumulators(part, p);
    const A* bias = bias_[part.direction] + p * kAccWidth;
    for (int64_t m = 0; m < count; ++m) copy_vectors(acc + m * kAccWidth, bias);
    add(input_[part.direction], p, count, x, part.scratch.rows_of_w_ih, acc);
  }

  static bool broadcasts(Reading reading) { return reading == Reading::kBroadcast; }

  template <Role role>
  static void add(const StepWeights<T, Cell, role>& w, int64_t p, int64_t count,
                  const BatchRows<T>& batch, const LeftRows<T>& rows_of_w, A* acc) {
    if (batch.across) {
      w.add_broadcast(p, count, batch.across, rows_of_w, acc, kAccWidth);
    } else {
      w.add(p, count, batch.rows, acc, kAccWidth);
    }
  }

  static void copy_vectors(A* to, const A* from) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kAccWidth; i += kLanes<T>) store(to + i, load(from + i));
  }

  // x: the rows of the input where the step is fused; first: of the step among the accumulators;
  // backwards: from the last panel to the first. Every other step goes that way: it begins with the
  // weights that the step before has read last, which are still in the cache.
  void step(const Part& part, const Visit& v, const BatchRows<T>& x, int64_t first,
            bool backwards) const {
    const int64_t count = v.active_end - part.row_begin;
    for (int64_t k = 0; k < count; ++k) {
      part.scratch.pointers[k] = pointers(part, v.t, part.row_begin + k);
      part.scratch.h[k] = part.scratch.pointers[k].h_prev;
    }
    const BatchRows<T> h = part.scratch.h.batch(count);
    for (int64_t i = part.panel_begin; i < part.panel_end; ++i) {
      const int64_t p = backwards ? part.panel_begin + part.panel_end - 1 - i : i;
      if (fused()) input_product(part, p, x, count);
      A* acc = accumulators(part, p) + first * kAccWidth;
      add(recurrent_[part.direction], p, count, h, part.scratch.rows_of_w_hh, acc);
      cells(p, part.scratch.pointers, count, acc);
    }
    if (f_.sizes.projected) project(part, v, count);
    if (f_.steps.active && !f_.steps.start) {
      for (int64_t slot = v.active_end; slot < part.row_end; ++slot) {
        zero_row(row_at(f_.steps, part.y, v.t, slot), part.column_begin, part.column_end);
      }
    }
    for (int64_t slot = v.leaving; slot < v.active_end; ++slot) finish_row(part, v.t, slot);
    part.barrier.wait(part.members);
    if (f_.readout.w) {
      feed(part, v, count);
      part.barrier.wait(part.members);
    }
  }

  RowPointers pointers(const Part& part, int64_t t, int64_t slot) const {
    const Steps& s = f_.steps;
    const int d = part.direction;
    RowPointers r = {};
    const Rows<const T> y = {part.y.data, part.y.step, part.y.row};
    r.h_prev = previous_state(s, d, t, slot, y, f_.h0, zeros_);
    r.h = f_.sizes.projected ? row_at(s, part.unprojected, unprojected_ ? 0 : t, slot)
                             : row_at(s, part.y, t, slot);
    if (part.slots.data) r.slots = row_at(s, part.slots, t, slot);
    if constexpr (kCarriesCells) {
      A* c = carried_row(d, slot);
      r.c_prev = r.c = c;
      if (part.cells.data) r.saved_c = row_at(s, part.cells, t, slot);
      const bool from_zero = cut(s, d, t, slot);
      if (from_zero || enters(s, d, t, slot)) {
        const T* c0 = f_.c0.data && !from_zero ? state_at(s, f_.c0, d, slot) : zeros_;
        copy_row(c, c0, unit_begin(part), unit_end(part));
      }
    } else if constexpr (kShape.cell_state) {
      if (part.cells.data) {
        const Rows<const T> cells = {part.cells.data, part.cells.step, part.cells.row};
        r.c_prev = previous_state(s, d, t, slot, cells, f_.c0, zeros_);
        r.c = row_at(s, part.cells, t, slot);
      } else {  // kept in place, in c_n
        r.c = state_at(s, f_.cn, d, slot);
        r.c_prev = r.c;
        if (enters(s, d, t, slot)) r.c_prev = f_.c0.data ? state_at(s, f_.c0, d, slot) : zeros_;
        if (cut(s, d, t, slot)) r.c_prev = zeros_;
      }
    }
    return r;
  }

  // The cell on all units of a panel of `count` rows: two rows at once where vectors are whole, for
  // a single one is a chain of operations that wait for each other. Which rows are two depends on
  // the split into threads, their bits must not (a test compares them): the compiler has to
  // contract the sums of both the same way.
  void cells(int64_t p, const RowPointers* rows, int64_t count, A* acc) const {
    const int64_t width = panels_.width(p);
    for (int64_t v = 0; v < width; v += kLanes<T>) {
      const int64_t u = panels_.first_unit(p) + v, n = f_.sizes.H - u;
      int64_t k = 0;
      if (n >= kLanes<T>) {
        for (; k + 2 <= count; k += 2)
          cell<2>(rows + k, u, kLanes<T>, acc + k * kAccWidth + v, width);
        if (k < count) cell<1>(rows + k, u, kLanes<T>, acc + k * kAccWidth + v, width);
      } else {
        for (; k < count; ++k) cell<1>(rows + k, u, n, acc + k * kAccWidth + v, width);
      }
    }
  }

  // On n units from u on, of kRows rows.
  template <int kRows>
  RNNKERN_INLINE void cell(const RowPointers* rows, int64_t u, int64_t n, const A* acc,
                           int64_t width) const {
    Step<Vec<T>> steps[kRows];
#pragma GCC unroll 2
    for (int k = 0; k < kRows; ++k) {
      Step<Vec<T>>& s = steps[k];
#pragma GCC unroll 8
      for (int i = 0; i < kShape.slots; ++i) {
        s.slot[i] = load(acc + k * kAccWidth + Panels::slot_at(i, width));
      }
      if constexpr (kShape.reads_h) s.h_prev = load_up_to(rows[k].h_prev + u, n);
      if constexpr (kShape.cell_state) s.c_prev = load_up_to(rows[k].c_prev + u, n);
    }
#pragma GCC unroll 2
    for (int k = 0; k < kRows; ++k) Cell::forward(steps[k]);
#pragma GCC unroll 2
    for (int k = 0; k < kRows; ++k) {
      Step<Vec<T>>& s = steps[k];
      const RowPointers& row = rows[k];
      store_up_to(row.h + u, s.h, n);
      if constexpr (kCarriesCells) {
        if (f_.rounds_cells) s.c = rounded<T>(s.c);
        if (row.saved_c) store_up_to(row.saved_c + u, s.c, n);
      }
      if constexpr (kShape.cell_state) store_up_to(row.c + u, s.c, n);
      if (kShape.saves_slots && row.slots) {
#pragma GCC unroll 8
        for (int i = 0; i < kShape.slots; ++i) {
          store_up_to(row.slots + i * f_.sizes.H + u, s.slot[i], n);
        }
      }
    }
  }

  // y = W_hr h, once the whole team has written h.
  void project(const Part& part, const Visit& v, int64_t count) const {
    part.barrier.wait(part.members);
    const auto from = [&](int64_t k) { return part.scratch.pointers[k].h; };
    const auto to = [&](int64_t k) { return row_at(f_.steps, part.y, v.t, part.row_begin + k); };
    const Range own = {part.column_begin, part.column_end};
    multiply_rows(projection_[part.direction], own, count, part.scratch.projected, from, to, false);
  }

  // What the next step takes, once the whole team has written y.
  void feed(const Part& part, const Visit& v, int64_t count) const {
    const auto from = [&](int64_t k) { return row_at(f_.steps, part.y, v.t, part.row_begin + k); };
    const auto to = [&](int64_t k) {
      return row_at(f_.steps, f_.readout.made, v.t, part.row_begin + k);
    };
    for (int64_t k = 0; k < count; ++k) {
      if (f_.readout.b) {
        copy_row(to(k), f_.readout.b, part.fed.begin, part.fed.end);
      } else {
        zero_row(to(k), part.fed.begin, part.fed.end);
      }
    }
    multiply_rows(readout_, part.fed, count, part.scratch.output, from, to, true);
  }

  // Columns `own` of the rows to(k) = or += from(k) x w.
  template <typename From, typename To>
  static void multiply_rows(const ColumnPanels<T>& w, Range own, int64_t count,
                            const LeftRows<T>& left, From from, To to, bool adds) {
    T* out[kGroupRows];
    for (int64_t begin = 0; begin < count; begin += kGroupRows) {
      const int64_t rows = min_of(kGroupRows, count - begin);
      for (int64_t k = 0; k < rows; ++k) left[k] = from(begin + k);
      const E* const* operands = left.operands(rows);
      for (int64_t p = own.begin / kWidth; p * kWidth < own.end; ++p) {
        for (int64_t k = 0; k < rows; ++k) out[k] = to(begin + k) + p * kWidth;
        w.multiply(p, rows, operands, out, adds);
      }
    }
  }

  // The final states of a row that takes part for the last time at step t.
  void finish_row(const Part& part, int64_t t, int64_t slot) const {
    const Steps& s = f_.steps;
    T *const hn = state_at(s, f_.hn, part.direction, slot), *const y = row_at(s, part.y, t, slot);
    if (hn != y) copy_row(hn, y, part.column_begin, part.column_end);  // of a cell they are one
    if constexpr (kCarriesCells) {
      copy_row(state_at(s, f_.cn, part.direction, slot), carried_row(part.direction, slot),
               unit_begin(part), unit_end(part));
    } else if (kShape.cell_state && part.cells.data) {
      copy_row(state_at(s, f_.cn, part.direction, slot), row_at(s, part.cells, t, slot),
               unit_begin(part), unit_end(part));
    }
  }

  A* carried_row(int d, int64_t slot) const {
    return carried_ + (d * f_.steps.N + slot) * f_.sizes.H;
  }

  // Rows that never take part end where they began.
  void finish_idle_rows(const Part& part) const {
    const Steps& s = f_.steps;
    const int64_t first = s.T == 0 ? part.row_begin : max_of(part.row_begin, active_rows(s, 0));
    for (int64_t slot = first; slot < part.row_end; ++slot) {
      const T* h = f_.h0.data ? state_at(s, f_.h0, part.direction, slot) : zeros_;
      copy_row(state_at(s, f_.hn, part.direction, slot), h, part.column_begin, part.column_end);
      if constexpr (kShape.cell_state) {
        const T* c = f_.c0.data ? state_at(s, f_.c0, part.direction, slot) : zeros_;
        copy_row(state_at(s, f_.cn, part.direction, slot), c, unit_begin(part), unit_end(part));
      }
    }
  }

  int64_t unit_begin(const Part& part) const {
    return min_of(part.panel_begin * Panels::kUnits, f_.sizes.H);
  }
  int64_t unit_end(const Part& part) const {
    return min_of(part.panel_end * Panels::kUnits, f_.sizes.H);
  }

  const Forward<T>& f_;
  const Plan& plan_;
  Panels panels_;
  int64_t block_rows_, capacity_;
  T* zeros_;
  Barrier* barriers_;
  A* bias_[kMaxDirections];
  StepWeights<T, Cell, Role::kInput> input_[kMaxDirections];
  StepWeights<T, Cell, Role::kRecurrent> recurrent_[kMaxDirections];
  ColumnPanels<T> projection_[kMaxDirections];
  ColumnPanels<T> readout_;
  T* unprojected_ = nullptr;
  A* carried_ = nullptr;  // [D, N, H]
  char* scratch_;
  int64_t scratch_bytes_;
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
