// GRU, gates in torch's order r, z, n, the reset applied after the recurrent product:
//
//   r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)      z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
//   m = W_hn h + b_hn                               n = tanh(W_in x + b_in + r m)
//   h' = (1 - z) n + z h
//
// Four slots m, r, z, n: the recurrent product owns slots 0-2, the input product slots 1-3, so that
// each is one contiguous range, in the accumulators as in the saved buffer. Saved for backward: all
// four.
#pragma once

#include "cells/dual.h"
#include "cells/math.h"
#include "cells/step.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

struct Gru {
  static constexpr CellShape kShape = kGruShape;

  template <typename V>
  static RNNKERN_INLINE void forward(Step<V>& s) {
    const V r = sigmoid(s.slot[1]), z = sigmoid(s.slot[2]);
    const V n = tanh(s.slot[3] + r * s.slot[0]);
    s.h = z * (s.h_prev - n) + n;
    s.slot[1] = r;
    s.slot[2] = z;
    s.slot[3] = n;
  }

  template <typename V>
  static RNNKERN_INLINE void backward(Step<V>& s) {
    using Element = typename ValueTraits<V>::Element;
    constexpr Element kOne = 1;
    const V m = s.slot[0], r = s.slot[1], z = s.slot[2], n = s.slot[3];
    const V dn = s.dh * (kOne - z) * (kOne - n * n);
    s.slot[0] = dn * r;
    s.slot[1] = dn * m * r * (kOne - r);
    s.slot[2] = s.dh * (s.h_prev - n) * z * (kOne - z);
    s.slot[3] = dn;
    s.dh_direct = s.dh * z;
  }

  template <typename V>
  static RNNKERN_INLINE void tangent(Step<Dual<V>>& s) {
    for (int k : {1, 2}) s.slot[k] = known_sigmoid(s.slot[k].value, s.slot[k].tangent);
    const Dual<V> recurrent = s.slot[1] * s.slot[0];
    s.slot[3] = known_tanh(s.slot[3].value, s.slot[3].tangent + recurrent.tangent);
    s.h = s.slot[2] * (s.h_prev - s.slot[3]) + s.slot[3];
  }
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
