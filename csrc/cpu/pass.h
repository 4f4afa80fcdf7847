// What the passes through a layer have in common on the CPU: threads and teams, their memory, the
// order of steps, and the states with which rows enter and leave. forward.h, backward.h and
// second_order.h add the arithmetic of their steps.
//
// A task is one direction of one block of batch rows. It runs all steps without synchronising with
// other tasks. Its team is one thread, or unit_blocks of them (plan.h) that split the hidden units.
// A state or gradient that the whole team reads needs one barrier in each step.
#pragma once

#include "cells/cell.h"
#include "cpu/direction_weights.h"
#include "cpu/panels.h"
#include "cpu/rows.h"
#include "cpu/threads.h"
#include "plan.h"
#include "workspace.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

// One thread's part of one task.
template <typename Scratch>
struct Part {
  int direction;
  Range rows;           // of the batch, by rank
  Range units;          // of H, for which the thread computes the cell
  Range columns;        // of O: the thread's part of a row of the output
  int member, members;  // of the team
  Barrier& barrier;
  Scratch scratch;

  void wait_for_team() const { barrier.wait(members); }
  int64_t active(const Visit& v) const { return v.active_end - rows.begin; }
};

// Loads the cell's own parameters for n units from u on: number i goes to to(i). A null one is
// zeros.
template <CellShape kShape, typename T, typename To>
RNNKERN_INLINE void load_parameters(const Weights<T>& w, int64_t u, int64_t n, To to) {
#pragma GCC unroll 4
  for (int i = 0; i < kShape.parameters; ++i) {
    to(i) = w.parameters[i] ? load_up_to(w.parameters[i] + u, n) : Vec<T>{};
  }
}

// Calls f(range) for the places of units in a row of kPlanes numbers for each of H units.
template <int kPlanes, typename F>
RNNKERN_INLINE void for_planes(Range units, int64_t H, F f) {
  for (int k = 0; k < kPlanes; ++k) f(Range{units.begin + k * H, units.end + k * H});
}

// Driver is the class that derives from this one. It has kPlanes, of the cell's shape,
// scratch(Carver&), which lays out the scratch memory of one thread, pack(thread, threads),
// run_task(part) and, if something is left to do after all tasks, finish(thread, threads).
template <typename Driver, typename T>
class Pass {
 public:
  void run() {
    zero_row(zeros_, 0, widest());
    for (int i = 0; i <= plan_.threads; ++i) barriers_[i] = Barrier();
    parallel(plan_.threads, [this](int thread, int threads) {
      Barrier& everyone = barriers_[plan_.threads];
      driver().pack(thread, threads);
      everyone.wait(threads);
      run_tasks(thread, threads);
      if constexpr (requires(Driver& d) { d.finish(thread, threads); }) {
        everyone.wait(threads);
        driver().finish(thread, threads);
      }
    });
  }

 protected:
  // A team splits the units of the layer in multiples of `unit`.
  Pass(const Sizes& sizes, const Steps& steps, const Plan& plan, int64_t unit, Carver& carver)
      : sizes_(sizes),
        steps_(steps),
        plan_(plan),
        unit_(unit),
        block_rows_(ceil_div(steps.N, plan.row_blocks)),
        zeros_(carver.take<T>(widest())),
        barriers_(carver.take<Barrier>(1 + plan.threads)) {}

  // Called last in the constructor of the driver.
  void take_scratch(Carver& carver) {
    scratch_ = PerThread(plan_.threads, carver, [this](Carver& c) { driver().scratch(c); });
  }

  // Runs all steps in scan order, in blocks of `block_steps`. For each block it calls
  // gather(k, t, rank) for the active rows, which k numbers from 0 on; then prepare(count); then
  // step(visit, first) for each step, whose first row has the number `first`.
  template <typename Part, typename Gather, typename Prepare, typename Step>
  void for_blocks(const Part& part, int64_t block_steps, Gather gather, Prepare prepare,
                  Step step) const {
    const auto visit_at = [&](int64_t index) {
      return visit(steps_, part.direction == 0, index, part.rows.begin, part.rows.end);
    };
    for (int64_t i = 0; i < steps_.T; i += block_steps) {
      const int64_t end = min_of(i + block_steps, steps_.T);
      int64_t count = 0;
      for (int64_t j = i; j < end; ++j) {
        const Visit v = visit_at(j);
        for (int64_t rank = part.rows.begin; rank < v.active_end; ++rank) {
          gather(count++, v.t, rank);
        }
      }
      prepare(count);
      int64_t first = 0;
      for (int64_t j = i; j < end; ++j) {
        const Visit v = visit_at(j);
        step(v, first);
        first += part.active(v);
      }
    }
  }

