// The scans on a GPU: as in cpu/kernels.h, for operands in its memory.
#pragma once

#include <cstddef>

#include "scan.h"

namespace rnnkern::cuda {

// What the plan must know of a GPU.
struct Device {
  int multiprocessors = 1;
  int blocks_per_multiprocessor = 1;  // of a plain kernel, at once
};

// Scratch memory in bytes; its first zero_bytes have to be zero at the start.
struct Workspace {
  size_t bytes = 0, zero_bytes = 0;
};

template <typename T>
Workspace forward_workspace(const Forward<T>& scan, const Device& device);
template <typename T>
Workspace backward_workspace(const Backward<T>& scan, const Device& device);

// Starts the kernels on the stream (a cudaStream_t) and returns. Throws std::runtime_error, naming
// kernel and shape, where a launch is refused.
template <typename T>
void forward(const Forward<T>& scan, const Device& device, char* workspace, void* stream);
template <typename T>
void backward(const Backward<T>& scan, const Device& device, char* workspace, void* stream);

}  // namespace rnnkern::cuda
