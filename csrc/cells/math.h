// sigmoid and tanh for every value type: float, double, and SIMD vectors of them.
//
// Only + - * / and comparisons, so every device can give the same bits. Both functions rest on one
// core,
//
//   exp(x) = 2^n (1 + p),   n = round(x / ln 2),   r = x - n ln 2,   p = r + r^2 q(r),   |r| <=
//   ln(2)/2
//
// with q a minimax polynomial of (e^r - 1 - r) / r^2 (error of p below 5e-10 and 5e-19 relative to
// r). Keeping p apart from 1 keeps e^x - 1 accurate where it is small. Of tanh(x) = m / (m + 1), m
// = (e^2x - 1) / 2, the roundings of m and m + 1 weigh most near zero: there a polynomial x + x^3
// t(x^2) takes over (error below 4e-10 and 3e-20 relative to x).
//
// | function | float | double | at -inf, +inf | NaN    |
// |----------|-------|--------|---------------|--------|
// | sigmoid  | 2 ulp | 2 ulp  | 0*, 1         | passed |
// | tanh     | 2 ulp | 2 ulp  | -1, 1         | passed |
// measured over all floats: 1.7 ulp for sigmoid, 1.5 for tanh, near zero 0.6; on a GPU at most 0.01
// more for float, whose quotient has no branch there
// * and for all x whose sigmoid is no normal number, provided that such results are flushed to
// zero, as the kernels have it: without that, the smallest that e^88 gives.
#pragma once

#include <cstdint>

#ifndef RNNKERN_NAMESPACE
#define RNNKERN_NAMESPACE portable
#endif

#ifdef __CUDACC__
#define RNNKERN_INLINE __host__ __device__ __forceinline__
#else
#define RNNKERN_INLINE inline __attribute__((always_inline))
#endif

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

// What the functions below need to know about a value type: its element, and integers of the same
// width and count.
template <typename V>
struct ValueTraits {  // a compiler vector
  using Element = typename ValueTraits<decltype(V{}[0] + V{}[0])>::Element;
  typedef typename ValueTraits<Element>::Bits Bits __attribute__((vector_size(sizeof(V))));
};
template <>
struct ValueTraits<float> {
  using Element = float;
  using Bits = int32_t;
};
template <>
struct ValueTraits<double> {
  using Element = double;
  using Bits = int64_t;
};

template <typename To, typename From>
RNNKERN_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// Polynomial coefficients. They are copied where they are used, because a constant of a class is no
// object in device code.
template <typename T, int kCount>
struct Polynomial {
  T of[kCount];
};

template <typename T>
struct MathConstants;

template <>
struct MathConstants<float> {
  static constexpr float kRound =
      12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440054690582770e-4f;
  static constexpr int kMantissaBits = 23, kBias = 127;
  static constexpr float kExpMin = -87.0f,
                         kExpMax = 88.0f;   // scale is a normal number between them
  static constexpr float kTanhMax = 10.0f;  // tanh is 1 from 9.02 on
  static constexpr float kTanhSmall = 0.3f;
  static constexpr int kTanhTerms = 4;
  static constexpr Polynomial<float, kTanhTerms> kT = {
      {-0.33333332901269590127f, 0.13333180384304557242f, -0.053883228609494861485f,
       0.020342777523137260445f}};
  static constexpr int kTerms = 6;
  static constexpr float kQ[kTerms] = {0.50000000134981778643f,   0.16666666681659179129f,
                                       0.041666464602026541557f,  0.0083333108895820771937f,
                                       0.0013933685862617173589f, 0.00019891030654370327738f};
};

template <>
struct MathConstants<double> {
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 1.908214929270587816144266e-10;
  static constexpr int kMantissaBits = 52, kBias = 1023;
  static constexpr double kExpMin = -708.0, kExpMax = 709.0;
  static constexpr double kTanhMax = 20.0;  // tanh is 1 from 19.07 on
  static constexpr double kTanhSmall = 0.3;
  static constexpr int kTanhTerms = 9;
  static constexpr Polynomial<double, kTanhTerms> kT = {{
      -0.33333333333333333308,
      0.13333333333333287522,
      -0.053968253968118826768,
      0.021869488520790526696,
      -0.0088632346536568289338,
      0.0035920999092204388848,
      -0.0014553022292202877509,
      0.00058412076410193495509,
      -0.00020319709849910683706,
  }};
  static constexpr int kTerms = 11;
  static constexpr double kQ[kTerms] = {
      0.5,
      0.16666666666666671008,
      0.041666666666666669767,
      0.0083333333333261120526,
      0.0013888888888883731828,
      0.00019841269874901259234,
      0.000024801587325605322782,
      2.7557255297969644392e-6,
      2.7557273570102139673e-7,
      2.5105259538448493419e-8,
      2.0914717341716375952e-9,
  };
};

