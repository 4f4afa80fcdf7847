// The element types of tensors: what is stored, and what is computed of it. The 16-bit ones are
// storage: what is computed of them is float. What products take them as is said in cpu/gemm.h.
#pragma once

#include <cstdint>
#include <type_traits>

namespace rnnkern {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
// A float32 that products take as bfloat16. There are kernels for it only where the CPU multiplies
// those.
struct F32ByBf16 {
  float number;
};

template <typename T>
struct ComputeOf {
  using Type = T;
};
template <>
struct ComputeOf<Bf16> {
  using Type = float;
};
template <>
struct ComputeOf<F16> {
  using Type = float;
};
template <>
struct ComputeOf<F32ByBf16> {
  using Type = float;
};

// What is computed of elements of type T, and accumulated.
template <typename T>
using Compute = typename ComputeOf<T>::Type;

// Stored in less than it is computed in.
template <typename T>
constexpr bool kNarrow = sizeof(T) < sizeof(Compute<T>);

}  // namespace rnnkern
