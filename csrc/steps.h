// Where the rows of a step stand, which of them are active, and the order in which a scan visits
// the steps: for every device.
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

RNNKERN_INLINE int64_t batch_row(const Steps& s, int64_t slot) {
  return s.order ? s.order[slot] : slot;
}

template <typename T>
RNNKERN_INLINE T* row_at(const Steps& s, const Rows<T>& rows, int64_t t, int64_t slot) {
  if (s.start) return rows.data + (s.start[t] + slot) * rows.row;
  return rows.data + t * rows.step + batch_row(s, slot) * rows.row;
}

template <typename T>
RNNKERN_INLINE T* state_at(const Steps& s, const State<T>& state, int direction, int64_t slot) {
  return state.data + direction * state.direction + batch_row(s, slot) * state.row;
}

// A saved buffer [D, total, F] of one direction as rows; null stays null.
template <typename T>
RNNKERN_INLINE Rows<T> saved_rows(const Steps& s, T* data, int direction, int64_t features) {
  if (!data) return {};
  return {data + direction * s.total * features, s.N * features, features};
}

// Columns of one direction of a [T, N, D*F] tensor; null stays null.
template <typename T>
RNNKERN_INLINE Rows<T> columns(const Rows<T>& rows, int64_t first) {
  return rows.data ? Rows<T>{rows.data + first, rows.step, rows.row} : rows;
}

RNNKERN_INLINE int64_t active_rows(const Steps& s, int64_t t) {
  return s.active ? s.active[t] : s.N;
}

// Step number `index` of a scan over the rows [begin, end): rows [begin, active_end) take part,
// those from entering on for the first time, those from leaving on for the last time.
struct Visit {
  int64_t t;
  int64_t active_end, entering, leaving;
};

// Rows that take part in step number `index` of a scan, none before the first and after the last.
RNNKERN_INLINE int64_t active_at(const Steps& s, bool ascending, int64_t index) {
  return index < 0 || index >= s.T ? 0 : active_rows(s, ascending ? index : s.T - 1 - index);
}

// From those of this step, the one before and the one after.
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

// The state that enters step t of a row is zero because an episode begins there. For the reverse
// direction the boundary lies between t and t+1, and the state a row starts from is not cut.
RNNKERN_INLINE bool cut(const Steps& s, int direction, int64_t t, int64_t slot) {
  if (!s.reset) return false;
  const int64_t begin = direction == 0 ? t : t + 1;
  if (begin >= s.T || (direction == 1 && slot >= active_rows(s, begin))) return false;
  return s.reset[begin * s.reset_step + batch_row(s, slot) * s.reset_row];
}

// The step before t in scan order, for a row that does not enter at t.
RNNKERN_INLINE int64_t previous(int direction, int64_t t) { return direction == 0 ? t - 1 : t + 1; }

// The row enters its first step at t.
RNNKERN_INLINE bool enters(const Steps& s, int direction, int64_t t, int64_t slot) {
  const int64_t before = previous(direction, t);
  return before < 0 || before >= s.T || slot >= active_rows(s, before);
}

// The state that enters step t of a row: zeros, the initial state, or what the step before left.
template <typename T>
RNNKERN_INLINE const T* previous_state(const Steps& s, int direction, int64_t t, int64_t slot,
                                       const Rows<const T>& states, const State<const T>& initial,
                                       const T* zeros) {
  if (cut(s, direction, t, slot)) return zeros;
  if (enters(s, direction, t, slot))
    return initial.data ? state_at(s, initial, direction, slot) : zeros;
  return row_at(s, states, previous(direction, t), slot);
}

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
