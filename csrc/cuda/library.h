// Products of whole matrices, by cuBLAS as torch has loaded it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/kernels.h"
#include "elements.h"

namespace rnnkern::cuda {

enum class Number { kFloat, kDouble, kBf16, kF16 };

template <typename T>
constexpr Number kNumber = std::is_same_v<T, double> ? Number::kDouble
                           : std::is_same_v<T, Bf16> ? Number::kBf16
                           : std::is_same_v<T, F16>  ? Number::kF16
                                                     : Number::kFloat;

// A matrix by rows, `row` elements apart, at least as many as a row has; or one whose columns stand
// so.
struct Matrix {
  const void* data;
  int64_t row;
  bool transposed = false;
};

struct Product {
  int64_t m, n, k;    // at least 1 for the library
  Matrix a, b;        // [m, k], [k, n]
  Number operands;    // of a and b
  void* to;           // [m, n], by rows
  int64_t row;        //
  Number results;     // of what is written
  bool adds = false;  // to what stands there
};

// Where there is no cuBLAS in the process, scans go without it; where RNNKERN_CUBLAS=0 too, for
// tests and comparisons.
bool has_library();

// Scratch memory that a product may use, and where it has to begin.
size_t library_bytes();
constexpr size_t kLibraryAlignment = 256;

// Products are queued on a stream and use that memory. One call at a time has them on a device,
// others wait. begin_products and multiply throw std::runtime_error.
void* begin_products(int device, void* stream, char* workspace);
// 16-bit operands are summed in float, float32 as it is, or as TF32 if that is allowed.
void multiply(void* products, const Product& product, bool tf32);
void end_products(void* products);

// The products of a call.
class Products {
 public:
  Products(const Call& call, void* stream, char* workspace)
      : products_(begin_products(call.device, stream, workspace)), tf32_(call.tf32) {}
  ~Products() { end_products(products_); }
  Products(const Products&) = delete;
  Products& operator=(const Products&) = delete;

  void multiply(const Product& product) { cuda::multiply(products_, product, tf32_); }

 private:
  void* const products_;
  const bool tf32_;
};

}  // namespace rnnkern::cuda
