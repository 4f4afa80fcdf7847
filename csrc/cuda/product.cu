// Products of operands of RNNKERN_ELEMENT. With RNNKERN_SIMT plain C++, for the stand-in.
#include "cuda/launch.cuh"
#include "cuda/product.cuh"
#include "cuda/product.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {
namespace {

template <typename T, typename E, typename R>
void start_product(const cuda::Product& p, Queue& queue) {
  using Kernel = MatrixProduct<T, E, R>;
  const int64_t row_blocks = cuda::quotient_up(p.m, Kernel::kRows);
  const int64_t blocks = row_blocks * cuda::quotient_up(p.n, Kernel::kColumns);
  start_kernel<Kernel>(queue, "a product", {blocks, Kernel::kThreads, Kernel::kSharedBytes},
                       {p, row_blocks});
}

}  // namespace

template <>
void multiply<RNNKERN_ELEMENT>(const cuda::Product& p, bool fixed_order, Queue& queue) {
  using T = RNNKERN_ELEMENT;
  if (p.m == 0 || p.n == 0) return;
  if (queue.has_library && !fixed_order && p.k > 0) return queue.multiply(p);
  with_operand<T>(queue, [&](auto operand) {
    using E = decltype(operand);
    if constexpr (kNarrow<T>) {
      if (p.results == cuda::kNumber<T>) return start_product<T, E, T>(p, queue);
    }
    start_product<T, E, Compute<T>>(p, queue);
  });
}

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
