// The derivative of forward and backward pass in a direction, step by step (SecondOrder of scan.h):
//
//   ascending    a'(t) += W_hh h'(t-1)                  (h, c)'(t) = tangent of the cell
//   descending   (da, dh, dc)'(t) = backward of the cell on dual numbers
//                dh(t-1) = dh direct + W_hh^T da(t)     for values and tangents at once:
//                                                       two rows of one product for each row
//
// The cell's backward needs dh and dc themselves, which backward has not kept: the values are
// carried along with their tangents. Tasks and teams as in forward.h, of one direction.
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
class SecondOrderScan {
  using D = Dual<Vec<T>>;
  static constexpr CellShape kShape = Cell::kShape;
  static constexpr int64_t kWidth = kPanelWidth<T>;

 public:
  SecondOrderScan(const SecondOrder<T>& s, const Plan& plan, Carver& carver)
      : s_(s),
        plan_(plan),
        recurrent_{s.H, kShape.gates * s.H, s.w_hh, s.H, nullptr, true, nullptr},
        transposed_{kShape.gates * s.H, s.H, s.w_hh, s.H, nullptr, plan.packs_recurrent, nullptr},
        block_rows_(ceil_div(s.N, plan.row_blocks)),
        state_row_(ceil_div(s.H, kWidth) * kWidth) {
    barriers_ = carver.take<Barrier>(1 + plan.threads);
    recurrent_.packed = carver.take<T>(recurrent_.lanes());
    transposed_.packed = carver.take<T>(transposed_.lanes());
    dh_ = {carver.take<T>(s.N * state_row_), carver.take<T>(s.N * state_row_)};
    if (kShape.cell_state) {
      dc_ = {carver.take<T>(s.N * state_row_), carver.take<T>(s.N * state_row_)};
      tangent_c_ = carver.take<T>(s.steps * s.N * s.H);
      tangent_c_prev_ = carver.take<T>(s.steps * s.N * s.H);
    }
    pointers_ = carver.take<const T*>(plan.threads * 2 * block_rows_);
    results_ = carver.take<T*>(plan.threads * 2 * block_rows_);
  }

  void run() {
    for (int i = 0; i <= plan_.threads; ++i) barriers_[i] = Barrier();
    parallel(plan_.threads, [this](int thread, int threads) {
      for (int64_t p = thread; p < recurrent_.count(); p += threads) recurrent_.pack_transpose(p);
      for (int64_t p = thread; p < transposed_.count(); p += threads) transposed_.pack(p);
      barriers_[plan_.threads].wait(threads);
      const int members = threads < plan_.threads ? 1 : plan_.unit_blocks;
      const int teams = threads / members, team = thread / members, member = thread % members;
      for (int task = team; team < teams && task < plan_.row_blocks; task += teams) {
        const Part part = {split(s_.N, plan_.row_blocks, task),
                           split(s_.H, members, member, kWidth),
                           split(recurrent_.count(), members, member),
                           members,
                           barriers_[team],
                           pointers_ + thread * 2 * block_rows_,
                           results_ + thread * 2 * block_rows_};
        ascend(part);
        descend(part);
      }
    });
  }

 private:
  // One thread's part of one task.
  struct Part {
    Range rows, units, panels;  // panels: of the recurrent product
    int members;
    Barrier& barrier;
    const T** left;  // [2 * block_rows_]
    T** result;
  };
  // Values and tangents of rows [N, state_row_].
  struct Carried {
    T *value = nullptr, *tangent = nullptr;
  };

  int64_t at(int64_t t, int64_t n) const { return t * s_.N + n; }
  bool active(int64_t row) const { return !s_.active || s_.active[row]; }
  bool kept(int64_t row) const { return !s_.kept || s_.kept[row]; }

  void begin(T* to, const T* from, int64_t n, Range units) const {
    if (from) {
      copy_row(to, from + n * s_.H, units.begin, units.end);
    } else {
      zero_row(to, units.begin, units.end);
    }
  }

