// Compiled once per instruction set and element type: RNNKERN_NAMESPACE and RNNKERN_ELEMENT.
#include "cpu/kernels.h"

#include "cpu/backward.h"
#include "cpu/forward.h"

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
Kernels<T> kernels() {
  return {run_forward<T>, run_backward<T>,         kLanes<T>,
          kRowsOfPart,    int(sizeof(Operand<T>)), kGroup<Operand<T>>};
}
template Kernels<RNNKERN_ELEMENT> kernels<RNNKERN_ELEMENT>();

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
