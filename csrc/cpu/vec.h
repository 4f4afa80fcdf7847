// SIMD vectors of the instruction set this file is compiled for: one compiler vector type, whole
// and partial loads and stores, and the transposition network that packing and dot products share.
#pragma once

#include <cstdint>
#include <utility>

#include "cells/narrow.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRegisters = 32;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif

constexpr RNNKERN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr RNNKERN_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr RNNKERN_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

template <typename T>
struct VecOf {
  typedef T Type __attribute__((vector_size(kVectorBytes)));
  typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
};
// Elements of 16 bits are floats in a vector: loads widen them, stores round.
template <typename T>
using Vec = typename VecOf<Compute<T>>::Type;

template <typename T>
constexpr int kLanes = kVectorBytes / int(sizeof(Compute<T>));

// These are single instructions, which GCC does not find by itself.
#define RNNKERN_CLAMP(T, Native, minimum, maximum)               \
  template <>                                                    \
  struct Clamp<Vec<T>> {                                         \
    static RNNKERN_INLINE Vec<T> above(Vec<T> limit, Vec<T> x) { \
      const auto a = (Native)limit, b = (Native)x;               \
      return (Vec<T>)minimum;                                    \
    }                                                            \
    static RNNKERN_INLINE Vec<T> below(Vec<T> limit, Vec<T> x) { \
      const auto a = (Native)limit, b = (Native)x;               \
      return (Vec<T>)maximum;                                    \
    }                                                            \
  };
#if defined(__AVX512F__)
constexpr __mmask16 kAll = -1;
RNNKERN_CLAMP(float, __m512, _mm512_maskz_min_ps(kAll, a, b), _mm512_maskz_max_ps(kAll, a, b))
RNNKERN_CLAMP(double, __m512d, _mm512_maskz_min_pd(__mmask8(kAll), a, b),
              _mm512_maskz_max_pd(__mmask8(kAll), a, b))
#elif defined(__AVX2__)
RNNKERN_CLAMP(float, __m256, _mm256_min_ps(a, b), _mm256_max_ps(a, b))
RNNKERN_CLAMP(double, __m256d, _mm256_min_pd(a, b), _mm256_max_pd(a, b))
#elif defined(__x86_64__)
RNNKERN_CLAMP(float, __m128, _mm_min_ps(a, b), _mm_max_ps(a, b))
RNNKERN_CLAMP(double, __m128d, _mm_min_pd(a, b), _mm_max_pd(a, b))
#endif
#undef RNNKERN_CLAMP

#if defined(__AVX512BF16__) && defined(RNNKERN_ELEMENT)
// A division takes as long as 16 multiplications. Code that multiplies bfloat16 has other bits than
// other instruction sets anyway. So it takes an approximation of 14 bits, and doubles them once.
// Code for integers has the same bits everywhere.
template <>
struct Quotient<Vec<float>> {
  static RNNKERN_INLINE Vec<float> of(Vec<float> a, Vec<float> b) {
    if constexpr (std::is_same_v<RNNKERN_ELEMENT, F32ByI8>) return a / b;
    const auto guess = (Vec<float>)_mm512_maskz_rcp14_ps(kAll, (__m512)b);
    return a * (guess + guess * (1.0f - b * guess));
  }
};
#endif

// The 16 bits of each float of a vector.
typedef uint16_t Bits16 __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t UnalignedBits16
    __attribute__((vector_size(kVectorBytes / 2), aligned(sizeof(uint16_t)), may_alias));
typedef uint32_t Bits32 __attribute__((vector_size(kVectorBytes)));

template <typename T>
RNNKERN_INLINE Vec<T> from_bits(Bits16 bits) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, F16>) {
    return (Vec<T>)_mm512_maskz_cvtph_ps(kAll, (__m256i)bits);
  }
#elif defined(__F16C__)
  if constexpr (std::is_same_v<T, F16>) return (Vec<T>)_mm256_cvtph_ps((__m128i)bits);
  // One instruction, in place of which GCC 12 takes four.
  return widen<Vec<T>>(T{}, (Bits32)_mm256_cvtepu16_epi32((__m128i)bits));
#endif
  return widen<Vec<T>>(T{}, __builtin_convertvector(bits, Bits32));
}

template <typename T>
RNNKERN_INLINE Bits16 to_bits(Vec<T> v) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, Bf16>) return (Bits16)_mm512_cvtneps_pbh((__m512)v);
#endif
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, F16>) {
    return (Bits16)_mm512_maskz_cvtps_ph(kAll, (__m512)v, 0);
  }
#elif defined(__F16C__)
  if constexpr (std::is_same_v<T, F16>) return (Bits16)_mm256_cvtps_ph((__m256)v, 0);
#endif
  return __builtin_convertvector(narrow(T{}, v), Bits16);
}

template <typename T>
RNNKERN_INLINE Vec<T> load(const T* p) {
  if constexpr (kNarrow<T>) {
    return from_bits<T>(*reinterpret_cast<const UnalignedBits16*>(p));
  } else {
    return *reinterpret_cast<const typename VecOf<Compute<T>>::Unaligned*>(p);
  }
}