  void ascend(const Part& part) const {
    const int64_t H = s_.H, S = kShape.slots * H;
    for (int64_t n = part.rows.begin; n < part.rows.end; ++n) {
      begin(s_.tangent_hn + n * H, s_.tangent_h0, n, part.units);
      if (kShape.cell_state) begin(s_.tangent_cn + n * H, s_.tangent_c0, n, part.units);
    }
    for (int64_t t = 0; t < s_.steps; ++t) {
      int64_t count = 0;
      for (int64_t n = part.rows.begin; n < part.rows.end; ++n, ++count) {
        const int64_t row = at(t, n);
        T* h = s_.tangent_h_prev + row * H;
        begin(h, kept(row) ? s_.tangent_hn : nullptr, n, part.units);
        if constexpr (kShape.cell_state) {
          begin(tangent_c_prev_ + row * H, kept(row) ? s_.tangent_cn : nullptr, n, part.units);
        }
        part.left[count] = h;
      }
      part.barrier.wait(part.members);
      for (int64_t p = part.panels.begin; p < part.panels.end; ++p) {
        for (int64_t k = 0; k < count; ++k) {
          part.result[k] = s_.tangent_slots + at(t, part.rows.begin + k) * S + p * kWidth;
        }
        recurrent_.multiply(p, count, part.left, part.result, true);
      }
      part.barrier.wait(part.members);
      for (int64_t n = part.rows.begin; n < part.rows.end; ++n) tangent(part, t, n);
    }
  }

  // Units of a state as they enter the step of that row.
  Vec<T> entering(const T* states, const T* initial, int64_t row, int64_t u) const {
    const int64_t before = row - s_.N, n = s_.H - u;
    if (!kept(row)) return Vec<T>{};
    if (before >= 0 && active(before)) return load_up_to(states + before * s_.H + u, n);
    return initial ? load_up_to(initial + row % s_.N * s_.H + u, n) : Vec<T>{};
  }

  Step<D> load_step(int64_t row, int64_t u) const {
    const int64_t H = s_.H, S = kShape.slots * H, i = row * H + u, n = H - u;
    Step<D> s;
#pragma GCC unroll 4
    for (int k = 0; k < kShape.slots; ++k) {
      const int64_t at = row * S + k * H + u;
      s.slot[k].tangent = load_up_to(s_.tangent_slots + at, n);
      if constexpr (kShape.saves_slots) s.slot[k].value = load_up_to(s_.slots + at, n);
    }
    if constexpr (!kShape.saves_slots) s.h.value = load_up_to(s_.h + i, n);
    if constexpr (kShape.reads_h) {
      s.h_prev = {entering(s_.h, s_.h0, row, u), load_up_to(s_.tangent_h_prev + i, n)};
    }
    if constexpr (kShape.cell_state) {
      s.c_prev = {entering(s_.c, s_.c0, row, u), load_up_to(tangent_c_prev_ + i, n)};
    }
    return s;
  }

  void store_slots(const Step<D>& s, int64_t row, int64_t u) const {
    T* to = s_.tangent_slots + row * kShape.slots * s_.H + u;
#pragma GCC unroll 4
    for (int k = 0; k < kShape.slots; ++k) {
      store_up_to(to + k * s_.H, s.slot[k].tangent, s_.H - u);
    }
  }

  void tangent(const Part& part, int64_t t, int64_t row_of_batch) const {
    const int64_t H = s_.H, row = at(t, row_of_batch);
    for (int64_t u = part.units.begin; u < part.units.end; u += kLanes<T>) {
      const int64_t n = H - u;
      Step<D> s = load_step(row, u);
      Cell::tangent(s);
      if constexpr (kShape.saves_slots) store_slots(s, row, u);
      store_up_to(s_.tangent_h + row * H + u, s.h.tangent, n);
      if constexpr (kShape.cell_state) store_up_to(tangent_c_ + row * H + u, s.c.tangent, n);
      if (!active(row)) continue;
      store_up_to(s_.tangent_hn + row_of_batch * H + u, s.h.tangent, n);
      if constexpr (kShape.cell_state) {
        store_up_to(s_.tangent_cn + row_of_batch * H + u, s.c.tangent, n);
      }
    }
  }

