// Dual numbers a + a' eps with eps^2 = 0. A computation with them also computes how its result
// changes with given changes a' of its operands. So a cell's backward on dual numbers computes
// second derivatives.
//
// What a cell's backward may use on them: + - * of two duals, a number minus a dual, tanh and
// where_above_zero. Its tangent has known_sigmoid and known_tanh besides. Add here what another
// cell needs.
#pragma once

#include "cells/math.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

template <typename V>
struct Dual {
  V value, tangent;
};

template <typename V>
struct ValueTraits<Dual<V>> {
  using Element = typename ValueTraits<V>::Element;
};

template <typename V>
RNNKERN_INLINE Dual<V> operator+(const Dual<V>& a, const Dual<V>& b) {
  return {a.value + b.value, a.tangent + b.tangent};
}
template <typename V>
RNNKERN_INLINE Dual<V> operator-(const Dual<V>& a, const Dual<V>& b) {
  return {a.value - b.value, a.tangent - b.tangent};
}
template <typename V>
RNNKERN_INLINE Dual<V> operator*(const Dual<V>& a, const Dual<V>& b) {
  return {a.value * b.value, a.value * b.tangent + a.tangent * b.value};
}
template <typename V>
RNNKERN_INLINE Dual<V> operator-(typename ValueTraits<V>::Element a, const Dual<V>& b) {
  return {a - b.value, V{} - b.tangent};
}

template <typename V>
RNNKERN_INLINE Dual<V> tanh(const Dual<V>& x) {
  const V y = tanh(x.value);
  return {y, x.tangent * (typename ValueTraits<V>::Element(1) - y * y)};
}

template <typename V>
RNNKERN_INLINE Dual<V> where_above_zero(const Dual<V>& y, const Dual<V>& x) {
  return {where_above_zero(y.value, x.value), where_above_zero(y.value, x.tangent)};
}

// The function's result y is known. `tangent` is that of the function's argument.
template <typename V>
RNNKERN_INLINE Dual<V> known_sigmoid(const V& y, const V& tangent) {
  return {y, tangent * y * (typename ValueTraits<V>::Element(1) - y)};
}
template <typename V>
RNNKERN_INLINE Dual<V> known_tanh(const V& y, const V& tangent) {
  return {y, tangent * (typename ValueTraits<V>::Element(1) - y * y)};
}

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
