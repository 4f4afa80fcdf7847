// What smoke.cu needs of a GPU: memory, a timer and cuBLAS. With RNNKERN_SIMT memory and timer are
// those of the host, and the device is that of the stand-in.
#pragma once

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "cuda/device.h"
#include "cuda/plan.h"

#ifdef RNNKERN_SIMT

#include "device.h"

namespace smoke {

constexpr size_t kAlignment = 256;

class Memory {
 public:
  explicit Memory(size_t bytes)
      : bytes_((bytes + kAlignment) / kAlignment * kAlignment),
        data_(static_cast<char*>(std::aligned_alloc(kAlignment, bytes_)), &std::free) {}
  char* data() const { return data_.get(); }
  size_t bytes() const { return bytes_; }
  void fill(int byte) const { std::memset(data(), byte, bytes_); }
  void write(const void* from, size_t bytes) const { std::memcpy(data(), from, bytes); }
  void read(void* to, size_t bytes) const {
    simt::streams().finish();
    std::memcpy(to, data(), bytes);
  }

 private:
  size_t bytes_;
  std::unique_ptr<char, decltype(&std::free)> data_;
};

class Stopwatch {
 public:
  double us() const {
    simt::streams().finish();
    return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start_)
        .count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

inline void wait() { simt::streams().finish(); }
inline void load_cublas() {}

}  // namespace smoke

#else

#include <cuda_runtime_api.h>
#include <dlfcn.h>

namespace smoke {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(rnnkern::cuda::with_who_gave_up(
      std::string(what) + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error)));
}

class Memory {
 public:
  explicit Memory(size_t bytes) : bytes_(bytes) {
    check(cudaMalloc(&data_, bytes + (bytes == 0)), "cudaMalloc");
  }
  ~Memory() { cudaFree(data_); }  // after an error it fails too
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  char* data() const { return static_cast<char*>(data_); }
  size_t bytes() const { return bytes_; }
  void fill(int byte) const { check(cudaMemset(data_, byte, bytes_), "cudaMemset"); }
  void write(const void* from, size_t bytes) const {
    check(cudaMemcpy(data_, from, bytes, cudaMemcpyHostToDevice), "copying to the GPU");
  }
  void read(void* to, size_t bytes) const {
    check(cudaMemcpy(to, data_, bytes, cudaMemcpyDeviceToHost), "copying from the GPU");
  }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

// By CUDA events.
class Stopwatch {
 public:
  Stopwatch() {
    check(cudaEventCreate(&start_), "cudaEventCreate");
    check(cudaEventCreate(&stop_), "cudaEventCreate");
    check(cudaEventRecord(start_), "cudaEventRecord");
  }
  ~Stopwatch() {
    cudaEventDestroy(start_);
    cudaEventDestroy(stop_);
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;
  double us() const {
    check(cudaEventRecord(stop_), "cudaEventRecord");
    check(cudaEventSynchronize(stop_), "waiting for the kernels");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, start_, stop_), "cudaEventElapsedTime");
    return 1e3 * double(ms);
  }

 private:
  cudaEvent_t start_ = nullptr, stop_ = nullptr;
};

inline void wait() { check(cudaDeviceSynchronize(), "waiting for the kernels"); }

// If cuBLAS is found, the kernels use it for products over the whole sequence, as in a process with
// torch.
inline void load_cublas() {
  if (!dlopen("libcublas.so.13", RTLD_NOW | RTLD_GLOBAL)) dlopen("libcublas.so.12", RTLD_NOW);
}

}  // namespace smoke

#endif
