// Runs a scan on the device of its operands.
#pragma once

#include <optional>

#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "plan.h"
#include "python/operands.h"

namespace rnnkern {

// Lets other Python threads run during the scan if it takes longer than switching to them, which is
// about 4 us.
template <typename Run>
void with_interpreter_released(const Sizes& sizes, const Steps& steps, Run run) {
  constexpr double kFlopsOfOneStep = 4e3;  // what the shortest step costs, in products
  constexpr double kFlopsOfSwitch = 200e3;
  const double work = sizes.D * double(steps.total) * (flops_per_row(sizes) + kFlopsOfOneStep);
  std::optional<py::gil_scoped_release> release;
  if (work > kFlopsOfSwitch) release.emplace();
  run();
}

// On the CPU the scan has run when this returns. On a GPU it is queued on torch's current stream.
// Its scratch memory comes from torch's allocator, which does not reuse it before the kernels of
// that stream are done.
template <typename T, typename Scan>
void run_on_device(const Operands<T>& operands, const Scan& scan) {
  const dlpack::Device device = operands.device();
  if (device.type == dlpack::kCpu) {
    const int threads = num_threads();
    with_interpreter_released(scan.sizes, scan.steps,
                              [&] { run(scan, threads, operands.deterministic); });
    return;
  }
  if constexpr (cuda::kHasKernels<T>) {
    const cuda::Call call = {device.id, current_stream(device), tf32_for(operands.layer()),
                             operands.deterministic};
    py::object kept;
    const cuda::Allocate allocate = [&](size_t bytes) {
      const py::gil_scoped_acquire acquired;
      T* memory = nullptr;
      kept = operands.make(dense({int64_t((bytes + sizeof(T) - 1) / sizeof(T))}), &memory);
      return reinterpret_cast<char*>(memory);
    };
    // The interpreter is always released, because a launch may wait: for cuBLAS' lock, or for room
    // in the device's queue.
    const py::gil_scoped_release release;
    cuda::run(scan, call, allocate);
  }
}

}  // namespace rnnkern