// e^(kFactor x) as scale * (1 + kFactor p), scale a power of two; kFactor x within [kExpMin,
// kExpMax] or NaN. A factor that is plus or minus a power of two costs nothing and changes no bit,
// because it is a part of the constants.
template <typename V>
struct SplitExp {
  V scale, p;
};

// The coefficients of q for p / kFactor as a polynomial of r / kFactor.
template <int kFactor, typename Element>
struct Coefficients {
  using C = MathConstants<Element>;
  Element q[C::kTerms] = {};

  constexpr Coefficients() {
    Element power = 1;
    for (int i = 0; i < C::kTerms; ++i) {
      power *= kFactor;
      q[i] = C::kQ[i] * power;
    }
  }
};

template <int kFactor, typename V>
RNNKERN_INLINE SplitExp<V> split_exp(V x) {
  using Element = typename ValueTraits<V>::Element;
  using Bits = typename ValueTraits<V>::Bits;
  using C = MathConstants<Element>;
  static_assert(kFactor == -1 || kFactor == 1 || kFactor == 2, "plus or minus a power of two");
  constexpr Element kLog2E = Element(1.442695040888963407359925) * kFactor;
  constexpr Coefficients<kFactor, Element> kOf;
  const V shifted = x * kLog2E + C::kRound;
  const V n = shifted - C::kRound;
  V r = x - n * (C::kLn2High / kFactor);
  r = r - n * (C::kLn2Low / kFactor);
  V q = r * kOf.q[C::kTerms - 1] + kOf.q[C::kTerms - 2];
#pragma GCC unroll 16
  for (int i = C::kTerms - 3; i >= 0; --i) q = q * r + kOf.q[i];
  const V p = (r * r) * q + r;
  const Bits scale = (bit_cast<Bits>(shifted) + C::kBias) << C::kMantissaBits;
  return {bit_cast<V>(scale), p};
}

// x, but not above or below a limit. A NaN in x fails the comparison and stays. vec.h does it in
// one instruction.
template <typename V>
struct Clamp {
  static RNNKERN_INLINE V above(V limit, V x) { return limit < x ? limit : x; }
  static RNNKERN_INLINE V below(V limit, V x) { return limit > x ? limit : x; }
};

// a / b, for b from 1 to 1.7e38 or NaN. Kernels for GPUs have another function (cuda/device.cuh).
template <typename V>
struct Quotient {
  static RNNKERN_INLINE V of(V a, V b) { return a / b; }
};

// This relies on denormal results being flushed to zero.
template <typename V>
RNNKERN_INLINE V sigmoid(V x) {
  using Element = typename ValueTraits<V>::Element;
  using C = MathConstants<Element>;
  const V within = Clamp<V>::below(V{} - C::kExpMax, Clamp<V>::above(V{} - C::kExpMin, x));
  const SplitExp<V> e = split_exp<-1>(within);
  const V sum = e.scale + Element(1);
  const V lost = Element(1) - (sum - e.scale);  // the 1, where the scale is too large for it
  return Quotient<V>::of(V{} + Element(1), sum + (lost - e.scale * e.p));
}

template <typename V>
RNNKERN_INLINE V tanh(V x) {
  using Element = typename ValueTraits<V>::Element;
  using Bits = typename ValueTraits<V>::Bits;
  using C = MathConstants<Element>;
  constexpr int kSignShift = int(sizeof(Element) * 8) - 1;
  const Bits sign = bit_cast<Bits>(x) & ((bit_cast<Bits>(V{}) + 1) << kSignShift);
  const V magnitude = bit_cast<V>(bit_cast<Bits>(x) ^ sign);
  const V square = x * x;
  constexpr auto kT = C::kT;
  V t = square * kT.of[C::kTanhTerms - 1] + kT.of[C::kTanhTerms - 2];
#pragma GCC unroll 16
  for (int i = C::kTanhTerms - 3; i >= 0; --i) t = t * square + kT.of[i];
  const V small = (square * t) * x + x;
  const SplitExp<V> e = split_exp<2>(Clamp<V>::above(V{} + C::kTanhMax, magnitude));
  const V half = e.scale * e.p + (e.scale * Element(0.5) - Element(0.5));  // of e^2x - 1
  const V large = Quotient<V>::of(half, half + Element(1));
  return magnitude < V{} + C::kTanhSmall ? small : bit_cast<V>(bit_cast<Bits>(large) | sign);
}

template <typename V>
RNNKERN_INLINE V relu(V x) {
  return Clamp<V>::below(V{}, x);
}

// x if y is above zero or NaN, else zero.
template <typename V>
RNNKERN_INLINE V where_above_zero(V y, V x) {
  return y <= V{} ? V{} : x;
}

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
