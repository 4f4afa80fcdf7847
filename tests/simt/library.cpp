// In place of cuBLAS: the same products, one number after the other.
#include "cuda/library.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cells/narrow.h"
#include "simt.h"

namespace rnnkern::cuda {
namespace {

double read(Number number, const void* data, int64_t index) {
  using namespace portable;
  switch (number) {
    case Number::kDouble:
      return static_cast<const double*>(data)[index];
    case Number::kBf16:
      return value(static_cast<const Bf16*>(data)[index]);
    case Number::kF16:
      return value(static_cast<const F16*>(data)[index]);
    case Number::kFloat:
      break;
  }
  return static_cast<const float*>(data)[index];
}

void write(Number number, void* data, int64_t index, double x) {
  using namespace portable;
  switch (number) {
    case Number::kDouble:
      static_cast<double*>(data)[index] = x;
      return;
    case Number::kBf16:
      static_cast<Bf16*>(data)[index].bits = uint16_t(narrow(Bf16{}, float(x)));
      return;
    case Number::kF16:
      static_cast<F16*>(data)[index].bits = uint16_t(narrow(F16{}, float(x)));
      return;
    case Number::kFloat:
      break;
  }
  static_cast<float*>(data)[index] = float(x);
}

double at(Number number, const Matrix& m, int64_t i, int64_t j) {
  return read(number, m.data, m.transposed ? j * m.row + i : i * m.row + j);
}

// In an order that depends on the number of rows, as cuBLAS' does.
template <typename A>
void sum_up(const Product& p) {
  for (int64_t i = 0; i < p.m; ++i) {
    for (int64_t j = 0; j < p.n; ++j) {
      A sum = p.adds ? A(read(p.results, p.to, i * p.row + j)) : A(0);
      for (int64_t step = 0; step < p.k; ++step) {
        const int64_t k = p.m % 2 ? step : p.k - 1 - step;
        sum += A(at(p.operands, p.a, i, k)) * A(at(p.operands, p.b, k, j));
      }
      write(p.results, p.to, i * p.row + j, sum);
    }
  }
}

}  // namespace

bool has_library() {
  const char* const wanted = std::getenv("RNNKERN_CUBLAS");
  return !(wanted && std::string(wanted) == "0");
}
size_t library_bytes() { return 100; }

void check(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(std::string("cuBLAS would refuse ") + what);
}

// RNNKERN_SIMT_REFUSES: it refuses all.
void* begin_products(int, void* stream, char* workspace) {
  check(!std::getenv("RNNKERN_SIMT_REFUSES"), "what a test wants");
  check(reinterpret_cast<uintptr_t>(workspace) % kLibraryAlignment == 0, "this workspace");
  return stream;
}
void end_products(void*) {}

void multiply(void* products, const Product& p, bool) {
  check(p.m >= 1 && p.n >= 1 && p.k >= 1, "a product of nothing");
  check(p.a.row >= (p.a.transposed ? p.m : p.k), "rows of a that overlap");
  check(p.b.row >= (p.b.transposed ? p.k : p.n), "rows of b that overlap");
  check(p.row >= p.n, "rows of the result that overlap");
  simt::streams().add(
      products, [p] { p.operands == Number::kDouble ? sum_up<double>(p) : sum_up<float>(p); });
}

}  // namespace rnnkern::cuda
