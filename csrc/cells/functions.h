// What a user's cell may call besides sigmoid, tanh and relu, for every value type (math.h).
// rnnkern/own_cells/generate.py writes the calls. Except for rsqrt they consist of + - * / and
// comparisons.
//
// | function     | float, double | at -inf, +inf | NaN    |
// |--------------|---------------|---------------|--------|
// | exp          | 2 ulp *       | 0, inf        | passed |
// | log          | 2 ulp         | NaN, inf      | passed |
// | softplus     | 3 ulp         | 0, inf        | passed |
// * zero below -87 (float) and -708 (double)
#pragma once

#include "cells/math.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

// a if the condition holds, else b.
template <typename V, typename Condition>
RNNKERN_INLINE V select(Condition condition, V a, V b) {
  return condition ? a : b;
}

// NaN if one of them is.
template <typename V>
RNNKERN_INLINE V larger_of(V a, V b) {
  return select<V>(a != a, a, Clamp<V>::below(a, b));
}
template <typename V>
RNNKERN_INLINE V smaller_of(V a, V b) {
  return select<V>(a != a, a, Clamp<V>::above(a, b));
}

template <typename V>
RNNKERN_INLINE V absolute_of(V x) {
  using Bits = typename ValueTraits<V>::Bits;
  using Element = typename ValueTraits<V>::Element;
  constexpr int kSignShift = int(sizeof(Element) * 8) - 1;
  const Bits sign = (bit_cast<Bits>(V{}) + 1) << kSignShift;
  return bit_cast<V>(bit_cast<Bits>(x) & ~sign);
}

template <typename V>
RNNKERN_INLINE V hard_sigmoid_of(V x) {
  using Element = typename ValueTraits<V>::Element;
  const V line = x * Element(1.0 / 6) + Element(0.5);
  return Clamp<V>::below(V{}, Clamp<V>::above(V{} + Element(1), line));
}

template <typename V>
RNNKERN_INLINE V rsqrt_of(V x) {
  using Element = typename ValueTraits<V>::Element;
  if constexpr (sizeof(V) == sizeof(Element)) {
    return Element(1) / (sizeof(Element) == 4 ? Element(__builtin_sqrtf(float(x)))
                                              : Element(__builtin_sqrt(double(x))));
  } else {
    V root;
#pragma GCC unroll 16
    for (int i = 0; i < int(sizeof(V) / sizeof(Element)); ++i) {
      root[i] = sizeof(Element) == 4 ? Element(__builtin_sqrtf(float(x[i])))
                                     : Element(__builtin_sqrt(double(x[i])));
    }
    return Element(1) / root;
  }
}

// The power of two of a large result is split, because 2^128 alone is infinite.
template <typename V>
RNNKERN_INLINE V exp_of(V x) {
  using Element = typename ValueTraits<V>::Element;
  using Bits = typename ValueTraits<V>::Bits;
  using C = MathConstants<Element>;
  const V limit = V{} + (C::kExpMax + Element(1));
  const V within = Clamp<V>::below(V{} + C::kExpMin, Clamp<V>::above(limit, x));
  const SplitExp<V> e = split_exp<1>(within);
  const V is_large = select<V>(within > V{} + Element(1), V{} + Element(1), V{});
  const Bits halved = select<Bits>(is_large > V{}, Bits{} + 1, Bits{}) << C::kMantissaBits;
  const V scale = bit_cast<V>(bit_cast<Bits>(e.scale) - halved);
  const V result = scale * (Element(1) + e.p) * (Element(1) + is_large);
  return select<V>(x < V{} + C::kExpMin, V{}, result);
}

// log(1 + f) = f - s (f - R) with s = f / (2 + f) and R = 2 (s^2 / 3 + s^4 / 5 + ...).
template <int kTerms, typename V>
RNNKERN_INLINE V log_of_1_and(V f) {
  using Element = typename ValueTraits<V>::Element;
  const V s = f / (Element(2) + f);
  const V z = s * s;
  V r = V{} + Element(2.0 / (2 * kTerms + 1));
#pragma GCC unroll 20
  for (int k = kTerms - 1; k >= 1; --k) r = r * z + Element(2.0 / (2 * k + 1));
  return f - s * (f - z * r);
}

// log x = n ln 2 + log m with m from sqrt(1/2) to sqrt(2). Denormal numbers count as zero.
template <typename V>
RNNKERN_INLINE V log_of(V x) {
  using Element = typename ValueTraits<V>::Element;
  using Bits = typename ValueTraits<V>::Bits;
  using C = MathConstants<Element>;
  constexpr int kTerms = sizeof(Element) == 4 ? 4 : 10;
  const Bits bits = bit_cast<Bits>(x);
  const Bits lowest = bit_cast<Bits>(V{} + Element(0.70710678118654752440));
  const Bits n = (bits - lowest) >> C::kMantissaBits;
  const V m = bit_cast<V>(bits - (n << C::kMantissaBits));
  const V exponent = bit_cast<V>(bit_cast<Bits>(V{} + C::kRound) + n) - C::kRound;
  const V part = log_of_1_and<kTerms>(m - Element(1));
  const V result = exponent * C::kLn2High + (part + exponent * C::kLn2Low);
  const V infinity = V{} + Element(__builtin_inf());
  const V special = select<V>(x == V{}, -infinity, V{} + Element(__builtin_nan("")));
  return select<V>(x > V{}, select<V>(x < infinity, result, x), special);
}

// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|)
template <typename V>
RNNKERN_INLINE V softplus_of(V x) {
  using Element = typename ValueTraits<V>::Element;
  constexpr int kTerms = sizeof(Element) == 4 ? 8 : 17;
  return relu(x) + log_of_1_and<kTerms>(exp_of(-absolute_of(x)));
}

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
