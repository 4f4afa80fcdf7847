// Products of whole matrices, by the cuBLAS that torch has loaded.
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

// A matrix whose rows are `row` elements apart, which is at least the width of a row; or, if it is
// transposed, one whose columns are.
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
  Number results;     // of `to`
  bool adds = false;  // to what `to` holds
};

// Whether there is a cuBLAS in the process. If not, scans do without it, as they do with
// RNNKERN_CUBLAS=0, for tests and comparisons.
bool has_library();

// The size of the scratch memory that a product may use, and its alignment.
size_t library_bytes();
constexpr size_t kLibraryAlignment = 256;

// Products are queued on a stream and use that memory. On each device one call at a time queues
// products, and others wait. begin_products and multiply throw std::runtime_error.
void* begin_products(int device, void* stream, char* workspace);
// Products of 16-bit operands are summed in float. Those of float32 are computed in float32, or as
// TF32 if that is allowed.
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
