// Compiled once for each instruction set (RNNKERN_NAMESPACE) and element type (RNNKERN_ELEMENT).
#include "cpu/kernels.h"

#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/second_order.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

// Runs the pass of class Scan. Its constructor lays out the workspace, which may be too small, and
// so must not write to it.
template <template <typename T, typename Cell> class Scan, typename Operands, typename... Plans>
size_t run_scan(const Operands& operands, const Plans&... plans, Workspace workspace) {
  return with_cell(operands.sizes.cell, [&](auto cell) {
    Carver carver(workspace.data);
    Scan<typename Operands::Element, decltype(cell)> scan(operands, plans..., carver);
    if (carver.used() > workspace.bytes) return carver.used();
    scan.run();
    return size_t(0);
  });
}

template <typename T>
size_t pack(const Sizes& sizes, const Weights<T>* weights, char* memory) {
  return with_cell(sizes.cell, [&](auto cell) {
    return for_frozen_directions<T, decltype(cell)>(
        sizes, weights, memory, [&](int d, const auto& of) { of.pack(weights[d], 0, 1); });
  });
}

template <typename T>
void unpack(const Sizes& sizes, const char* memory, const Matrices<Compute<T>>* to) {
  with_cell(sizes.cell, [&](auto cell) {
    for_frozen_directions<T, decltype(cell)>(sizes, nullptr, const_cast<char*>(memory),
                                             [&](int d, const auto& of) { of.unpack(to[d]); });
  });
}

template <typename T>
Kernels<T> kernels() {
  Machine machine;
  machine.lanes = kLanes<T>;
  machine.tile_rows = kRowsOfPart;
  machine.element_bytes = kPanelBytes<T>;
  machine.group = kGroup<Operand<T>>;
  machine.multiplies_in_place = kMultipliedInPlace<T>;
  machine.converts = kConverted<T>;
  machine.rounded_for_products = kRoundedForProducts<T>;
  machine.by_tiles = kByTiles<Operand<T>>;
  Kernels<T> made = {};
  made.machine = machine;
  made.frozen = run_scan<ForwardScan, Forward<T>, Plan>;
  made.pack = pack<T>;
  made.unpack = unpack<T>;
  if constexpr (!kFrozenOnly<T>) {
    made.forward = made.frozen;
    made.backward = run_scan<BackwardScan, Backward<T>, Plan>;
  }
  if constexpr (std::is_same_v<T, Compute<T>>) {
    made.second_order = run_scan<SecondOrderScan, SecondOrder<T>, Plan, Plan>;
  }
  return made;
}
template Kernels<RNNKERN_ELEMENT> kernels<RNNKERN_ELEMENT>();

#ifdef RNNKERN_AMX
// Tests, before anything depends on it, whether this CPU does what this code expects: a small
// product of integers, of two tiles and a bit in every dimension. It is a template over T only so
// that each object has a function of its own.
template <typename T>
bool tiles_multiply() {
  constexpr int kRows = 33, kDepthOfTest = 67, kDepth = int(filled<Bf16>(kDepthOfTest)),
                kVectors = 3, kColumns = kVectors * kTileHeight;
  const auto left = [](int m, int k) { return k < kDepthOfTest ? (m * 3 + k * 5) % 7 - 3 : 0; };
  const auto right = [](int k, int n) { return k < kDepthOfTest ? (k * 2 + n) % 5 - 2 : 0; };
  const auto bits = [](int number) { return uint16_t(bit_cast<uint32_t>(float(number)) >> 16); };
  Bf16 rows[kRows][kDepth];
  const Bf16* a[kRows];
  for (int m = 0; m < kRows; ++m) {
    a[m] = rows[m];
    for (int k = 0; k < kDepth; ++k) rows[m][k].bits = bits(left(m, k));
  }
  alignas(64) float panel[kVectors][kDepth / 2][kTileHeight], acc[kRows][kColumns];
  for (int n = 0; n < kColumns; ++n) {
    for (int k = 0; k < kDepth; k += 2) {
      panel[n / kTileHeight][k / 2][n % kTileHeight] =
          bit_cast<float>(uint32_t(bits(right(k, n))) | uint32_t(bits(right(k + 1, n))) << 16);
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < kColumns; ++n) acc[m][n] = float(m - n);
  }
  const TilesOfThread tiles;
  product<Bf16>(kVectors, kRows, 0, kDepthOfTest, a, panel[0][0], kColumns, acc[0], kColumns);
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < kColumns; ++n) {
      int wanted = m - n;
      for (int k = 0; k < kDepthOfTest; ++k) wanted += left(m, k) * right(k, n);
      if (acc[m][n] != float(wanted)) return false;
    }
  }
  return true;
}
template bool tiles_multiply<RNNKERN_ELEMENT>();
#endif

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
