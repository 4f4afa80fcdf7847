// Elman RNN: h' = f(W_ih x + b_ih + W_hh h + b_hh), f = tanh or relu.
//
// One slot per unit. Nothing but h' is saved: both derivatives are functions of the output.
#pragma once

#include "cells/dual.h"
#include "cells/math.h"
#include "cells/step.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

struct Tanh {
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
  static constexpr CellShape kShape = kElmanShape;

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
