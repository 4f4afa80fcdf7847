// One element of one time step: what a cell reads and writes, in registers.
#pragma once

#include "scan.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

// forward(s) reads slot (pre-activations), h_prev, c_prev; writes slot (what backward needs), h, c.
// backward(s) reads slot (as saved), h, c, h_prev, c_prev, dh, dc; writes slot (gradients of the
// pre-activations), dc (gradient of c_prev) and dh_direct (the part of the gradient of h_prev that
// does not pass through W_hh). tangent(s), on dual numbers, reads slot (as saved, with tangents of
// the pre-activations), h_prev, c_prev and for a cell that saves no slots h; writes the tangents of
// slot, h and c. A cell leaves alone what its shape says it does not have.
template <typename V>
struct Step {
  V slot[kMaxSlots];
  V h_prev, c_prev;
  V h, c;
  V dh, dc, dh_direct;
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
