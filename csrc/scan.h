// The operands of one scan: one recurrent layer with all its directions, over all its steps. These
// structs are plain data without behaviour.
//
// T time, N batch, I input, H hidden, O output (H, or the projected size P), D directions, G gates,
// S numbers that the cell stores for a unit: one for each slot and for each parameter of its own
// (cells/cell.h). Strides are in elements; the last axis of every tensor is contiguous.
#pragma once

#include <cstdint>

#include "elements.h"

namespace rnnkern {

enum class CellId : int {};  // the place in the list of cells/list.h

constexpr int kMaxDirections = 2;
constexpr int kMaxParameters = 4;  // of a cell's own, one number for each unit

// Which rows are active at which step, and their order: what `lengths`, `reset` or a packed
// sequence becomes (rnnkern/sequence.py). A row's place in this order, 0..N-1, is its rank: rows
// that are active longest come first, so the active ones are always the first active[t].
struct Steps {
  int64_t T = 0, N = 0;
  int64_t total = 0;  // rows over all steps that have storage: T*N, or the packed length
  const int64_t* active = nullptr;  // [T] rows active at step t, not increasing; null: all N
  const int64_t* start = nullptr;   // [T] storage row of the first row of step t; null: not packed
  const int64_t* host_start = nullptr;  // the same where the host can read it
  const int64_t* order = nullptr;       // [N] the batch row of rank k; null: k itself
  const bool* reset = nullptr;          // [T, N] an episode begins at step t of row n; null: never
  int64_t reset_step = 0, reset_row = 0;

