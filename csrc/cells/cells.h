// Finds a cell by its place in the list, and describes each cell without its arithmetic.
#pragma once

#include <array>
#include <optional>
#include <span>
#include <string_view>

#include "cells/list.h"
#include "scan.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

template <typename F, typename First, typename... Rest>
auto with_cell(CellList<First, Rest...>, CellId id, F f) {
  if constexpr (sizeof...(Rest) > 0) {
    if (id != CellId(0)) return with_cell(CellList<Rest...>(), CellId(int(id) - 1), f);
  }
  return f(First());
}
// Calls f with the cell of that id as a value, and returns what it returns.
template <typename F>
auto with_cell(CellId id, F f) {
  return with_cell(Cells(), id, f);
}

struct CellInfo {
  const char* mode;
  std::span<const char* const> gate_names;
  CellShape shape;
};
template <typename... Cell>
constexpr auto infos_of(CellList<Cell...>) {
  return std::array{CellInfo{Cell::kMode, Cell::kGateNames, Cell::kShape}...};
}
// In the order of CellId.
inline constexpr auto kCellInfos = infos_of(Cells());

constexpr const CellInfo& cell_info(CellId id) { return kCellInfos[size_t(id)]; }
constexpr CellShape cell_shape(CellId id) { return cell_info(id).shape; }
constexpr std::optional<CellId> cell_named(std::string_view mode) {
  for (size_t i = 0; i < kCellInfos.size(); ++i) {
    if (mode == kCellInfos[i].mode) return CellId(i);
  }
  return std::nullopt;
}

}  // namespace RNNKERN_NAMESPACE

// For code that is compiled once.
using RNNKERN_NAMESPACE::CellInfo, RNNKERN_NAMESPACE::cell_info, RNNKERN_NAMESPACE::cell_named,
    RNNKERN_NAMESPACE::cell_shape, RNNKERN_NAMESPACE::kCellInfos;

}  // namespace rnnkern