template <typename T>
RNNKERN_INLINE void store(T* p, Vec<T> v) {
  if constexpr (kNarrow<T>) {
    *reinterpret_cast<UnalignedBits16*>(p) = to_bits<T>(v);
  } else {
    *reinterpret_cast<typename VecOf<Compute<T>>::Unaligned*>(p) = v;
  }
}

// The first n elements, 0 < n < lanes; the others are zero, and their memory is not touched.
#if defined(__AVX512F__)
RNNKERN_INLINE __m512 load_masked(const float* p, int64_t n) {
  return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
}
RNNKERN_INLINE __m512d load_masked(const double* p, int64_t n) {
  return _mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
}
RNNKERN_INLINE void store_masked(float* p, Vec<float> v, int64_t n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
}
RNNKERN_INLINE void store_masked(double* p, Vec<double> v, int64_t n) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
}
#endif

template <typename T>
RNNKERN_INLINE Vec<T> load_part(const T* p, int64_t n) {
  if constexpr (kNarrow<T>) {
#if defined(__AVX512F__)
    return from_bits<T>((Bits16)_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p));
#else
    Bits16 bits{};
#pragma GCC unroll 8
    for (int i = 0; i < kLanes<T> - 1; ++i) {
      if (i < n) bits[i] = p[i].bits;
    }
    return from_bits<T>(bits);
#endif
  } else {
#if defined(__AVX512F__)
    return (Vec<T>)load_masked(numbers(p), n);
#else
    Vec<T> v{};
#pragma GCC unroll 8
    for (int i = 0; i < kLanes<T> - 1; ++i) {
      if (i < n) v[i] = numbers(p)[i];
    }
    return v;
#endif
  }
}

template <typename T>
RNNKERN_INLINE void store_part(T* p, Vec<T> v, int64_t n) {
  if constexpr (kNarrow<T>) {
    const Bits16 bits = to_bits<T>(v);
#if defined(__AVX512F__)
    _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), (__m256i)bits);
#else
#pragma GCC unroll 8
    for (int i = 0; i < kLanes<T> - 1; ++i) {
      if (i < n) p[i].bits = bits[i];
    }
#endif
  } else {
#if defined(__AVX512F__)
    store_masked(numbers(p), v, n);
#else
#pragma GCC unroll 8
    for (int i = 0; i < kLanes<T> - 1; ++i) {
      if (i < n) numbers(p)[i] = v[i];
    }
#endif
  }
}

// The first min(n, lanes) elements, n > 0.
template <typename T>
RNNKERN_INLINE Vec<T> load_up_to(const T* p, int64_t n) {
  return n >= kLanes<T> ? load(p) : load_part(p, n);
}
template <typename T>
RNNKERN_INLINE void store_up_to(T* p, Vec<T> v, int64_t n) {
  if (n >= kLanes<T>) {
    store(p, v);
  } else {
    store_part(p, v, n);
  }
}

// The vector, rounded to the precision of T.
template <typename T>
RNNKERN_INLINE Vec<T> rounded(Vec<T> v) {
  return from_bits<T>(to_bits<T>(v));
}

// interleave<0>: a0 b0 a1 b1 ... of the lower halves; interleave<1>: of the upper halves.
template <int kHalf, typename V, int... i>
RNNKERN_INLINE V interleave(V a, V b, std::integer_sequence<int, i...>) {
  constexpr int kCount = int(sizeof...(i));
  return __builtin_shufflevector(a, b, (kHalf * (kCount / 2) + i / 2 + (i % 2) * kCount)...);
}
template <int kHalf, typename T>
RNNKERN_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b) {
  return interleave<kHalf>(a, b, std::make_integer_sequence<int, kLanes<T>>{});
}

// Lane i of the result is lane i ^ kHalf.
template <int kHalf, typename V, int... i>
RNNKERN_INLINE V halves_swapped(V v, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(v, v, (i ^ kHalf)...);
}
template <int kHalf, int kCount, typename V>
RNNKERN_INLINE V halves_swapped(V v) {
  return halves_swapped<kHalf>(v, std::make_integer_sequence<int, kCount>{});
}

// rows[i][j] becomes rows[j][i]: log2(lanes) rounds of perfect shuffles.
template <typename T>
RNNKERN_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int kHalf = kLanes<T> / 2;
#pragma GCC unroll 8
  for (int round = 1; round < kLanes<T>; round *= 2) {
    Vec<T> next[kLanes<T>];
#pragma GCC unroll 16
    for (int i = 0; i < kHalf; ++i) {
      next[2 * i] = interleave<0, T>(rows[i], rows[i + kHalf]);
      next[2 * i + 1] = interleave<1, T>(rows[i], rows[i + kHalf]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) rows[i] = next[i];
  }
}

// Lane i of the result is the sum over the lanes of rows[i]: the same network, adding instead of
// keeping both halves.
template <typename T>
RNNKERN_INLINE Vec<T> sum_each(Vec<T> (&rows)[kLanes<T>]) {
#pragma GCC unroll 8
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) {
      rows[i] =
          interleave<0, T>(rows[i], rows[i + half]) + interleave<1, T>(rows[i], rows[i + half]);
    }
  }
  return rows[0];
}

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
