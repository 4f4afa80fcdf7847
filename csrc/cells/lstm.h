// LSTM, gates in torch's order i, f, g, o, each a = W_i* x + b_i* + W_h* h + b_h*:
//
//   c(t) = sigmoid(f) c(t-1) + sigmoid(i) tanh(g)        h(t) = sigmoid(o) tanh(c(t))
//
// The slots are the gates. The activated gates and c(t) are saved for backward.
#pragma once

#include <array>

#include "cells/cell.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

struct Lstm {
  static constexpr const char* kMode = "LSTM";
  static constexpr std::array kGateNames = {"i", "f", "g", "o"};
  static constexpr CellShape kShape = {
      .gates = 4, .cell_state = true, .saves_slots = true, .normalises_c = true};
  enum Slot { kI, kF, kG, kO };

  template <typename V>
  static RNNKERN_INLINE void forward(Step<V>& s) {
    forward_state(s);
    forward_output(s);
  }
  template <typename V>
  static RNNKERN_INLINE void forward_state(Step<V>& s) {
    const V i = sigmoid(s.slot[kI]), f = sigmoid(s.slot[kF]);
    const V g = tanh(s.slot[kG]), o = sigmoid(s.slot[kO]);
    const V written = i * g;
    s.c = f * s.c_prev + written;
    s.slot[kI] = i;
    s.slot[kF] = f;
    s.slot[kG] = g;
    s.slot[kO] = o;
  }

  template <typename V>
  static RNNKERN_INLINE void forward_output(Step<V>& s) {
    s.h = s.slot[kO] * tanh(s.c);
  }

  template <typename V>
  static RNNKERN_INLINE void backward(Step<V>& s) {
    backward_output(s);
    backward_state(s);
  }
  template <typename V>
  static RNNKERN_INLINE void backward_output(Step<V>& s) {
    using Element = typename ValueTraits<V>::Element;
    constexpr Element kOne = 1;
    const V o = s.slot[kO], tanh_c = tanh(s.c);
    s.dc = s.dh * o * (kOne - tanh_c * tanh_c) + s.dc;
    s.slot[kO] = s.dh * tanh_c * o * (kOne - o);
  }
  template <typename V>
  static RNNKERN_INLINE void backward_state(Step<V>& s) {
    using Element = typename ValueTraits<V>::Element;
    constexpr Element kOne = 1;
    const V i = s.slot[kI], f = s.slot[kF], g = s.slot[kG], dc = s.dc;
    s.slot[kI] = dc * g * i * (kOne - i);
    s.slot[kF] = dc * s.c_prev * f * (kOne - f);
    s.slot[kG] = dc * i * (kOne - g * g);
    s.dc = dc * f;
  }

  template <typename V>
  static RNNKERN_INLINE void tangent(Step<Dual<V>>& s) {
    for (int k : {kI, kF, kO}) s.slot[k] = known_sigmoid(s.slot[k].value, s.slot[k].tangent);
    s.slot[kG] = known_tanh(s.slot[kG].value, s.slot[kG].tangent);
    s.c = s.slot[kF] * s.c_prev + s.slot[kI] * s.slot[kG];
    s.h = s.slot[kO] * tanh(s.c);
  }
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
