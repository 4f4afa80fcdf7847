// The functions that each source of kernels offers, for one cell and one element type.
#pragma once

#include "cells/cells.h"
#include "cuda/queue.h"
#include "scan.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

// Queues the kernels of a scan. Returns false if they need more blocks at once than the device
// runs.
template <typename Cell, typename T>
bool start(const Forward<T>& scan, Queue& queue);
template <typename Cell, typename T>
bool start(const Backward<T>& scan, Queue& queue);
template <typename Cell, typename T>
bool start(const SecondOrder<T>& scan, Queue& queue);  // not of narrow T

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