  // Runs all steps against scan order.
  template <typename Part, typename Step>
  void for_steps_back(const Part& part, Step step) const {
    for (int64_t i = 0; i < steps_.T; ++i) {
      step(visit(steps_, part.direction == 1, i, part.rows.begin, part.rows.end));
    }
  }

  // Calls f(rank) for the empty rows, which take part in no step.
  template <typename Part, typename F>
  void for_empty_rows(const Part& part, F f) const {
    const int64_t first =
        steps_.T ? max_of(part.rows.begin, active_rows(steps_, 0)) : part.rows.begin;
    for (int64_t rank = first; rank < part.rows.end; ++rank) f(rank);
  }
  // Their final states are the initial ones. Null cn: there is no cell state.
  template <typename Part>
  void finish_empty_rows(const Part& part, const State<T>& hn, const State<const T>& h0,
                         const State<T>& cn, const State<const T>& c0) const {
    for_empty_rows(part, [&](int64_t rank) {
      const auto finish = [&](const State<T>& to, const State<const T>& from, Range own) {
        copy_or_zero_row(state_at(steps_, to, part.direction, rank),
                         state_or_null(steps_, from, part.direction, rank), own);
      };
      finish(hn, h0, part.columns);
      for_planes<Driver::kPlanes>(part.units, sizes_.H, [&](Range own) {
        if (cn.data) finish(cn, c0, own);
      });
    });
  }

  // Zeroes the thread's columns of a step in the rows that have ended.
  template <typename Part>
  void zero_padding(const Part& part, const Visit& v, const Rows<T>& rows) const {
    if (!steps_.active || steps_.is_packed()) return;
    for (int64_t rank = v.active_end; rank < part.rows.end; ++rank) {
      zero_row(row_at(steps_, rows, v.t, rank), part.columns);
    }
  }

  // The state that enters step t of a row.
  const T* entering_state(int direction, int64_t t, int64_t rank, const Rows<const T>& states,
                          const State<const T>& initial,
                          const State<const T>& reset_to = {}) const {
    return previous_state(steps_, direction, t, rank, states, initial, zeros_, reset_to);
  }

  // The features of the widest state.
  int64_t widest() const { return max_of(max_of(1, Driver::kPlanes) * sizes_.H, sizes_.O); }
  const T* zeros() const { return zeros_; }           // a row
  int64_t block_rows() const { return block_rows_; }  // of the largest block of the batch

  const Sizes& sizes_;
  const Steps& steps_;
  const Plan& plan_;

 private:
  Driver& driver() { return static_cast<Driver&>(*this); }

  // The tasks of this thread's team.
  void run_tasks(int thread, int threads) {
    const int members = threads < plan_.threads ? 1 : plan_.unit_blocks;
    const int teams = threads / members, team = thread / members, member = thread % members;
    for (int task = team; team < teams && task < sizes_.D * plan_.row_blocks; task += teams) {
      Carver carver = scratch_.of(thread);
      const Range units = split(sizes_.H, members, member, unit_);
      driver().run_task(typename Driver::Part{
          .direction = task % sizes_.D,
          .rows = split(steps_.N, plan_.row_blocks, task / sizes_.D),
          .units = units,
          .columns = sizes_.projected ? split(sizes_.O, members, member, kPanelWidth<T>) : units,
          .member = member,
          .members = members,
          .barrier = barriers_[team],
          .scratch = driver().scratch(carver)});
    }
  }

  const int64_t unit_, block_rows_;
  T* zeros_;
  Barrier* barriers_;  // one for each team, and the last for all threads
  PerThread scratch_;
};

// Rows that a pass carries from step to step: [D, N, kOrders, stride]. With two orders, the tangent
// of a row follows its value.
template <typename A, int kOrders = 1>
struct CarriedRows {
  int64_t N = 0, stride = 0;
  A* data = nullptr;

  // Rows of `width`, padded to whole panels.
  static CarriedRows take(const Sizes& sizes, const Steps& steps, int64_t width, Carver& carver) {
    const int64_t stride = ceil_div(width, kPanelWidth<A>) * kPanelWidth<A>;
    return {steps.N, stride, carver.take<A>(sizes.D * steps.N * kOrders * stride)};
  }
  A* at(int direction, int64_t rank, int order = 0) const {
    return data + ((direction * N + rank) * kOrders + order) * stride;
  }
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
