// The scans on a GPU, as in cpu/kernels.h, for operands in its memory. In a build without a CUDA
// compiler, absent.cpp takes their place.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <type_traits>

#include "scan.h"

namespace rnnkern::cuda {

// What the kernels were compiled with and for, or null in a build without them: "13.0" and "sm_80
// compute_80 sm_90a", machine code and PTX.
const char* version();
const char* architectures();
// The latest CUDA that this machine's driver knows, as "13.0"; null without a driver.
const char* driver();
// Why that driver cannot run this build, or null; null without a driver.
const char* driver_refusal();

// Why there are no kernels for tensors of that CUDA device, or null.
const char* refusal(int device);

// Whether the CUDA kernels run on the host, for tests (tests/simt).
#ifdef RNNKERN_SIMT
constexpr bool kIsStandIn = true;
#else
constexpr bool kIsStandIn = false;
#endif

// float32 that is multiplied as bfloat16 is for CPUs.
template <typename T>
constexpr bool kHasKernels = !std::is_same_v<T, F32ByBf16> && !std::is_same_v<T, F32By3Bf16>;

// Loads the kernels of a cell that Python has added, for a device. `headers` is the digest of those
// that the extension was built from. Throws std::runtime_error if the file is no library of that
// cell, element type and headers.
void load_library(const std::string& path, const std::string& mode, const std::string& element,
                  const std::string& headers, int device);

struct Call {
  int device;
  void* stream;  // a cudaStream_t
  bool tf32;     // float32 may be multiplied as TF32
  // One order of summation for every N and T, forward.
  bool deterministic;
};

// Gives scratch memory on the call's device. It is not reused before the kernels that are queued
// with it are done.
using Allocate = std::function<char*(size_t bytes)>;

// Queues the kernels on the stream and returns. Nothing waits for the host, so it may be part of a
// CUDA graph. Throws std::runtime_error, with the names of kernel and shape, if a launch is
// refused.
template <typename T>
void run(const Forward<T>& scan, const Call& call, const Allocate& allocate);
template <typename T>
void run(const Backward<T>& scan, const Call& call, const Allocate& allocate);
template <typename T>
void run(const SecondOrder<T>& scan, const Call& call,
         const Allocate& allocate);  // not of narrow T

// What run() would do if the call is recorded, for people to read.
template <typename T>
std::string describe(const Sizes& sizes, int64_t steps, int64_t rows, bool backward,
                     const Call& call);

}  // namespace rnnkern::cuda
