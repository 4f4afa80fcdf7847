// What a layer is, apart from the sizes of its input.
#pragma once

#include <deque>
#include <utility>

#include "known_cells.h"
#include "python/torch.h"

namespace rnnkern {

// A layer as the kernels know it. Python has it as rnnkern.kernels.Kernel; rnnkern.layer.Layer is
// the same without H and O.
struct Layer {
  CellId cell;
  int directions;
  int64_t hidden, out;
  bool bias, projected, batch_first;
  bool by_bfloat16;  // float32 is multiplied as bfloat16 if worth_bfloat16 (plan.h) says so; on a
                     // GPU as TF32
  bool is_cell;      // one step of torch.nn.RNNCell, LSTMCell or GRUCell

  Layer(CellId cell, int directions, int64_t hidden, int64_t proj, bool bias, bool batch_first,
        bool by_bfloat16, bool is_cell)
      : cell(cell),
        directions(directions),
        hidden(hidden),
        out(proj ? proj : hidden),
        bias(bias),
        projected(proj > 0),
        batch_first(batch_first),
        by_bfloat16(by_bfloat16),
        is_cell(is_cell) {}

  bool operator==(const Layer&) const = default;

  // The number of weights of one direction.
  int tensors() const {
    const CellShape shape = known_shape(cell);
    return (1 + shape.recurrent) * (1 + bias) + projected + shape.parameters;
  }
  bool has_cell_state() const { return known_shape(cell).cell_state; }
  // The number of features of c.
  int64_t cell_width() const { return known_shape(cell).planes() * hidden; }
  const char* mode() const { return known_cell(cell).mode; }
};

// Calls f(name, &field, its size) for the gains of one direction of a normalised layer, in the
// order in which Python lists them.
template <typename T, typename F>
void for_gains(const Layer& layer, Gains<T>* gains, F f) {
  const CellShape shape = known_shape(layer.cell);
  const int64_t sums = shape.gates * layer.hidden;
  f("gain_ih", &gains->ih, sums);
  if (shape.recurrent) f("gain_hh", &gains->hh, sums);
  if (shape.normalises_c) f("gain_c", &gains->c, layer.hidden);
  if (shape.normalises_c && layer.bias) f("bias_c", &gains->bias_c, layer.hidden);
}
inline int gains_of(const Layer& layer) {
  int count = 0;
  Gains<char> none;
  for_gains(layer, &none, [&](const char*, char**, int64_t) { ++count; });
  return count;
}

// Whether float32 may be multiplied as TF32, on a GPU.
inline bool tf32_for(const Layer& layer) {
  return layer.by_bfloat16 || is_tf32_allowed(layer.is_cell);
}

// The Python object of a layer. Equal layers share one, as long as it is among the last kKept.
inline py::object object_of(const Layer& layer) {
  constexpr size_t kKept = 64;
  static auto& kept = *new std::deque<std::pair<Layer, py::object>>();  // outlives the interpreter
  for (const auto& [other, object] : kept) {
    if (other == layer) return object;
  }
  if (kept.size() == kKept) kept.pop_back();
  return kept.emplace_front(layer, py::cast(layer)).second;
}

}  // namespace rnnkern
