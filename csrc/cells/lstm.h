// LSTM, gates in torch's order i, f, g, o, each a = W_i* x + b_i* + W_h* h + b_h*:
//
//   c' = sigmoid(f) c + sigmoid(i) tanh(g)        h' = sigmoid(o) tanh(c')
//
// Slots = gates. Saved for backward: the activated gates and c'.
#pragma once

#include "cells/dual.h"
#include "cells/math.h"
#include "cells/step.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

struct Lstm {
  static constexpr CellShape kShape = kLstmShape;

  template <typename V>
  static RNNKERN_INLINE void forward(Step<V>& s) {
    const V i = sigmoid(s.slot[0]), f = sigmoid(s.slot[1]);
    const V g = tanh(s.slot[2]), o = sigmoid(s.slot[3]);
    const V written = i * g;
    s.c = f * s.c_prev + written;
    s.h = o * tanh(s.c);
    s.slot[0] = i;
    s.slot[1] = f;
    s.slot[2] = g;
    s.slot[3] = o;
  }

  template <typename V>
  static RNNKERN_INLINE void backward(Step<V>& s) {
    using Element = typename ValueTraits<V>::Element;
    constexpr Element kOne = 1;
    const V i = s.slot[0], f = s.slot[1], g = s.slot[2], o = s.slot[3];
    const V tanh_c = tanh(s.c);
    const V dc = s.dh * o * (kOne - tanh_c * tanh_c) + s.dc;
    s.slot[0] = dc * g * i * (kOne - i);
    s.slot[1] = dc * s.c_prev * f * (kOne - f);
    s.slot[2] = dc * i * (kOne - g * g);
    s.slot[3] = s.dh * tanh_c * o * (kOne - o);
    s.dc = dc * f;
  }

  template <typename V>
  static RNNKERN_INLINE void tangent(Step<Dual<V>>& s) {
    for (int k : {0, 1, 3}) s.slot[k] = known_sigmoid(s.slot[k].value, s.slot[k].tangent);
    s.slot[2] = known_tanh(s.slot[2].value, s.slot[2].tangent);
    s.c = s.slot[1] * s.c_prev + s.slot[0] * s.slot[2];
    s.h = s.slot[3] * tanh(s.c);
  }
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
