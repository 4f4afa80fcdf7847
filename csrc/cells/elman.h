// Elman RNN: h(t) = f(W_ih x + b_ih + W_hh h(t-1) + b_hh), f = tanh or relu.
//
// There is one slot per unit. Only h(t) is saved, because both derivatives are functions of it.
#pragma once

#include <array>

#include "cells/cell.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

struct Tanh {
  static constexpr const char* kMode = "RNN_TANH";

  template <typename V>
  static RNNKERN_INLINE V forward(V x) {
    return tanh(x);
  }
  template <typename V>
  static RNNKERN_INLINE V backward(V y, V dy) {
    using Element = typename ValueTraits<V>::Element;
    return dy * (Element(1) - y * y);
  }
};

struct Relu {
  static constexpr const char* kMode = "RNN_RELU";

  template <typename V>
  static RNNKERN_INLINE V forward(V x) {
    return relu(x);
  }
  template <typename V>
  static RNNKERN_INLINE V backward(V y, V dy) {
    return where_above_zero(y, dy);
  }
};

template <typename Activation>
struct Elman {
  static constexpr const char* kMode = Activation::kMode;
  static constexpr std::array<const char*, 0> kGateNames = {};  // the only one is h itself
  static constexpr CellShape kShape = {.gates = 1};

  template <typename V>
  static RNNKERN_INLINE void forward(Step<V>& s) {
    s.h = Activation::forward(s.slot[0]);
  }

  template <typename V>
  static RNNKERN_INLINE void backward(Step<V>& s) {
    s.slot[0] = Activation::backward(s.h, s.dh);
  }

  template <typename V>
  static RNNKERN_INLINE void tangent(Step<Dual<V>>& s) {
    s.h.tangent = Activation::backward(s.h.value, s.slot[0].tangent);
  }
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
