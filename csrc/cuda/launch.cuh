// Launches: every kernel is a class with Arguments, kSharedBytes and run(arguments), and starts
// here, checked.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/device.cuh"

#ifndef RNNKERN_SIMT
#include <cuda_runtime.h>
#endif

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

struct Grid {
  int blocks, threads;
};

#ifdef RNNKERN_SIMT

// A new interleaving for each launch, the same ones in each process.
template <typename Kernel>
void launch(const char*, Grid grid, void*, const typename Kernel::Arguments& arguments) {
  static uint32_t seed = 0;
  simt::Launch(
      {unsigned(grid.blocks)}, {unsigned(grid.threads)}, Kernel::kSharedBytes,
      [&] { Kernel::run(arguments); }, ++seed)
      .run();
}

#else

template <typename Kernel>
__global__ void run_kernel(const __grid_constant__ typename Kernel::Arguments arguments) {
  Kernel::run(arguments);
}

// All blocks run at once, or the launch is refused: `what` names kernel and shape in the error.
template <typename Kernel>
void launch(const char* what, Grid grid, void* stream, typename Kernel::Arguments arguments) {
  void* parameters[] = {&arguments};
  const cudaError_t error = cudaLaunchCooperativeKernel(
      reinterpret_cast<const void*>(&run_kernel<Kernel>), dim3(unsigned(grid.blocks)),
      dim3(unsigned(grid.threads)), parameters, Kernel::kSharedBytes,
      static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

#endif

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
