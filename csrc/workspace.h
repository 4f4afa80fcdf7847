// Scratch memory of one call. The same function counts the bytes (base null) and hands them out.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cells/math.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

class Carver {
 public:
  static constexpr size_t kAlignment = 64;

  explicit Carver(char* base) : base_(reinterpret_cast<uintptr_t>(base)) {}

  template <typename T>
  T* take(int64_t count) {
    T* result = reinterpret_cast<T*>(base_ + used_);  // a number, where only counting
    used_ += (size_t(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return result;
  }
  size_t used() const { return used_; }

 private:
  uintptr_t base_;
  size_t used_ = 0;
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
