// From a scan to the source that was compiled for its cell and its element type.
#include <string>

#include "cuda/start.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {
namespace {

template <typename Scan>
bool start_any(const Scan& scan, Queue& queue) {
  return with_cell(scan.sizes.cell, [&](auto cell) { return start<decltype(cell)>(scan, queue); });
}

template <typename Scan>
std::string name_of(const Scan& scan) {
  const Sizes& z = scan.sizes;
  return std::string(cell_info(z.cell).mode) + " (T=" + std::to_string(scan.steps.T) +
         " N=" + std::to_string(scan.steps.N) + " I=" + std::to_string(z.I) +
         " H=" + std::to_string(z.H) + ")";
}

// Laid out twice, first without memory. Where the process has only a share of the device (MPS),
// fewer blocks run at once than its properties say: then a smaller plan, and at last one whose
// blocks need not run at once.
template <typename Scan>
void run_any(const Scan& scan, const cuda::Call& call, const cuda::Allocate& allocate) {
  const cuda::Current current(call.device);
  cuda::Device device = cuda::device(call.device);
  for (bool started = false; !started; device.blocks_at_once /= 2) {
    Queue counts(call, device, nullptr, "");
    start_any(scan, counts);
    Queue runs(call, device, allocate(counts.bytes()), name_of(scan));
    started = start_any(scan, runs);
  }
}

}  // namespace
}  // namespace RNNKERN_NAMESPACE

namespace cuda {

using namespace RNNKERN_NAMESPACE;

template <typename T>
void run(const Forward<T>& scan, const Call& call, const Allocate& allocate) {
  run_any(scan, call, allocate);
}
template <typename T>
void run(const Backward<T>& scan, const Call& call, const Allocate& allocate) {
  run_any(scan, call, allocate);
}

template <typename T>
std::string describe(const Sizes& sizes, int64_t steps, int64_t rows, bool backward,
                     const Call& call) {
  const Device& on = device(call.device);
  const Problem problem = {
      sizes, steps, rows, numbers_of<T>(call.tf32), backward, call.deterministic, has_library()};
  return describe(plan_for(problem, on), problem, on);
}

#define RNNKERN_INSTANTIATE(T)                                         \
  template void run(const Forward<T>&, const Call&, const Allocate&);  \
  template void run(const Backward<T>&, const Call&, const Allocate&); \
  template std::string describe<T>(const Sizes&, int64_t, int64_t, bool, const Call&);
RNNKERN_INSTANTIATE(float)
RNNKERN_INSTANTIATE(double)
RNNKERN_INSTANTIATE(Bf16)
RNNKERN_INSTANTIATE(F16)
#undef RNNKERN_INSTANTIATE

}  // namespace cuda
}  // namespace rnnkern
