// Every cell by its id, for code that is compiled once: those of cells/list.h, and those that
// Python has added while the program runs (rnnkern/own_cells), whose ids follow.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cells/cells.h"
#include "scan.h"

namespace rnnkern {

constexpr int kMostDevices = 64;  // with libraries of cells

// A cell that is not in the list. It is never removed.
struct AddedCell {
  std::string mode;
  std::vector<std::string> gates, parameters;
  std::vector<const char*> gate_names;
  CellInfo info;
  std::array<std::atomic<const void*>, kElementTypes> kernels{};  // Kernels<T>, or null
  // By CUDA device: CellLibrary<T> of cuda/cell_library.h, or null.
  std::array<std::array<std::atomic<const void*>, kMostDevices>, kElementTypes> cuda_libraries{};
};

// Kernels read it without a lock. Python adds to it under a lock of its own.
class AddedCells {
 public:
  const AddedCell* at(CellId id) const {
    const int i = int(id) - kFirst;
    return i < 0 || i >= count_.load(std::memory_order_acquire) ? nullptr : cells_[size_t(i)].get();
  }
  AddedCell* named(std::string_view mode, CellId* id = nullptr) const {
    const int count = count_.load(std::memory_order_acquire);
    for (int i = 0; i < count; ++i) {
      if (cells_[size_t(i)]->mode != mode) continue;
      if (id) *id = CellId(kFirst + i);
      return cells_[size_t(i)].get();
    }
    return nullptr;
  }
  void add(std::string mode, std::vector<std::string> gates, std::vector<std::string> parameters,
           CellShape shape) {
    const int i = count_.load(std::memory_order_relaxed);
    if (size_t(i) == cells_.size()) {
      throw std::runtime_error("a process has at most " + std::to_string(cells_.size()) +
                               " cells of its own");
    }
    auto made = std::make_unique<AddedCell>();
    made->mode = std::move(mode);
    made->gates = std::move(gates);
    made->parameters = std::move(parameters);
    for (const std::string& name : made->gates) made->gate_names.push_back(name.c_str());
    made->info = {made->mode.c_str(), made->gate_names, shape};
    cells_[size_t(i)] = std::move(made);
    count_.store(i + 1, std::memory_order_release);
  }

 private:
  static constexpr int kFirst = int(kCellInfos.size());
  std::array<std::unique_ptr<AddedCell>, 4096> cells_;
  std::atomic<int> count_{0};
};

inline AddedCells& added_cells() {
  static auto& cells = *new AddedCells();  // outlives the interpreter
  return cells;
}

inline const CellInfo& known_cell(CellId id) {
  const AddedCell* added = added_cells().at(id);
  return added ? added->info : cell_info(id);
}
inline CellShape known_shape(CellId id) { return known_cell(id).shape; }
inline std::optional<CellId> known_id(std::string_view mode) {
  if (const std::optional<CellId> id = cell_named(mode)) return id;
  CellId id;
  return added_cells().named(mode, &id) ? std::optional(id) : std::nullopt;
}

}  // namespace rnnkern
