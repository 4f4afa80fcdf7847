// LSTM with coupled gates, in the order f, g, o, each a = W_i* x + b_i* + W_h* h + b_h*. What is
// forgotten makes room for what is written, i = 1 - f:
//
//   c(t) = sigmoid(f) c(t-1) + (1 - sigmoid(f)) tanh(g)        h(t) = sigmoid(o) tanh(c(t))
//
// The slots are the gates. The activated gates and c(t) are saved for backward.
#pragma once

#include <array>

#include "cells/cell.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

struct CoupledLstm {
  static constexpr const char* kMode = "COUPLED";
  static constexpr std::array kGateNames = {"f", "g", "o"};
  static constexpr CellShape kShape = {.gates = 3, .cell_state = true, .saves_slots = true};
  enum Slot { kF, kG, kO };

  template <typename V>
  static RNNKERN_INLINE void forward(Step<V>& s) {
    const V f = sigmoid(s.slot[kF]), g = tanh(s.slot[kG]), o = sigmoid(s.slot[kO]);
    s.c = f * (s.c_prev - g) + g;
    s.h = o * tanh(s.c);
    s.slot[kF] = f;
    s.slot[kG] = g;
    s.slot[kO] = o;
  }

  template <typename V>
  static RNNKERN_INLINE void backward(Step<V>& s) {
    using Element = typename ValueTraits<V>::Element;
    constexpr Element kOne = 1;
    const V f = s.slot[kF], g = s.slot[kG], o = s.slot[kO];
    const V tanh_c = tanh(s.c);
    const V dc = s.dh * o * (kOne - tanh_c * tanh_c) + s.dc;
    s.slot[kF] = dc * (s.c_prev - g) * f * (kOne - f);
    s.slot[kG] = dc * (kOne - f) * (kOne - g * g);
    s.slot[kO] = s.dh * tanh_c * o * (kOne - o);
    s.dc = dc * f;
  }

  template <typename V>
  static RNNKERN_INLINE void tangent(Step<Dual<V>>& s) {
    for (int k : {kF, kO}) s.slot[k] = known_sigmoid(s.slot[k].value, s.slot[k].tangent);
    s.slot[kG] = known_tanh(s.slot[kG].value, s.slot[kG].tangent);
    s.c = s.slot[kF] * (s.c_prev - s.slot[kG]) + s.slot[kG];
    s.h = s.slot[kO] * tanh(s.c);
  }
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
