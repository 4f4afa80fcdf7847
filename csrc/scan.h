// What one scan is: one recurrent layer, all its directions, over all its steps. Plain data, no
// behaviour.
//
// T time, N batch, I input, H hidden, O output (H, or the projected size P), D directions, G gates,
// S slots (what a cell keeps per unit: its gates, and for GRU one more). Strides are in elements;
// the last axis of every tensor is contiguous.
#pragma once

#include <cstdint>

#include "elements.h"

namespace rnnkern {

enum class CellId : int { kRnnTanh = 0, kRnnRelu = 1, kLstm = 2, kGru = 3 };
// As torch.nn calls them.
constexpr const char* kCellModes[] = {"RNN_TANH", "RNN_RELU", "LSTM", "GRU"};

constexpr int kMaxSlots = 4;
constexpr int kMaxDirections = 2;

// Of S slots the recurrent product owns the first G, the input product G from input_slot on.
struct CellShape {
  int gates, slots, input_slot;
  bool cell_state;   // c beside h
  bool saves_slots;  // backward needs the slots (else the output is enough)
  bool reads_h;      // the cell itself reads h_prev, and has dh_direct

  // Which gate (block of H rows of the weight matrix) stands in a slot of the recurrent or the
  // input product.
  constexpr int recurrent_gate(int slot) const { return (slot - input_slot + gates) % gates; }
  constexpr int input_gate(int slot) const { return slot - input_slot; }
};

constexpr CellShape kElmanShape = {1, 1, 0, false, false, false};
constexpr CellShape kLstmShape = {4, 4, 0, true, true, false};
constexpr CellShape kGruShape = {3, 4, 1, false, true, true};

constexpr CellShape cell_shape(CellId id) {
  return id == CellId::kLstm ? kLstmShape : id == CellId::kGru ? kGruShape : kElmanShape;
}

// Which rows are active at which step, and in which order they stand. The kernel works on slots
// 0..N-1 sorted so that the active ones are always the first active[t].
struct Steps {
  int64_t T = 0, N = 0;
  int64_t total = 0;  // rows over all steps that have storage: T*N, or the packed length
  const int64_t* active = nullptr;  // [T] rows active at step t, not increasing; null: all N
  const int64_t* start =
      nullptr;  // [T] packed layout: storage row of the first row of step t; null: padded layout
  const int64_t* order = nullptr;  // [N] batch row that stands in slot k; null: k itself
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

// A [D, N, F] tensor; data null stands for zeros where it is read, and for "not wanted" where it is
// written.
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

// Same shapes, contiguous; null: not wanted.
template <typename T>
struct WeightGradients {
  T* w_ih = nullptr;
  T* w_hh = nullptr;
  T* b_ih = nullptr;
  T* b_hh = nullptr;
  T* w_hr = nullptr;
};

struct Sizes {
  CellId cell = CellId::kRnnTanh;
  int64_t I = 0, H = 0, O = 0;
  int D = 1;
  bool projected = false;
};

// What makes inputs of outputs: W y + b.
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

// The derivative of forward and backward pass in a direction. Names with tangent_ are derivatives;
// null stands for zeros.
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
