// Rows of tensors, as vectors.
#pragma once

#include "cpu/vec.h"
#include "steps.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

// Between different types, values are converted.
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

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
