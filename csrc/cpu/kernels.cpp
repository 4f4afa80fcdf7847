// Compiled once per instruction set; RNNKERN_NAMESPACE tells them apart.
#include "cpu/kernels.h"

#include "cpu/backward.h"
#include "cpu/forward.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

template <typename T>
size_t run_forward(const Forward<T>& scan, const Plan& plan, char* workspace) {
  return with_cell(scan.sizes.cell, [&](auto cell) {
    Carver carver(workspace);
    ForwardScan<T, decltype(cell)> forward(scan, plan, carver);
    if (workspace) forward.run();
    return carver.used();
  });
}

template <typename T>
size_t run_backward(const Backward<T>& scan, const Plan& plan, char* workspace) {
  return with_cell(scan.sizes.cell, [&](auto cell) {
    Carver carver(workspace);
    BackwardScan<T, decltype(cell)> backward(scan, plan, carver);
    if (workspace) backward.run();
    return carver.used();
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
