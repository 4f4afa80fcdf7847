// The element types of tensors: what is stored, what is computed of it, and what products take it
// as. The 16-bit ones are storage: what is computed of them is float.
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
// A float32 that products take as bfloat16. Known only to code for CPUs that multiply those.
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
