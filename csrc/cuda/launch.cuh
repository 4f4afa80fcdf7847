// Launches kernels and checks for errors. Every kernel is a class with Arguments, run(arguments),
// and kBlocksWait, which says whether its blocks wait for each other.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/queue.h"

#ifndef RNNKERN_SIMT
#include <cuda_runtime.h>
#endif

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
};

#ifdef RNNKERN_SIMT

// Each launch has another interleaving, and all processes have the same ones.
template <typename Kernel>
bool launch(const Queue& queue, const char* kernel, Grid grid,
            const typename Kernel::Arguments& arguments) {
  if (Kernel::kBlocksWait && grid.blocks > simt::most_blocks()) return false;
  static uint32_t seed = 0;
  const bool fails = simt::fails(kernel);
  const auto run = [=, name = queue.name_of(kernel), seed = ++seed] {
    try {
      if (fails) throw std::runtime_error("as a test wants it");
      simt::Launch({unsigned(grid.blocks)}, {unsigned(grid.threads)}, size_t(grid.shared_bytes),
                   simt::body_of<Kernel>(arguments), seed)
          .run();
    } catch (const std::exception& error) {
      throw std::runtime_error(name + ": " + error.what());
    }
  };
  simt::streams().add(queue.stream(), run);
  return true;
}

#else

inline void check(cudaError_t error, const Queue& queue, const char* kernel) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, so that later calls do not report it
  throw std::runtime_error(
      cuda::with_who_gave_up(queue.name_of(kernel) + ": " + cudaGetErrorString(error)));
}

// A block that waits for others has all registers of a multiprocessor. Of other blocks, a
// multiprocessor has two at once, because one goes on while the other waits for memory.
template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kMostThreads, Kernel::kBlocksWait ? 1 : 2)
    run_kernel(const __grid_constant__ typename Kernel::Arguments arguments) {
  Kernel::run(arguments);
}

// Returns false if the blocks wait for each other and the device does not run that many at once.
// Nothing has been started then. Errors name kernel and shape.
//
// A kernel that needs much shared memory is allowed all that there is, at each launch. So threads
// that launch it with other sizes at the same time set the same value.
template <typename Kernel>
bool launch(const Queue& queue, const char* kernel, Grid grid,
            const typename Kernel::Arguments& arguments) {
  constexpr int64_t kSharedWithoutAsking = 48 << 10;
  if (grid.shared_bytes > kSharedWithoutAsking) {
    check(cudaFuncSetAttribute(run_kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(queue.device.shared_bytes)),
          queue, kernel);
  }
  if (Kernel::kBlocksWait) {
    // This is asked before the launch, because a capture refuses only when its graph is
    // instantiated.
    int at_once = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&at_once, run_kernel<Kernel>, grid.threads,
                                                        size_t(grid.shared_bytes)),
          queue, kernel);
    if (int64_t(at_once) * queue.device.multiprocessors < grid.blocks) return false;
  }
  cudaLaunchAttribute cooperative;
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(grid.blocks));
  config.blockDim = dim3(unsigned(grid.threads));
  config.dynamicSmemBytes = size_t(grid.shared_bytes);
  config.stream = static_cast<cudaStream_t>(queue.stream());
  config.attrs = &cooperative;
  config.numAttrs = Kernel::kBlocksWait;
  const cudaError_t error = cudaLaunchKernelEx(&config, run_kernel<Kernel>, arguments);
  if (error == cudaErrorCooperativeLaunchTooLarge) {
    cudaGetLastError();
    return false;
  }
  check(error, queue, kernel);
  return true;
}

#endif

// Returns false if the kernel's blocks wait for each other and the device does not run that many at
// once. An empty grid does nothing.
template <typename Kernel>
bool start_kernel(const Queue& queue, const char* kernel, Grid grid,
                  const typename Kernel::Arguments& arguments) {
  return !queue.runs() || grid.blocks == 0 || launch<Kernel>(queue, kernel, grid, arguments);
}

// Calls f with an operand of the type that products take: Tf32 for float32 if that is allowed, else
// the element type.
template <typename T, typename F>
auto with_operand(const Queue& queue, F f) {
  if constexpr (std::is_same_v<T, float>) {
    if (queue.tf32()) return f(Tf32{});
  }
  return f(T{});
}

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
