// SIMD vectors of the instruction set this file is compiled for: one compiler vector type, whole
// and partial loads and stores, and the transposition network that packing and dot products share.
#pragma once

#include <cstdint>
#include <utility>

#include "cells/math.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 6;  // 6 x 4 accumulators + 4 of the panel + 1 broadcast of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 3;  // 3 x 4 accumulators + 1 + 3 of 16 registers
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 6;
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 3;
#endif

template <typename T>
struct VecOf {
  typedef T Type __attribute__((vector_size(kVectorBytes)));
  typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
};
template <typename T>
using Vec = typename VecOf<T>::Type;

template <typename T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <typename T>
RNNKERN_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecOf<T>::Unaligned*>(p);
}

template <typename T>
RNNKERN_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecOf<T>::Unaligned*>(p) = v;
}

// The first n elements, 0 < n < lanes; the others are zero, and their memory is not touched.
#if defined(__AVX512F__)
RNNKERN_INLINE Vec<float> load_part(const float* p, int64_t n) {
  return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
}
RNNKERN_INLINE Vec<double> load_part(const double* p, int64_t n) {
  return (Vec<double>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
}
RNNKERN_INLINE void store_part(float* p, Vec<float> v, int64_t n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
}
RNNKERN_INLINE void store_part(double* p, Vec<double> v, int64_t n) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
}
#else
template <typename T>
RNNKERN_INLINE Vec<T> load_part(const T* p, int64_t n) {
  Vec<T> v{};
#pragma GCC unroll 8
  for (int i = 0; i < kLanes<T> - 1; ++i) {
    if (i < n) v[i] = p[i];
  }
  return v;
}
template <typename T>
RNNKERN_INLINE void store_part(T* p, Vec<T> v, int64_t n) {
#pragma GCC unroll 8
  for (int i = 0; i < kLanes<T> - 1; ++i) {
    if (i < n) p[i] = v[i];
  }
}
#endif

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
