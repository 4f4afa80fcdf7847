#include "functions.h"

#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/rows.h"
#include "cpu/threads.h"
#include "tolerance.h"

namespace rnnkern {
namespace {

using namespace RNNKERN_NAMESPACE;

struct Counts {
  int *passed, *failed;
  void add(bool ok, const std::string& what) const {
    ++*(ok ? passed : failed);
    std::printf("%-60s %s\n", what.c_str(), ok ? "passed" : "FAILED");
  }
};

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// In units of the last place of the result. A result that is no normal number is zero.
template <typename T>
double error_ulp(double actual, long double wanted) {
  using F = Format<T>;
  if (std::isnan(wanted)) return std::isnan(actual) ? 0 : kInfinity;
  if (std::isinf(wanted)) return actual == double(wanted) ? 0 : kInfinity;
  int exponent;
  std::frexp(double(wanted), &exponent);
  if (exponent < F::kSmallest + F::kDigits) return actual == 0 ? 0 : kInfinity;
  return double(std::abs((long double)(actual)-wanted)) / std::ldexp(1.0, exponent - F::kDigits);
}

// f on the numbers given, a vector at a time, the last one not whole.
template <typename T, typename F>
std::vector<T> each_vector(const std::vector<T>& x, F f) {
  std::vector<T> y(x.size());
  const int64_t count = int64_t(x.size());
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    store_up_to(y.data() + i, f(load_up_to(x.data() + i, count - i)), count - i);
  }
  return y;
}

// From far below what overflows to far above, each power of two alike, and what is special.
template <typename T>
std::vector<T> grid() {
  std::vector<T> x = {T(0), T(-0.0), T(NAN), T(INFINITY), T(-INFINITY)};
  for (int exponent = -30; exponent <= 10; ++exponent) {
    for (int i = 0; i < 97; ++i) {
      const T magnitude = T(std::ldexp(1 + (i + 0.37) / 97, exponent));
      x.push_back(magnitude);
      x.push_back(-magnitude);
    }
  }
  return x;
}

template <typename T, typename F, typename Exact>
void check_function(const char* name, F f, Exact exact, double limit, const Counts& counts) {
  const std::vector<T> x = grid<T>();
  std::vector<T> y;
  {
    const FlushDenormals flush;
    y = each_vector(x, f);
  }
  double worst = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    worst = std::max(worst, error_ulp<T>(y[i], exact((long double)(x[i]))));
  }
  char text[99];
  std::snprintf(text, sizeof(text), "%s of %s, %.2f of %.0f ulp", name, Format<T>::kName, worst,
                limit);
  counts.add(worst <= limit, text);
}

template <typename T>
void check_activations(const Counts& counts) {
  check_function<T>(
      "sigmoid", [](Vec<T> x) { return sigmoid(x); },
      [](long double x) { return 1 / (1 + std::exp(-x)); }, kFunctionUlp, counts);
  check_function<T>(
      "tanh", [](Vec<T> x) { return tanh(x); }, [](long double x) { return std::tanh(x); },
      kFunctionUlp, counts);
  check_function<T>(
      "relu", [](Vec<T> x) { return relu(x); }, [](long double x) { return x < 0 ? 0 : x; }, 0,
      counts);
}

