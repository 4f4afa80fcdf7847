// Finds the code that was compiled for the cell and the element type of a scan, and starts it.
#include <string>

#include "cuda/cell_libraries.h"
#include "cuda/start.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {
namespace {

// Does what `start` does, for a Queue that it makes of the attempt, and gives the bytes of the
// Queue.
template <typename Scan>
bool start_any(const Scan& scan, const cuda::Attempt& attempt, size_t* bytes) {
  const CellId id = scan.sizes.cell;
  if (cuda::is_in_library(id)) return cuda::start_in_library(scan, attempt, bytes);
  Queue queue(attempt);
  const bool started = with_cell(id, [&](auto cell) { return start<decltype(cell)>(scan, queue); });
  *bytes = queue.bytes();
  return started;
}

template <typename Scan>
std::string name_of(const Scan& scan) {
  const Sizes& z = scan.sizes;
  return std::string(cuda::mode_of(z.cell)) + " (T=" + std::to_string(scan.steps.T) +
         " N=" + std::to_string(scan.steps.N) + " I=" + std::to_string(z.I) +
         " H=" + std::to_string(z.H) + ")";
}

// A call is laid out twice, first without memory. If the process has only a share of the device
// (MPS), fewer blocks run at once than the device's properties say. Then a smaller plan is tried,
// and in the end one whose blocks need not run at once.
template <typename Scan>
void run_any(const Scan& scan, const cuda::Call& call, const cuda::Allocate& allocate) {
  const cuda::Current current(call.device);
  cuda::Device device = cuda::device(call.device);
  const std::string name = name_of(scan);
  for (bool started = false; !started; device.blocks_at_once /= 2) {
    size_t bytes = 0;
    start_any(scan, {&call, &device, nullptr, ""}, &bytes);
    started = start_any(scan, {&call, &device, allocate(bytes), name.c_str()}, &bytes);
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
void run(const SecondOrder<T>& scan, const Call& call, const Allocate& allocate) {
  run_any(scan, call, allocate);
}

template <typename T>
std::string describe(const Sizes& sizes, int64_t steps, int64_t rows, bool backward,
                     const Call& call) {
  const Device& on = device(call.device);
  const Problem problem = {.sizes = sizes,
                           .T = steps,
                           .N = rows,
                           .numbers = numbers_of<T>(call.tf32),
                           .backward = backward,
                           .deterministic = call.deterministic,
                           .has_library = has_library(),
                           .inputs_are_saved = kSavesInputs<T>};
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
template void run(const SecondOrder<float>&, const Call&, const Allocate&);
template void run(const SecondOrder<double>&, const Call&, const Allocate&);

}  // namespace cuda
}  // namespace rnnkern
