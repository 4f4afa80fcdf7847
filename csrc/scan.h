// What one scan is: one recurrent layer, all its directions, over all its steps. This is plain data
// without behaviour.
//
// T time, N batch, I input, H hidden, O output (H, or the projected size P), D directions, G gates,
// S slots (cells/cell.h). Strides are in elements; the last axis of every tensor is contiguous.
#pragma once

#include <cstdint>

#include "elements.h"

namespace rnnkern {

enum class CellId : int {};  // the place in the list of cells/list.h

constexpr int kMaxDirections = 2;

// Which rows are active at which step, and their order. The kernel works on slots 0..N-1, sorted so
// that the active ones are always the first active[t].
struct Steps {
  int64_t T = 0, N = 0;
  int64_t total = 0;  // rows over all steps that have storage: T*N, or the packed length
  const int64_t* active = nullptr;  // [T] rows active at step t, not increasing; null: all N
  const int64_t* start =
      nullptr;  // [T] packed layout: storage row of the first row of step t; null: padded layout
  const int64_t* order = nullptr;  // [N] the batch row of slot k; null: k itself
  const bool* reset = nullptr;     // [T, N] an episode begins at step t of row n; null: never
  int64_t reset_step = 0, reset_row = 0;
};

// A [T, N, F] tensor: row n of step t begins at data + t*step + n*row; in packed layout at data +
// (start[t] + k)*row.
template <typename T>
struct Rows {
  T* data = nullptr;
  int64_t step = 0, row = 0;
};

// A [D, N, F] tensor. If data is null, then it is zeros to read, and not wanted to write.
template <typename T>
struct State {
  T* data = nullptr;
  int64_t direction = 0, row = 0;
};

template <typename T>
struct Weights {
  const T* w_ih = nullptr;  // [G*H, I]
  const T* w_hh = nullptr;  // [G*H, O]
  const T* b_ih = nullptr;  // [G*H] or null
  const T* b_hh = nullptr;  // [G*H] or null
  const T* w_hr = nullptr;  // [P, H] or null: no projection
  int64_t w_ih_row = 0, w_hh_row = 0, w_hr_row = 0;
};

// The same shapes, contiguous. A null one is not wanted.
template <typename T>
struct WeightGradients {
  T* w_ih = nullptr;
  T* w_hh = nullptr;
  T* b_ih = nullptr;
  T* b_hh = nullptr;
  T* w_hr = nullptr;
};

struct Sizes {
  CellId cell{};
  int64_t I = 0, H = 0, O = 0;
  int D = 1;
  bool projected = false;
};

// Makes the next input from an output: W y + b.
template <typename T>
struct Readout {
  const T* w = nullptr;  // [I, D*O], or null: there is none
  const T* b = nullptr;  // [I] or null
  int64_t row = 0;
  Rows<T> made;  // [T, N, I]
};

template <typename T>
struct Forward {
  using Element = T;
  Sizes sizes;
  Steps steps;
  Rows<const T> x;                     // [T, N, I]
  State<const T> h0, c0;               // [D, N, O], [D, N, H]
  Weights<T> weights[kMaxDirections];  //
  Rows<T> y;                           // [T, N, D*O], direction d at column d*O
  State<T> hn, cn;                     // [D, N, O], [D, N, H]
  T* slots = nullptr;                  // [D, total, S*H] saved for backward, or null: inference
  T* cells = nullptr;                  // [D, total, H] saved cell states, likewise
  T* unprojected = nullptr;            // [D, total, H] saved h before the projection, likewise
  // A closed loop, of one direction: x of a step is what the readout made of the step before.
  Readout<T> readout;
  // Cell states of 16 bits are carried from step to step in float; or rounded in each step, so that
  // a sequence may be cut anywhere and gives the same bits.
  bool rounds_cells = false;
};

template <typename T>
struct Backward {
  using Element = T;
  Sizes sizes;
  Steps steps;
  Rows<const T> x;
  State<const T> h0, c0;
  Weights<T> weights[kMaxDirections];
  Rows<const T> y;
  const T* slots = nullptr;  // as forward left them (null where the cell saves none)
  const T* cells = nullptr;
  const T* unprojected = nullptr;
  Rows<const T> dy;         // [T, N, D*O] or null
  bool dy_uniform = false;  // every row of dy is one element, repeated
  State<const T> dhn, dcn;  // or null
  T* dslots = nullptr;      // [D, total, S*H], may be the memory of slots
  T* dprojected = nullptr;  // [D, total, O] workspace where there is a projection
  Rows<T> dx;               // [T, N, I] or null
  State<T> dh0, dc0;        // or null
  WeightGradients<T> gradients[kMaxDirections];
  bool adds = false;  // those of the weights to what is there
};

// The derivative of forward and backward pass in a direction. Names with tangent_ are derivatives.
// Null means zeros.
template <typename T>
struct SecondOrder {
  using Element = T;
  Sizes sizes;
  Steps steps;
  // The point: operands and outputs, what forward and backward have left.
  Rows<const T> x;
  State<const T> h0, c0;
  Weights<T> weights[kMaxDirections];
  Rows<const T> y;
  const T *slots = nullptr, *cells = nullptr, *unprojected = nullptr;
  const T* dslots = nullptr;
  Rows<const T> dy;
  State<const T> dhn, dcn;
  // The direction.
  Rows<const T> tangent_x;
  State<const T> tangent_h0, tangent_c0;
  Weights<T> tangent_weights[kMaxDirections];
  const T* tangent_sums = nullptr;  // [D, total, S*H] of the slots before their activation
  Rows<const T> tangent_dy;
  State<const T> tangent_dhn, tangent_dcn;
  // Results.
  Rows<T> tangent_y;
  State<T> tangent_hn, tangent_cn;
  T* tangent_dslots = nullptr;  // [D, total, S*H], of the activated slots meanwhile
  Rows<T> tangent_dx;           // or null, as all that follows
  State<T> tangent_dh0, tangent_dc0;
  WeightGradients<T> tangent_gradients[kMaxDirections];
};

}  // namespace rnnkern
