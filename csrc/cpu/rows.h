// Rows of tensors, as vectors.
#pragma once

#include "cpu/vec.h"
#include "steps.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

// Values are converted if the types differ.
template <typename To, typename From>
RNNKERN_INLINE void copy_row(To* to, const From* from, int64_t begin, int64_t end) {
  if constexpr (std::is_same_v<To, From>) {
    for (int64_t i = begin; i < end; ++i) to[i] = from[i];
  } else {
    static_assert(std::is_same_v<Compute<To>, Compute<From>>, "one type is computed with");
    for (int64_t i = begin; i < end; i += kLanes<To>) {
      store_up_to(to + i, load_up_to(from + i, end - i), end - i);
    }
  }
}

template <typename T>
RNNKERN_INLINE void zero_row(T* to, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) to[i] = T{};
}

template <typename To, typename From>
RNNKERN_INLINE void copy_row(To* to, const From* from, Range own) {
  copy_row(to, from, own.begin, own.end);
}
template <typename T>
RNNKERN_INLINE void zero_row(T* to, Range own) {
  zero_row(to, own.begin, own.end);
}

template <typename To, typename From>
RNNKERN_INLINE void add_row(To* to, const From* from, Range own) {
  for (int64_t i = own.begin; i < own.end; i += kLanes<To>) {
    const int64_t n = own.end - i;
    store_up_to(to + i, load_up_to(to + i, n) + load_up_to(from + i, n), n);
  }
}

// Null is zeros to read, and not wanted to write.
template <typename To, typename From>
__attribute__((noinline)) void copy_or_zero_row(To* to, const From* from, Range own) {
  if (from) {
    copy_row(to, from, own);
  } else {
    zero_row(to, own);
  }
}
template <typename To, typename From>
__attribute__((noinline)) void copy_row_if_wanted(To* to, const From* from, Range own) {
  if (to) copy_row(to, from, own);
}

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
