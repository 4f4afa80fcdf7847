// What a layer is, apart from the sizes of its input.
#pragma once

#include <deque>
#include <utility>

#include "cells/cells.h"
#include "python/torch.h"

namespace rnnkern {

struct Layer {
  CellId cell;
  int directions;
  int64_t hidden, out;
  bool bias, projected, batch_first;
  bool by_bfloat16;  // float32 is multiplied as bfloat16 where worth_bfloat16 (plan.h) says so; on
                     // a GPU as TF32
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

  int tensors() const { return 2 + 2 * bias + projected; }  // per direction
  bool has_cell_state() const { return cell_shape(cell).cell_state; }
  const char* mode() const { return cell_info(cell).mode; }
};

// Whether float32 may be multiplied as TF32, on a GPU.
inline bool tf32_for(const Layer& layer) {
  return layer.by_bfloat16 || is_tf32_allowed(layer.is_cell);
}

// The Python object of a layer: equal layers share one while it is among the last ones made.
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
