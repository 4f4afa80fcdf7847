// The element types of tensors. The 16-bit ones are storage: what is computed of them is float.
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

// What is computed of elements of type T, and accumulated.
template <typename T>
using Compute = typename ComputeOf<T>::Type;

template <typename T>
constexpr bool kNarrow = !std::is_same_v<T, Compute<T>>;

}  // namespace rnnkern
