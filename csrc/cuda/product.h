// Products of whole matrices: by the library, or by a kernel of our own.
#pragma once

#include "cuda/queue.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

// Queues a product of operands T, results T or what T is computed with. The library makes it where
// there is one; our own kernel where there is none, of nothing (which is zero), and where
// `fixed_order`: one order of summation for every m and n.
template <typename T>
void multiply(const cuda::Product& product, bool fixed_order, Queue& queue);

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
