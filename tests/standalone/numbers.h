// The element types as this program sees them: their numbers as doubles, rounded by arithmetic, so
// that nothing here is shared with csrc/cells/narrow.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "elements.h"

namespace rnnkern {

// Digits of the significand, and the power of two of the smallest number and above the largest one.
template <typename T>
struct Format;
template <>
struct Format<float> {
  static constexpr const char* kName = "float32";
  static constexpr int kDigits = 24, kSmallest = -149, kLargest = 128;
};
template <>
struct Format<double> {
  static constexpr const char* kName = "float64";
  static constexpr int kDigits = 53, kSmallest = -1074, kLargest = 1024;
};
template <>
struct Format<Bf16> {
  static constexpr const char* kName = "bfloat16";
  static constexpr int kDigits = 8, kSmallest = -133, kLargest = 128;
};
template <>
struct Format<F16> {
  static constexpr const char* kName = "float16";
  static constexpr int kDigits = 11, kSmallest = -24, kLargest = 16;
};
// Those of a tensor are float32. Products round them to so many digits.
template <>
struct Format<F32ByBf16> : Format<float> {
  static constexpr const char* kName = "float32, weights in bfloat16";
  static constexpr int kDigitsOfFactors = 8;
};
template <>
struct Format<F32ByI8> : Format<float> {
  static constexpr const char* kName = "float32, weights in int8";
  static constexpr int kDigitsOfFactors = 8;
};
template <typename T>
constexpr bool kRoundsFactors = requires { Format<T>::kDigitsOfFactors; };

// The spacing of the numbers just above one.
template <typename T>
double eps() {
  if constexpr (kRoundsFactors<T>) return std::ldexp(1.0, 1 - Format<T>::kDigitsOfFactors);
  return std::ldexp(1.0, 1 - Format<T>::kDigits);
}

// To the nearest number of T, ties to even.
template <typename T>
double round_to(double x) {
  using F = Format<T>;
  if (!std::isfinite(x) || x == 0) return x;
  int exponent;
  std::frexp(x, &exponent);
  exponent = std::max(exponent - F::kDigits, F::kSmallest);
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(x, -exponent)), exponent);
  const bool fits = std::abs(rounded) < std::ldexp(1.0, F::kLargest);
  return fits ? rounded : std::copysign(std::numeric_limits<double>::infinity(), x);
}

inline double to_double(float x) { return x; }
inline double to_double(double x) { return x; }
inline double to_double(F32ByBf16 x) { return x.number; }
inline double to_double(F32ByI8 x) { return x.number; }
// The bits of a significand of kDigits, its first digit not stored, behind those of an exponent.
template <typename T>
double to_double(T x) {
  using F = Format<T>;
  constexpr int kStored = F::kDigits - 1, kExponents = (1 << (15 - kStored)) - 1;
  const int exponent = x.bits >> kStored & kExponents, digits = x.bits & ((1 << kStored) - 1);
  double magnitude;
  if (exponent == kExponents) {
    magnitude =
        digits ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
  } else if (exponent == 0) {
    magnitude = std::ldexp(digits, F::kSmallest);
  } else {
    magnitude = std::ldexp(digits + (1 << kStored), F::kSmallest + exponent - 1);
  }
  return x.bits >> 15 ? -magnitude : magnitude;
}

// Rounds.
template <typename T>
T from_double(double x) {
  using F = Format<T>;
  if constexpr (std::is_floating_point_v<T>) {
    return T(x);
  } else if constexpr (kRoundsFactors<T>) {
    return {float(x)};
  } else {
    constexpr int kStored = F::kDigits - 1;
    constexpr unsigned kInfinity = 0x7fffu >> kStored << kStored;
    const double magnitude = std::abs(round_to<T>(x));
    unsigned bits = 0;
    if (std::isnan(x)) {
      bits = kInfinity | 1u << (kStored - 1);
    } else if (std::isinf(magnitude)) {
      bits = kInfinity;
    } else if (magnitude > 0) {
      int exponent;
      std::frexp(magnitude, &exponent);
      const int unit = std::max(exponent - F::kDigits, F::kSmallest);  // of the last digit
      // The first digit, if there is one, adds 1 to the exponent.
      bits = unsigned(std::ldexp(magnitude, -unit)) + (unsigned(unit - F::kSmallest) << kStored);
    }
    return {uint16_t(bits | (std::signbit(x) ? 0x8000u : 0u))};
  }
}

}  // namespace rnnkern
