// Compiled once per instruction set; RNNKERN_NAMESPACE tells them apart.
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

extern const Kernels<float> kFloat;
extern const Kernels<double> kDouble;
extern const int kBytes, kRows;
const Kernels<float> kFloat = {run_forward<float>, run_backward<float>};
const Kernels<double> kDouble = {run_forward<double>, run_backward<double>};
const int kBytes = kVectorBytes, kRows = kTileRows;

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
