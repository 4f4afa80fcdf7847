// What both tiers read of operands and write of results, one element of one step at a time.
#pragma once

#include "cells/cells.h"
#include "cells/narrow.h"
#include "cuda/device.cuh"
#include "steps.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

RNNKERN_DEVICE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// These are functions because a constant of a class is no object in device code.
template <typename Cell>
RNNKERN_DEVICE int recurrent_gate(int slot) {
  constexpr CellShape shape = Cell::kShape;
  return shape.recurrent_gate(slot);
}
template <typename Cell>
RNNKERN_DEVICE int input_gate(int slot) {
  constexpr CellShape shape = Cell::kShape;
  return shape.input_gate(slot);
}

// Stores a number, rounded if the element is narrower.
RNNKERN_DEVICE void put(float* to, float x) { *to = x; }
RNNKERN_DEVICE void put(double* to, double x) { *to = x; }
RNNKERN_DEVICE void put(Bf16* to, float x) { *to = narrowed<Bf16>(x); }
RNNKERN_DEVICE void put(F16* to, float x) { *to = narrowed<F16>(x); }

// The number as it is after it has been stored.
template <typename T>
RNNKERN_DEVICE Compute<T> rounded(Compute<T> number) {
  if constexpr (kNarrow<T>) {
    return widened(narrowed<T>(number));
  } else {
    return number;
  }
}

// The sum of the biases of a slot of a unit.
template <typename Cell, typename T>
RNNKERN_DEVICE Compute<T> bias_of(const Weights<T>& w, int64_t H, int slot, int64_t unit) {
  constexpr CellShape kShape = Cell::kShape;
  Compute<T> sum = 0;
  if (w.b_ih && slot >= kShape.input_slot) sum += value(w.b_ih[input_gate<Cell>(slot) * H + unit]);
  if (w.b_hh && slot < kShape.gates) sum += value(w.b_hh[recurrent_gate<Cell>(slot) * H + unit]);
  return sum;
}

// Computes the slots before their activation, in two parts: bias(slot) and, if the slot has an
// input product, input(gate); later recurrent(slot), if the slot has a recurrent product.
template <typename Cell, typename A, typename Bias, typename Input>
RNNKERN_DEVICE void add_inputs(Step<A>& s, Bias bias, Input input) {
  constexpr CellShape kShape = Cell::kShape;
#pragma unroll
  for (int i = 0; i < kShape.slots; ++i) {
    s.slot[i] = bias(i);
    if (i >= kShape.input_slot) s.slot[i] += input(i - kShape.input_slot);
  }
}
template <typename Cell, typename A, typename Recurrent>
RNNKERN_DEVICE void add_products(Step<A>& s, Recurrent recurrent) {
  constexpr CellShape kShape = Cell::kShape;
#pragma unroll
  for (int i = 0; i < kShape.gates; ++i) s.slot[i] += recurrent(i);
}

// The cell states of a step: c, and the states besides h and c. They follow each other in memory, H
// units of each.
template <typename V>
RNNKERN_DEVICE V& c_of(Step<V>& s, int plane) {
  return plane == 0 ? s.c : s.more[plane - 1];
}
template <typename V>
RNNKERN_DEVICE const V& c_of(const Step<V>& s, int plane) {
  return plane == 0 ? s.c : s.more[plane - 1];
}
template <typename V>
RNNKERN_DEVICE V& c_prev_of(Step<V>& s, int plane) {
  return plane == 0 ? s.c_prev : s.more_prev[plane - 1];
}
template <typename V>
RNNKERN_DEVICE V& dc_of(Step<V>& s, int plane) {
  return plane == 0 ? s.dc : s.dmore[plane - 1];
}

// Sets to(i) to the cell's own parameters for a unit, and to zero if they are null.
template <typename Cell, typename T, typename To>
RNNKERN_DEVICE void load_parameters(const Weights<T>& w, int64_t unit, To to) {
  constexpr CellShape kShape = Cell::kShape;
  if constexpr (kShape.parameters > 0) {
#pragma unroll
    for (int i = 0; i < kShape.parameters; ++i) {
      to(i) = w.parameters[i] ? value(w.parameters[i][unit]) : Compute<T>(0);
    }
  }
}

// An element of a state; zero if the state is null.
template <typename T>
RNNKERN_DEVICE Compute<T> element_of(const Steps& s, const State<const T>& state, int direction,
                                     int64_t rank, int64_t column) {
  return state.data ? value(state_at(s, state, direction, rank)[column]) : Compute<T>(0);
}

// Copies an element of a state, if it is wanted.
template <typename T>
RNNKERN_DEVICE void pass_element(const Steps& s, const State<const T>& from, const State<T>& to,
                                 int direction, int64_t rank, int64_t column) {
  if (!to.data) return;
  state_at(s, to, direction, rank)[column] =
      from.data ? state_at(s, from, direction, rank)[column] : T{};
}