  constexpr bool is_packed() const { return start; }  // else padded
};

// A [T, N, F] tensor: row n of step t begins at data + t*step + n*row; in packed layout the row of
// rank k begins at data + (start[t] + k)*row.
template <typename T>
struct Rows {
  T* data = nullptr;
  int64_t step = 0, row = 0;
};

// A [D, N, F] tensor. Null data means zeros if the tensor is read, and that it is not wanted if it
// is written.
template <typename T>
struct State {
  T* data = nullptr;
  int64_t direction = 0, row = 0;
};

// The parameters of layer normalisation (cpu/normalised.h): the gains of the sums of W_ih x, of the
// sums of W_hh h and of c, and the bias of c. Those that the cell does not have are null.
template <typename T>
struct Gains {
  T* ih = nullptr;      // [G*H]
  T* hh = nullptr;      // [G*H]
  T* c = nullptr;       // [H]
  T* bias_c = nullptr;  // [H] or null
};

template <typename T>
struct Weights {
  const T* w_ih = nullptr;  // [G*H, I]
  const T* w_hh = nullptr;  // [G*H, O]
  const T* b_ih = nullptr;  // [G*H] or null
  const T* b_hh = nullptr;  // [G*H] or null
  const T* w_hr = nullptr;  // [P, H] or null: no projection
  int64_t w_ih_row = 0, w_hh_row = 0, w_hr_row = 0;
  // For F32ByI8, whose weights are integers: the factor of each row.
  const float *scale_ih = nullptr, *scale_hh = nullptr, *scale_hr = nullptr;
  const T* parameters[kMaxParameters] = {};  // [H] each, the cell's own
  Gains<const T> gains;                      // if the layer is normalised
};

// The same shapes, contiguous. A null one is not wanted.
template <typename T>
struct WeightGradients {
  T* w_ih = nullptr;
  T* w_hh = nullptr;
  T* b_ih = nullptr;
  T* b_hh = nullptr;
  T* w_hr = nullptr;
  T* parameters[kMaxParameters] = {};
  Gains<T> gains;
};

struct Sizes {
  CellId cell{};
  int64_t I = 0, H = 0, O = 0;
  int D = 1;
  bool projected = false;
  bool normalised = false;  // there are gains
};

// Computes the next input from an output: W y + b.
template <typename T>
struct Readout {
  const T* w = nullptr;  // [I, D*O], or null: there is none
  const T* b = nullptr;  // [I] or null
  int64_t row = 0;
  Rows<T> made;  // [T, N, I]
};

// Random changes of the states of a layer, from a counter (noise.h). There are none if both
// probabilities are zero.
struct Noise {
  uint64_t seed = 0;
  int layer = 0;  // its number in its stack
  // The probability that the recurrent product sees a unit in no step of a row. The other units are
  // scaled up.
  double recurrent_dropout = 0;
  double zoneout = 0;  // the probability that a state stays as it is in a step
  bool draws = true;   // zoneout draws; else each state is its expectation
};

template <typename T>
struct Forward {
  using Element = T;
  Sizes sizes;
  Steps steps;
  Rows<const T> x;                     // [T, N, I]
  State<const T> h0, c0;               // [D, N, O], [D, N, H]
  Weights<T> weights[kMaxDirections];  //
  // The weights of a frozen layer as `pack` of cpu/kernels.h has left them, in place of `weights`.
  const char* packed = nullptr;
  Rows<T> y;                        // [T, N, D*O], direction d at column d*O
  State<T> hn, cn;                  // [D, N, O], [D, N, H]
  T* slots = nullptr;               // [D, total, S*H] saved for backward, or null: inference
  T* cells = nullptr;               // [D, total, H] saved cell states, likewise
  T* candidates = nullptr;          // [D, total, H] saved c before zoneout, likewise
  T* unprojected = nullptr;         // [D, total, H] saved h before projection and zoneout
  T* normalised = nullptr;          // [D, total, F] what cpu/normalised.h saves, likewise
  State<const T> reset_h, reset_c;  // [D, N, O], [D, N, H] where an episode begins
  Noise noise;
  // A closed loop, in one direction: x of a step is what the readout computed in the step before.
  Readout<T> readout;
  // Cell states of 16 bits are carried from step to step in float. Or they are rounded in each
  // step, so that a sequence may be cut anywhere and gives the same bits.
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
  const T* slots = nullptr;  // as forward left them (null if the cell saves none)
  const T* cells = nullptr;
  const T* candidates = nullptr;
  const T* unprojected = nullptr;
  const T* normalised = nullptr;
  State<const T> reset_h, reset_c;
  Noise noise;
  Rows<const T> dy;             // [T, N, D*O] or null
  bool dy_uniform = false;      // every row of dy is one element, repeated
  State<const T> dhn, dcn;      // or null
  Rows<const T> dcells;         // [T, N, D*H] gradients of each step's c, or null
  T* dslots = nullptr;          // [D, total, S*H], may be the memory of slots
  T* dprojected = nullptr;      // [D, total, O] workspace for the CPU if there is a projection
  T* dnormalised = nullptr;     // [D, total, F] workspace if the layer is normalised
  Rows<T> dx;                   // [T, N, I] or null
  State<T> dh0, dc0;            // or null
  State<T> dreset_h, dreset_c;  // or null
  WeightGradients<T> gradients[kMaxDirections];
  bool adds = false;  // gradients of the weights are added to what their memory holds
};

// The matrices of one direction as numbers, dense. A null one is not wanted.
template <typename A>
struct Matrices {
  A* w_ih = nullptr;  // [G*H, I]
  A* w_hh = nullptr;  // [G*H, O]
  A* w_hr = nullptr;  // [P, H]
};

// The tangents of a forward pass and of a backward pass that has run: how their results change if
// their operands do. Null means zeros. Of the results of the backward pass only dslots is read.
template <typename T>
struct SecondOrder : Backward<T> {
  // Of its fields x, h0, c0, weights, dy, dhn and dcn are read. dslots is written, and first holds
  // the tangents of the activated slots. dx, dh0, dc0 and gradients are written if they are wanted.
  Backward<T> tangent;
  const T* tangent_sums = nullptr;  // [D, total, S*H] a further change of the pre-activations
  Rows<T> tangent_y;                // written
  State<T> tangent_hn, tangent_cn;
};

}  // namespace rnnkern
