// What kernels ask of the GPU. Under nvcc these are its instructions; with RNNKERN_SIMT plain C++
// of the same meaning, on the fibers of tests/simt/simt.h. Inline PTX stands in this file alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cells/math.h"

#ifdef RNNKERN_SIMT
#include <source_location>

#include "simt.h"
#define RNNKERN_DEVICE inline
// Where the caller waits: tests leave out one wait at a time.
#define RNNKERN_HERE simt::Where where = std::source_location::current()
#else
#define RNNKERN_DEVICE __device__ __forceinline__
#define RNNKERN_HERE
#endif

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

constexpr int kWarp = 32;

#ifdef RNNKERN_SIMT

RNNKERN_DEVICE int thread_index() { return int(simt::thread_in_block()); }
RNNKERN_DEVICE int block_index() { return int(simt::launch().fiber().block->index.x); }
RNNKERN_DEVICE int threads_per_block() { return int(simt::launch().block.x); }
RNNKERN_DEVICE int blocks_in_grid() { return int(simt::launch().grid.x); }

// All threads of the block are here, and see what each has written.
RNNKERN_DEVICE void sync_block(RNNKERN_HERE) {
  if (!simt::left_out(where)) simt::launch().meet(simt::launch().fiber().block->barrier);
}

RNNKERN_DEVICE char* shared_memory() { return simt::launch().fiber().block->shared.data(); }

// A flag in global memory, which grows: who sees its value sees what was written before it was set.
RNNKERN_DEVICE void wait_until(const int* flag, int least, RNNKERN_HERE) {
  while (*flag < least && !simt::left_out(where)) simt::launch().yield();
}
RNNKERN_DEVICE void set_flag(int* flag, int value) {
  *flag = value;
  simt::launch().progress();
}

// Every value of every lane becomes the sum over the lanes of the warp, halves first.
template <int kCount, typename A>
RNNKERN_DEVICE void sum_over_warp(A (&values)[kCount]) {
  simt::Warp& warp = simt::warp();
  const int lane = thread_index() % kWarp;
  warp.values[lane] = reinterpret_cast<uintptr_t>(values);
  simt::launch().meet(warp.meeting);
  A sums[kCount];
  for (int i = 0; i < kCount; ++i) {
    A lanes[kWarp];
    for (int l = 0; l < kWarp; ++l) lanes[l] = reinterpret_cast<const A*>(warp.values[l])[i];
    for (int half = kWarp / 2; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    }
    sums[i] = lanes[0];
  }
  simt::launch().meet(warp.meeting);
  for (int i = 0; i < kCount; ++i) values[i] = sums[i];
}

#else

RNNKERN_DEVICE int thread_index() { return int(threadIdx.x); }
RNNKERN_DEVICE int block_index() { return int(blockIdx.x); }
RNNKERN_DEVICE int threads_per_block() { return int(blockDim.x); }
RNNKERN_DEVICE int blocks_in_grid() { return int(gridDim.x); }

RNNKERN_DEVICE void sync_block() { __syncthreads(); }

RNNKERN_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

RNNKERN_DEVICE void wait_until(const int* flag, int least) {
  int value;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  } while (value < least);
}
RNNKERN_DEVICE void set_flag(int* flag, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

template <int kCount, typename A>
RNNKERN_DEVICE void sum_over_warp(A (&values)[kCount]) {
#pragma unroll
  for (int half = kWarp / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] += __shfl_xor_sync(~0u, values[i], half);
  }
}

#endif

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
