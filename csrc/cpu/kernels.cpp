// Compiled once per instruction set and element type: RNNKERN_NAMESPACE and RNNKERN_ELEMENT.
#include "cpu/kernels.h"

#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/second_order.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

template <typename T>
size_t run_forward(const Forward<T>& scan, const Plan& plan, Workspace workspace) {
  return with_cell(scan.sizes.cell, [&](auto cell) {
    Carver carver(workspace.data);
    ForwardScan<T, decltype(cell)> forward(scan, plan, carver);
    if (carver.used() > workspace.bytes) return carver.used();
    forward.run();
    return size_t(0);
  });
}

template <typename T>
size_t run_backward(const Backward<T>& scan, const Plan& plan, Workspace workspace) {
  return with_cell(scan.sizes.cell, [&](auto cell) {
    Carver carver(workspace.data);
    BackwardScan<T, decltype(cell)> backward(scan, plan, carver);
    if (carver.used() > workspace.bytes) return carver.used();
    backward.run();
    return size_t(0);
  });
}

template <typename T>
size_t run_second_order(const SecondOrder<T>& scan, const Plan& up, const Plan& down,
                        Workspace workspace) {
  return with_cell(scan.sizes.cell, [&](auto cell) {
    Carver carver(workspace.data);
    SecondOrderScan<T, decltype(cell)> second(scan, up, down, carver);
    if (carver.used() > workspace.bytes) return carver.used();
    second.run();
    return size_t(0);
  });
}

template <typename T>
Kernels<T> kernels() {
  Machine machine;
  machine.lanes = kLanes<T>;
  machine.tile_rows = kRowsOfPart;
  machine.element_bytes = sizeof(Operand<T>);
  machine.group = kGroup<Operand<T>>;
  machine.multiplies_in_place = kMultipliedInPlace<T>;
  machine.rounded_for_products = kRoundedForProducts<T>;
  Kernels<T> made = {run_forward<T>, run_backward<T>, nullptr, machine};
  if constexpr (std::is_same_v<T, Compute<T>>) made.second_order = run_second_order<T>;
  return made;
}
template Kernels<RNNKERN_ELEMENT> kernels<RNNKERN_ELEMENT>();

#ifdef RNNKERN_AMX
// A small product of integers, of two tiles and a bit in every direction: whether this CPU does as
// this code believes, before anything depends on it. Of T only to have one name in each object.
template <typename T>
bool tiles_multiply() {
  constexpr int kRows = 33, kDepthOfTest = 67, kPairs = (kDepthOfTest + 1) / 2, kColumns = 48;
  const auto left = [](int m, int k) { return (m * 3 + k * 5) % 7 - 3; };
  const auto right = [](int k, int n) { return k < kDepthOfTest ? (k * 2 + n) % 5 - 2 : 0; };
  const auto bits = [](int number) { return uint16_t(bit_cast<uint32_t>(float(number)) >> 16); };
  Bf16 rows[kRows][kDepthOfTest];
  const Bf16* a[kRows];
  for (int m = 0; m < kRows; ++m) {
    a[m] = rows[m];
    for (int k = 0; k < kDepthOfTest; ++k) rows[m][k].bits = bits(left(m, k));
  }
  alignas(64) float panel[kPairs][kColumns], acc[kRows][kColumns];
  for (int k = 0; k < kPairs; ++k) {
    for (int n = 0; n < kColumns; ++n) {
      panel[k][n] = bit_cast<float>(uint32_t(bits(right(2 * k, n))) |
                                    uint32_t(bits(right(2 * k + 1, n))) << 16);
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < kColumns; ++n) acc[m][n] = float(m - n);
  }
  product<Bf16>(kColumns / kLanes<Bf16>, kRows, 0, kDepthOfTest, a, panel[0], kColumns, acc[0],
                kColumns);
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
