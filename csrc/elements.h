// The element types of tensors: the type in which an element is stored, and the type in which it is
// computed with. The 16-bit types are for storage only, and are computed with in float. cpu/gemm.h
// says how products take them.
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
// A float32 that products take as bfloat16, if the CPU multiplies those. Elsewhere there are
// kernels for frozen weights only, which are stored as bfloat16 and multiplied as float.
struct F32ByBf16 {
  float number;
};
// A float32 that products take as the sum of two bfloat16, of which they make three products. There
// are kernels for AMX only.
struct F32By3Bf16 {
  float number;
};
// An integer of 8 bits, in a row that has a scale (cpu/int8.h).
struct I8 {
  int8_t bits;
};
// A float32 that products take as an integer of 8 bits times a scale of its row. There are kernels
// for frozen weights only.
struct F32ByI8 {
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
template <>
struct ComputeOf<F32By3Bf16> {
  using Type = float;
};
template <>
struct ComputeOf<I8> {
  using Type = float;
};
template <>
struct ComputeOf<F32ByI8> {
  using Type = float;
};

// The type in which elements T are computed with and accumulated.
template <typename T>
using Compute = typename ComputeOf<T>::Type;

// Whether T is stored in fewer bits than it is computed with.
template <typename T>
constexpr bool kNarrow = sizeof(T) < sizeof(Compute<T>);

// The types of tensors in the order of AllKernels (cpu/kernels.h).
constexpr int kElementTypes = 7;
inline constexpr const char* kElementNames[kElementTypes] = {
    "float", "double", "Bf16", "F16", "F32ByBf16", "F32By3Bf16", "F32ByI8"};

template <typename T>
constexpr int place_of_element() {
  if constexpr (std::is_same_v<T, float>) return 0;
  if constexpr (std::is_same_v<T, double>) return 1;
  if constexpr (std::is_same_v<T, Bf16>) return 2;
  if constexpr (std::is_same_v<T, F16>) return 3;
  if constexpr (std::is_same_v<T, F32ByBf16>) return 4;
  if constexpr (std::is_same_v<T, F32By3Bf16>) return 5;
  if constexpr (std::is_same_v<T, F32ByI8>) return 6;
}

}  // namespace rnnkern
