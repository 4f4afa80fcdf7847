// Products of whole matrices: by the library, or by a kernel of our own.
#pragma once

#include "cuda/queue.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

// Queues our own kernel for a product of operands T. The results are T, or the type with which T is
// computed.
template <typename T>
void start_product(const cuda::Product& product, const Queue& queue);

// Queues such a product, by the library if there is one. Our own kernel computes empty products,
// whose result is zero, and those with `fixed_order`: one order of summation for every m and n.
template <typename T>
void multiply(const cuda::Product& p, bool fixed_order, Queue& queue) {
  if (p.m == 0 || p.n == 0) return;
  if (queue.has_library && !fixed_order && p.k > 0) return queue.multiply(p);
  start_product<T>(p, queue);
}

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