  void descend(const Part& part) const {
    const int64_t H = s_.H, S = kShape.slots * H;
    const Range own = part.units;
    for (int64_t n = part.rows.begin; n < part.rows.end; ++n) {
      begin(dh_.value + n * state_row_, s_.dhn, n, own);
      begin(dh_.tangent + n * state_row_, s_.tangent_dhn, n, own);
      if constexpr (kShape.cell_state) {
        begin(dc_.value + n * state_row_, s_.dcn, n, own);
        begin(dc_.tangent + n * state_row_, s_.tangent_dcn, n, own);
      }
    }
    for (int64_t t = s_.steps - 1; t >= 0; --t) {
      int64_t count = 0;
      for (int64_t n = part.rows.begin; n < part.rows.end; ++n) {
        const int64_t row = at(t, n);
        T* tangents = s_.tangent_slots + row * S;
        if (!active(row)) {
          for (int k = 0; k < kShape.slots; ++k) {
            zero_row(tangents, k * H + own.begin, k * H + own.end);
          }
          continue;
        }
        backward(part, t, n);
        part.left[count] = s_.dslots + row * S;
        part.result[count++] = dh_.value + n * state_row_ + own.begin;
        part.left[count] = tangents;
        part.result[count++] = dh_.tangent + n * state_row_ + own.begin;
      }
      part.barrier.wait(part.members);
      multiply(part, count);
      for (int64_t n = part.rows.begin; n < part.rows.end; ++n) hand_over(part, t, n);
    }
    for (int64_t n = part.rows.begin; n < part.rows.end; ++n) {
      copy_row(s_.tangent_dh0 + n * H, dh_.tangent + n * state_row_, own.begin, own.end);
      if constexpr (kShape.cell_state) {
        copy_row(s_.tangent_dc0 + n * H, dc_.tangent + n * state_row_, own.begin, own.end);
      }
    }
  }

  void backward(const Part& part, int64_t t, int64_t row_of_batch) const {
    const int64_t H = s_.H, row = at(t, row_of_batch), state = row_of_batch * state_row_;
    for (int64_t u = part.units.begin; u < part.units.end; u += kLanes<T>) {
      const int64_t n = H - u, i = row * H + u;
      Step<D> s = load_step(row, u);
      if constexpr (!kShape.saves_slots) s.h.tangent = load_up_to(s_.tangent_h + i, n);
      s.dh = {load(dh_.value + state + u), load(dh_.tangent + state + u)};
      if (s_.dy) s.dh.value += load_up_to(s_.dy + i, n);
      if (s_.tangent_dy) s.dh.tangent += load_up_to(s_.tangent_dy + i, n);
      if constexpr (kShape.cell_state) {
        s.c = {load_up_to(s_.c + i, n), load_up_to(tangent_c_ + i, n)};
        s.dc = {load(dc_.value + state + u), load(dc_.tangent + state + u)};
      }
      Cell::backward(s);
      store_slots(s, row, u);
      if constexpr (kShape.cell_state) {
        store(dc_.value + state + u, s.dc.value);
        store(dc_.tangent + state + u, s.dc.tangent);
      }
      if constexpr (!kShape.reads_h) s.dh_direct = D{};
      store(dh_.value + state + u, s.dh_direct.value);
      store(dh_.tangent + state + u, s.dh_direct.tangent);
    }
  }

  // Of the member's own columns, which are its units.
  void multiply(const Part& part, int64_t count) const {
    for (int64_t p = part.units.begin / kWidth; p * kWidth < part.units.end; ++p) {
      transposed_.multiply(p, count, part.left, part.result, true);
      for (int64_t k = 0; k < count; ++k) part.result[k] += kWidth;
    }
  }

  // What step t has left goes to the step before.
  void hand_over(const Part& part, int64_t t, int64_t row_of_batch) const {
    const int64_t row = at(t, row_of_batch), state = row_of_batch * state_row_;
    const Range own = part.units;
    if (!active(row)) return;
    if (s_.crossing) {
      T* to = dh_.tangent + state;
      for (int64_t u = own.begin; u < own.end; ++u) to[u] += s_.crossing[row * s_.H + u];
    }
    if (kept(row)) return;
    for (T* z : {dh_.value, dh_.tangent, dc_.value, dc_.tangent}) {
      if (z) zero_row(z + state, own.begin, own.end);
    }
  }

  const SecondOrder<T>& s_;
  const Plan& plan_;
  ColumnPanels<T> recurrent_, transposed_;
  int64_t block_rows_, state_row_;
  Barrier* barriers_;
  Carried dh_, dc_;
  T *tangent_c_ = nullptr, *tangent_c_prev_ = nullptr;  // [T, N, H]
  const T** pointers_;
  T** results_;
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
