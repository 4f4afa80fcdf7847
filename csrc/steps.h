// Which rows are active at a step, where they are in memory, and the order in which a scan visits
// the steps. Every device uses this.
//
// Functions take the rank of a row, which is its place in the order of a Steps.
#pragma once

#include "cells/math.h"
#include "scan.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

// Part `index` of `parts` of [0, count), in whole multiples of `unit`.
struct Range {
  int64_t begin, end;
};
RNNKERN_INLINE Range split(int64_t count, int64_t parts, int64_t index, int64_t unit = 1) {
  const int64_t units = (count + unit - 1) / unit;
  const int64_t begin = units * index / parts * unit, end = units * (index + 1) / parts * unit;
  return {begin < count ? begin : count, end < count ? end : count};
}

RNNKERN_INLINE int64_t batch_row(const Steps& s, int64_t rank) {
  return s.order ? s.order[rank] : rank;
}

template <typename T>
RNNKERN_INLINE T* row_at(const Steps& s, const Rows<T>& rows, int64_t t, int64_t rank) {
  if (s.is_packed()) return rows.data + (s.start[t] + rank) * rows.row;
  return rows.data + t * rows.step + batch_row(s, rank) * rows.row;
}
// Null if the tensor is.
template <typename T>
RNNKERN_INLINE T* row_or_null(const Steps& s, const Rows<T>& rows, int64_t t, int64_t rank) {
  return rows.data ? row_at(s, rows, t, rank) : nullptr;
}

template <typename T>
RNNKERN_INLINE T* state_at(const Steps& s, const State<T>& state, int direction, int64_t rank) {
  return state.data + direction * state.direction + batch_row(s, rank) * state.row;
}
template <typename T>
RNNKERN_INLINE T* state_or_null(const Steps& s, const State<T>& state, int direction,
                                int64_t rank) {
  return state.data ? state_at(s, state, direction, rank) : nullptr;
}

template <typename T>
RNNKERN_INLINE Rows<const T> constant(const Rows<T>& rows) {
  return {rows.data, rows.step, rows.row};
}

// The rows of one direction in a saved buffer [D, total, F]. Null stays null.
template <typename T>
RNNKERN_INLINE Rows<T> saved_rows(const Steps& s, T* data, int direction, int64_t features) {
  if (!data) return {};
  return {data + direction * s.total * features, s.N * features, features};
}

// The columns of one direction in a [T, N, D*F] tensor. Null stays null.
template <typename T>
RNNKERN_INLINE Rows<T> columns(const Rows<T>& rows, int64_t first) {
  return rows.data ? Rows<T>{rows.data + first, rows.step, rows.row} : rows;
}

RNNKERN_INLINE int64_t active_rows(const Steps& s, int64_t t) {
  return s.active ? s.active[t] : s.N;
}

// Step number `index` of a scan over the rows [begin, end). The rows [begin, active_end) take part.
// Those from `entering` on take part for the first time, those from `leaving` on for the last time.
// The backward pass goes the other way: there a row enters at its last step and leaves at its
// first. The function `enters` below always means the order of forward.
struct Visit {
  int64_t t;
  int64_t active_end, entering, leaving;
};

// The number of rows that take part in step number `index` of a scan. It is zero before the first
// step and after the last one.
RNNKERN_INLINE int64_t active_at(const Steps& s, bool ascending, int64_t index) {
  return index < 0 || index >= s.T ? 0 : active_rows(s, ascending ? index : s.T - 1 - index);
}

// The visit of step t, from the numbers of active rows of the step before it, of itself and of the
// step after it, in scan order.
RNNKERN_INLINE Visit visit(int64_t t, int64_t before, int64_t now, int64_t after, int64_t begin,
                           int64_t end) {
  const auto end_of = [&](int64_t active) {
    return active < begin ? begin : active < end ? active : end;
  };
  now = end_of(now), before = end_of(before), after = end_of(after);
  return {t, now, before < now ? before : now, after < now ? after : now};
}

RNNKERN_INLINE Visit visit(const Steps& s, bool ascending, int64_t index, int64_t begin,
                           int64_t end) {
  return visit(ascending ? index : s.T - 1 - index, active_at(s, ascending, index - 1),
               active_at(s, ascending, index), active_at(s, ascending, index + 1), begin, end);
}

// True if step t of a row begins with the state of a reset. Then neither the initial state nor that
// of another step enters it. Forward, t is the first step of an episode. In the reverse direction t
// is the last one, so the flag is that of t+1. A row whose last step is t begins there with its
// initial state, whatever the flag of t+1 is.
RNNKERN_INLINE bool cut(const Steps& s, int direction, int64_t t, int64_t rank) {
  if (!s.reset) return false;
  const int64_t begin = direction == 0 ? t : t + 1;
  if (begin >= s.T || (direction == 1 && rank >= active_rows(s, begin))) return false;
  return s.reset[begin * s.reset_step + batch_row(s, rank) * s.reset_row];
}

// The step before t in scan order, for a row that does not enter at t.
RNNKERN_INLINE int64_t previous(int direction, int64_t t) { return direction == 0 ? t - 1 : t + 1; }

// True if t is the first step of the row in scan order.
RNNKERN_INLINE bool enters(const Steps& s, int direction, int64_t t, int64_t rank) {
  const int64_t before = previous(direction, t);
  return before < 0 || before >= s.T || rank >= active_rows(s, before);
}

// The state that enters step t of a row: that of `reset_to` if the step is cut, the initial state
// in the row's first step, else what the step before wrote. Zeros if that state is null.
template <typename T>
RNNKERN_INLINE const T* previous_state(const Steps& s, int direction, int64_t t, int64_t rank,
                                       const Rows<const T>& states, const State<const T>& initial,
                                       const T* zeros, const State<const T>& reset_to = {}) {
  if (cut(s, direction, t, rank)) {
    return reset_to.data ? state_at(s, reset_to, direction, rank) : zeros;
  }
  if (enters(s, direction, t, rank)) {
    return initial.data ? state_at(s, initial, direction, rank) : zeros;
  }
  return row_at(s, states, previous(direction, t), rank);
}

// Whether step t of a row begins with a state that no step wrote. Then `from` becomes that state:
// of a reset, or the initial one. Null is zeros. Not for GPUs, because `from` is in local memory
// there.
template <typename T>
RNNKERN_INLINE bool begins_anew(const Steps& s, int direction, int64_t t, int64_t rank,
                                const State<const T>& initial, const State<const T>& reset_to,
                                const T** from) {
  const bool is_cut = cut(s, direction, t, rank);
  if (!is_cut && !enters(s, direction, t, rank)) return false;
  *from = state_or_null(s, is_cut ? reset_to : initial, direction, rank);
  return true;
}

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
