// Products of operands of RNNKERN_ELEMENT. With RNNKERN_SIMT it is plain C++, for the stand-in.
#include "cuda/launch.cuh"
#include "cuda/product.cuh"
#include "cuda/product.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {
namespace {

template <typename T, typename E, typename R>
void start_kernel_of(const cuda::Product& p, const Queue& queue) {
  using Kernel = MatrixProduct<T, E, R>;
  const int64_t row_blocks = cuda::quotient_up(p.m, Kernel::kRows);
  const int64_t blocks = row_blocks * cuda::quotient_up(p.n, Kernel::kColumns);
  start_kernel<Kernel>(queue, "a product", {blocks, Kernel::kThreads, Kernel::kSharedBytes},
                       {p, row_blocks});
}

}  // namespace

template <>
void start_product<RNNKERN_ELEMENT>(const cuda::Product& p, const Queue& queue) {
  using T = RNNKERN_ELEMENT;
  with_operand<T>(queue, [&](auto operand) {
    using E = decltype(operand);
    if constexpr (kNarrow<T>) {
      if (p.results == cuda::kNumber<T>) return start_kernel_of<T, E, T>(p, queue);
    }
    start_kernel_of<T, E, Compute<T>>(p, queue);
  });
}

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
