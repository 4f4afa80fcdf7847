// GRU, gates in torch's order r, z, n, the reset applied after the recurrent product:
//
//   r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)      z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
//   m = W_hn h + b_hn                               n = tanh(W_in x + b_in + r m)
//   h(t) = (1 - z) n + z h(t-1)
//
// There are four slots m, r, z, n. The recurrent product owns the first three and the input product
// the last three. So each product has one contiguous range, in the accumulators and in the saved
// buffer. m belongs to the rows of n in W_hh and b_hh. All four are saved for backward.
#pragma once

#include <array>

#include "cells/cell.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

struct Gru {
  static constexpr const char* kMode = "GRU";
  static constexpr std::array kGateNames = {"r", "z", "n"};
  static constexpr CellShape kShape = {
      .gates = 3, .slots = 4, .saves_slots = true, .reads_h = true};
  enum Slot { kM, kR, kZ, kN };

  template <typename V>
  static RNNKERN_INLINE void forward(Step<V>& s) {
    const V r = sigmoid(s.slot[kR]), z = sigmoid(s.slot[kZ]);
    const V n = tanh(s.slot[kN] + r * s.slot[kM]);
    s.h = z * (s.h_prev - n) + n;
    s.slot[kR] = r;
    s.slot[kZ] = z;
    s.slot[kN] = n;
  }

  // dn is the gradient of W_in x + b_in + r m. So that of m is dn r, and that of r is dn m.
  template <typename V>
  static RNNKERN_INLINE void backward(Step<V>& s) {
    using Element = typename ValueTraits<V>::Element;
    constexpr Element kOne = 1;
    const V m = s.slot[kM], r = s.slot[kR], z = s.slot[kZ], n = s.slot[kN];
    const V dn = s.dh * (kOne - z) * (kOne - n * n);
    s.slot[kM] = dn * r;
    s.slot[kR] = dn * m * r * (kOne - r);
    s.slot[kZ] = s.dh * (s.h_prev - n) * z * (kOne - z);
    s.slot[kN] = dn;
    s.dh_direct = s.dh * z;
  }

  template <typename V>
  static RNNKERN_INLINE void tangent(Step<Dual<V>>& s) {
    for (int k : {kR, kZ}) s.slot[k] = known_sigmoid(s.slot[k].value, s.slot[k].tangent);
    const Dual<V> recurrent = s.slot[kR] * s.slot[kM];
    s.slot[kN] = known_tanh(s.slot[kN].value, s.slot[kN].tangent + recurrent.tangent);
    s.h = s.slot[kZ] * (s.h_prev - s.slot[kN]) + s.slot[kN];
  }
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
