// The one place that says when a result is right, by the rule of rnnkern/tolerance.py: the error is
// at most twice that of a plain loop in the same type, plus a small floor. Errors are counted in
// eps, the spacing of the numbers just above one, relative to max(1, max|reference|). The plain
// loop, which here stands for torch.nn, is reference.h in the type of the kernels; for float64,
// whose reference is a float64 as well, it is that in float32.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "numbers.h"

namespace rnnkern {

constexpr double kFactor = 2;

// In eps. The 16-bit types are computed in float32 and rounded when they are stored. Where products
// round their factors, eps is theirs.
template <typename T>
constexpr double kFloor = kNarrow<T> || kRoundsFactors<T> ? 2 : 16;

// A limit above that is a failure as well, because such a check sees nothing: the operands of the
// case are badly chosen, say where relu has its kink.
template <typename T>
constexpr double kLargestLimit = 5 * kFloor<T>;

// What csrc/cells/math.h promises, in units of the last place.
constexpr double kFunctionUlp = 2;

// The error of T, in eps of T. It is infinite if a NaN or infinity is at another place than in the
// reference.
template <typename T>
double error_eps(const std::vector<double>& actual, const std::vector<double>& reference) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  if (actual.size() != reference.size()) return kInfinity;
  double scale = 1, error = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    const double wanted = round_to<T>(reference[i]);
    if (std::isfinite(wanted) != std::isfinite(actual[i])) return kInfinity;
    if (std::isfinite(wanted)) {
      scale = std::max(scale, std::abs(reference[i]));
      error = std::max(error, std::abs(actual[i] - reference[i]));
    } else if (std::isnan(wanted) ? !std::isnan(actual[i]) : wanted != actual[i]) {
      return kInfinity;
    }
  }
  return error / scale / eps<T>();
}

struct Verdict {
  double error, limit;
  bool ok;
};

// U is the type of the plain loop.
template <typename T, typename U>
Verdict judge(const std::vector<double>& actual, const std::vector<double>& plain,
              const std::vector<double>& reference) {
  const double error = error_eps<T>(actual, reference), of_plain = error_eps<U>(plain, reference);
  const double limit = kFactor * (std::isfinite(of_plain) ? of_plain : 0) + kFloor<T>;
  return {error, limit, error <= limit && limit <= kLargestLimit<T>};
}

}  // namespace rnnkern