// Cell states of narrow types are carried from step to step in the type that is computed with.
template <typename T, typename Cell>
constexpr bool kCarriesCells = Cell::kShape.cell_state && kNarrow<T>;

// x W_ih^T for the rows of some steps: row r of a direction begins at rows[direction] + r * width.
template <typename A>
struct Inputs {
  const A* rows[kMaxDirections] = {};
  int64_t width = 0;

  RNNKERN_DEVICE Rows<const A> of(const Steps& s, int direction) const {
    return {rows[direction], s.N * width, width};
  }
};

// Stores the results of a forward pass, except h itself, which is published first because other
// blocks may wait for it.
template <typename T, typename Cell>
class ForwardStores {
  using A = Compute<T>;
  static constexpr CellShape kShape = Cell::kShape;

 public:
  RNNKERN_DEVICE ForwardStores(const Forward<T>& f, int direction)
      : f_(f),
        s_(f.steps),
        d_(direction),
        slots_(saved_rows(s_, f.slots, d_, kShape.stored() * f.sizes.H)),
        cells_(saved_rows(s_, f.cells, d_, kShape.planes() * f.sizes.H)) {}

  RNNKERN_DEVICE void put_step(const Visit& v, int64_t rank, int64_t unit, const Step<A>& s) const {
    const bool leaves = rank >= v.leaving;
    if (leaves && !f_.sizes.projected) put(state_at(s_, f_.hn, d_, rank) + unit, s.h);
#pragma unroll
    for (int j = 0; j < kShape.planes(); ++j) {
      const int64_t column = j * f_.sizes.H + unit;
      if (cells_.data) put(row_at(s_, cells_, v.t, rank) + column, c_of(s, j));
      if (leaves) put(state_at(s_, f_.cn, d_, rank) + column, c_of(s, j));
    }
    if (kShape.saves_slots && slots_.data) {
      T* saved = row_at(s_, slots_, v.t, rank) + unit;
#pragma unroll
      for (int i = 0; i < kShape.stored(); ++i) put(saved + i * f_.sizes.H, s.slot[i]);
    }
  }

 private:
  const Forward<T>& f_;
  const Steps& s_;
  const int d_;
  const Rows<T> slots_, cells_;
};

// What a backward pass reads of what forward has saved.
template <typename T, typename Cell>
class BackwardLoads {
  using A = Compute<T>;
  static constexpr CellShape kShape = Cell::kShape;

 public:
  // zeros: [max(H, O, planes H)]
  RNNKERN_DEVICE BackwardLoads(const Backward<T>& b, const T* zeros, int direction)
      : b_(b),
        s_(b.steps),
        zeros_(zeros),
        d_(direction),
        y_(columns(b.y, d_ * b.sizes.O)),
        slots_(saved_rows(s_, b.slots, d_, kShape.stored() * b.sizes.H)),
        cells_(saved_rows(s_, b.cells, d_, kShape.planes() * b.sizes.H)),
        dy_(columns(b.dy, b.dy_uniform ? 0 : d_ * b.sizes.O)) {}

  // Loads slots (or h), h_prev, c and c_prev, as far as the cell has them.
  RNNKERN_DEVICE void get_step(int64_t t, int64_t rank, int64_t unit, Step<A>* s) const {
    if constexpr (kShape.saves_slots) {
      const T* saved = row_at(s_, slots_, t, rank) + unit;
#pragma unroll
      for (int i = 0; i < kShape.stored(); ++i) s->slot[i] = value(saved[i * b_.sizes.H]);
    } else {
      s->h = value(row_at(s_, y_, t, rank)[unit]);
    }
    if constexpr (kShape.reads_h) {
      s->h_prev = value(previous_state(s_, d_, t, rank, y_, b_.h0, zeros_)[unit]);
    }
#pragma unroll
    for (int j = 0; j < kShape.planes(); ++j) {
      const int64_t column = j * b_.sizes.H + unit;
      c_of(*s, j) = value(row_at(s_, cells_, t, rank)[column]);
      c_prev_of(*s, j) = value(previous_state(s_, d_, t, rank, cells_, b_.c0, zeros_)[column]);
    }
  }

  RNNKERN_DEVICE A dy(int64_t t, int64_t rank, int64_t o) const {
    if (!dy_.data) return 0;
    return value(row_at(s_, dy_, t, rank)[b_.dy_uniform ? 0 : o]);
  }

 private:
  const Backward<T>& b_;
  const Steps& s_;
  const T* const zeros_;
  const int d_;
  const Rows<const T> y_, slots_, cells_, dy_;
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
