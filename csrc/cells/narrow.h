// bfloat16 and float16 as bits, to float and back, for one value or a SIMD vector of them: rounded
// to the nearest, ties to even; NaN stays NaN; what is too large becomes infinite. Denormal numbers
// of float16 are kept although float's own are flushed, because they are normal numbers in float.
#pragma once

#include "cells/math.h"
#include "elements.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

// The bits of a float, or of a vector V of them, as unsigned numbers.
template <typename V>
struct UnsignedBits {
  typedef uint32_t Type __attribute__((vector_size(sizeof(V))));
};
template <>
struct UnsignedBits<float> {
  using Type = uint32_t;
};

// `bits` are the 16 bits in the lower half of each value.
template <typename V, typename Bits>
RNNKERN_INLINE V widen(Bf16, Bits bits) {
  return bit_cast<V>(bits << 16);
}

template <typename V, typename Bits>
RNNKERN_INLINE V widen(F16, Bits bits) {
  constexpr uint32_t kOne = 1u << 23;          // of the exponent
  constexpr uint32_t kExponent = 0x1fu << 23;  // all of a float16, where a float has it
  const Bits zero{};
  const Bits sign = (bits & 0x8000u) << 16, shifted = (bits & 0x7fffu) << 13;
  const Bits exponent = shifted & kExponent;
  Bits normal = shifted + (127 - 15) * kOne;
  normal += exponent == zero + kExponent ? zero + (128 - 16) * kOne : zero;
  const V denormal = bit_cast<V>(normal + kOne) - 0x1p-14f;
  return bit_cast<V>((exponent == zero ? bit_cast<Bits>(denormal) : normal) | sign);
}

// The bits in the lower half; the upper half is undefined.
template <typename V>
RNNKERN_INLINE typename UnsignedBits<V>::Type narrow(Bf16, V value) {
  using Bits = typename UnsignedBits<V>::Type;
  const Bits zero{}, bits = bit_cast<Bits>(value);
  const Bits rounded = bits + (0x7fffu + ((bits >> 16) & 1u));
  return ((bits & 0x7fffffffu) > zero + 0x7f800000u ? bits | 0x400000u : rounded) >> 16;
}

template <typename V>
RNNKERN_INLINE typename UnsignedBits<V>::Type narrow(F16, V value) {
  using Bits = typename UnsignedBits<V>::Type;
  constexpr uint32_t kOne = 1u << 23;
  const Bits zero{}, all = bit_cast<Bits>(value);
  const Bits sign = all & 0x80000000u, bits = all ^ sign;
  const Bits infinite = bits > zero + 0x7f800000u ? zero + 0x7e00u : zero + 0x7c00u;
  // Adding 1/2 leaves the bits of a denormal float16 at the end of the mantissa, rounded.
  const Bits denormal = bit_cast<Bits>(bit_cast<V>(bits) + 0.5f) - 126 * kOne;
  const Bits normal = (bits + (0xfffu + ((bits >> 13) & 1u)) - (127 - 15) * kOne) >> 13;
  const Bits finite = bits < zero + (127 - 14) * kOne ? denormal : normal;
  return (bits >= zero + (127 + 16) * kOne ? infinite : finite) | (sign >> 16);
}

// An element as a number.
RNNKERN_INLINE float value(float x) { return x; }
RNNKERN_INLINE double value(double x) { return x; }
RNNKERN_INLINE float value(F32ByBf16 x) { return x.number; }
RNNKERN_INLINE float value(F32By3Bf16 x) { return x.number; }
RNNKERN_INLINE float value(F32ByI8 x) { return x.number; }
RNNKERN_INLINE float value(I8 x) { return x.bits; }

// Elements that are stored in the type in which they are computed with.
template <typename T>
RNNKERN_INLINE Compute<T>* numbers(T* elements) {
  static_assert(!kNarrow<T>, "16 bits are no numbers");
  return reinterpret_cast<Compute<T>*>(elements);
}
template <typename T>
RNNKERN_INLINE const Compute<T>* numbers(const T* elements) {
  static_assert(!kNarrow<T>, "16 bits are no numbers");
  return reinterpret_cast<const Compute<T>*>(elements);
}
RNNKERN_INLINE float value(Bf16 x) { return widen<float>(x, uint32_t(x.bits)); }
RNNKERN_INLINE float value(F16 x) { return widen<float>(x, uint32_t(x.bits)); }

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
