// Scratch memory of one call.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cells/math.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

// Hands out parts of a workspace. With a null base it only counts the bytes, so that the same code
// says how much is needed and takes it.
class Carver {
 public:
  static constexpr size_t kAlignment = 64;

  explicit Carver(char* base) : base_(reinterpret_cast<uintptr_t>(base)) {}

  template <typename T>
  T* take(int64_t count) {
    T* result = reinterpret_cast<T*>(base_ + used_);  // only a number while it counts
    used_ += (size_t(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return result;
  }
  size_t used() const { return used_; }

 private:
  uintptr_t base_;
  size_t used_ = 0;
};

// The same amount of memory for each thread: what lay_out(carver) takes.
class PerThread {
 public:
  PerThread() = default;
  template <typename Layout>
  PerThread(int threads, Carver& carver, Layout lay_out) {
    Carver count(nullptr);
    lay_out(count);
    bytes_ = int64_t(count.used());
    data_ = carver.take<char>(threads * bytes_);
  }
  Carver of(int thread) const { return Carver(data_ + thread * bytes_); }

 private:
  char* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
