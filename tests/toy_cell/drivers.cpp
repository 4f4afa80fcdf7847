// The drivers of the CPU with one cell, which the compiler then sees used: tools/toy_cell.py.
#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/second_order.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

template class ForwardScan<float, CELL>;
template class BackwardScan<float, CELL>;
template class SecondOrderScan<float, CELL>;

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
