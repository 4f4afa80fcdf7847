// What a layer is, apart from the sizes of its input.
#pragma once

#include <cstring>
#include <deque>
#include <iterator>
#include <string>
#include <utility>

#include "python/torch.h"
#include "scan.h"

namespace rnnkern {

struct Layer {
  CellId cell;
  int directions;
  int64_t hidden, out;
  bool bias, projected, batch_first;

  Layer(const char* mode, int directions, int64_t hidden, int64_t proj, bool bias, bool batch_first)
      : cell(cell_of(mode)),
        directions(directions),
        hidden(hidden),
        out(proj ? proj : hidden),
        bias(bias),
        projected(proj > 0),
        batch_first(batch_first) {
    if (directions < 1 || directions > kMaxDirections) {
      throw py::value_error("a layer has 1 or 2 directions, got " + std::to_string(directions));
    }
  }

  bool operator==(const Layer&) const = default;

  int tensors() const { return 2 + 2 * bias + projected; }  // per direction
  bool has_cell_state() const { return cell_shape(cell).cell_state; }
  const char* mode() const { return kCellModes[int(cell)]; }

 private:
  static CellId cell_of(const char* mode) {
    for (int i = 0; i < int(std::size(kCellModes)); ++i) {
      if (std::strcmp(mode, kCellModes[i]) == 0) return CellId(i);
    }
    throw py::value_error("no kernel knows the cell '" + std::string(mode) + "'");
  }
};

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