template <typename T>
T of_bits(unsigned bits) {
  return {uint16_t(bits)};
}
bool same(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

// All 2^16 numbers to float, and back; and numbers between them to the nearest, ties to even.
template <typename T>
void check_conversions(const Counts& counts) {
  std::vector<T> all;
  for (unsigned bits = 0; bits < 1u << 16; ++bits) all.push_back(of_bits<T>(bits));
  std::vector<float> wide(all.size());
  copy_row(wide.data(), all.data(), 0, int64_t(all.size()));
  std::vector<float> between;
  bool widens = true, is_round_trip = true;
  for (size_t i = 0; i < all.size(); ++i) {
    const double number = to_double(all[i]), next = to_double(all[(i + 1) % all.size()]);
    widens = widens && same(wide[i], number);
    is_round_trip = is_round_trip && (std::isnan(number) || from_double<T>(number).bits == i);
    between.push_back(wide[i]);
    for (double part : {0.25, 0.5, 0.75}) between.push_back(float(number + (next - number) * part));
  }
  counts.add(is_round_trip, std::string("the conversions of this program, ") + Format<T>::kName);
  counts.add(widens, std::string("all numbers of ") + Format<T>::kName + " to float32");
  std::vector<T> rounded(between.size());
  copy_row(rounded.data(), between.data(), 0, int64_t(between.size()));
  bool rounds = true;
  for (size_t i = 0; i < between.size(); ++i) {
    rounds = rounds && same(to_double(rounded[i]), round_to<T>(between[i]));
  }
  counts.add(rounds, std::string("float32 rounded to ") + Format<T>::kName);
}

// Products of rows and columns of integers, of which the last group is not whole.
void check_integers(const Counts& counts) {
  constexpr int kVectors = 3;
  constexpr int64_t K = 37, kRows = kRowsOfIntegers + 2, kColumns = kVectors * kLanes<float>;
  constexpr float kScaleOfRows = 0.5f;
  const auto left = [](int64_t m, int64_t k) {
    return k == 0 ? 127 : int(m * 31 + k * 7) % 255 - 127;
  };
  const auto right = [](int64_t n, int64_t k) { return int(n * 13 + k * 11) % 255 - 127; };
  std::vector<float> columns(kColumns * K), scales;
  for (int64_t n = 0; n < kColumns; ++n) {
    scales.push_back(0.25f + float(n));
    for (int64_t k = 0; k < K; ++k) columns[size_t(n * K + k)] = float(right(n, k));
  }
  std::vector<float> panel(size_t(groups_in_memory<I8>(K) * kColumns)), acc(kRows * kColumns, 1.0f);
  pack_integers(
      K, K, [&](int64_t n) { return columns.data() + n * K; }, scales.data(), kColumns - 1,
      panel.data(), kColumns, kColumns);
  std::vector<I8> rows(size_t(kRows * bytes_of_integers(K)));
  std::vector<const I8*> a;
  for (int64_t m = 0; m < kRows; ++m) {
    std::vector<float> x;
    for (int64_t k = 0; k < K; ++k) x.push_back(kScaleOfRows * float(left(m, k)));
    I8* const row = rows.data() + m * bytes_of_integers(K);
    quantize_row(x.data(), K, row);
    a.push_back(row);
  }
  product<I8>(kVectors, kRows, 0, K, a.data(), panel.data(), kColumns, acc.data(), kColumns);
  bool equal = true;
  for (int64_t m = 0; m < kRows; ++m) {
    for (int64_t n = 0; n < kColumns; ++n) {
      int sum = 0;
      for (int64_t k = 0; k < K && n < kColumns - 1; ++k) sum += left(m, k) * right(n, k);
      const double wanted = 1 + double(kScaleOfRows) * double(scales[size_t(n)]) * sum;
      const double error = std::abs(double(acc[size_t(m * kColumns + n)]) - wanted);
      equal = equal && error <= 4 * std::numeric_limits<float>::epsilon() * std::abs(wanted);
    }
  }
  counts.add(equal, "products of integers of 8 bits");
}

bool flushes() {
  volatile float denormal = 1e-40f, small = 1e-30f;
  volatile float of_operand = denormal * 1e10f, of_result = small * 1e-10f;
  return of_operand == 0 && of_result == 0;
}

void check_denormals(const Counts& counts) {
  bool during[2] = {};
  parallel(2, [&](int thread, int) { during[thread] = flushes(); });
  counts.add(during[0] && during[1], "denormal numbers are zero on two threads");
  counts.add(!flushes(), "and nowhere else");
}

}  // namespace

void check_functions(int* passed, int* failed) {
  const Counts counts = {passed, failed};
  check_activations<float>(counts);
  check_activations<double>(counts);
  check_conversions<Bf16>(counts);
  check_conversions<F16>(counts);
  check_integers(counts);
  check_denormals(counts);
}

}  // namespace rnnkern
