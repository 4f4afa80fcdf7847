// In place of csrc/cells/list.h: made-up cells of every number of gates, and some with more slots.
#pragma once

#include <array>

#include "cells/cell.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

// Each slot counts differently, so that a result tells if two of them change places.
constexpr double weight_of(int slot) { return 1 + slot; }

// h' = relu(sum over the slots of weight * slot). Every slot saves h'.
template <int kGates, int kSlots>
struct WeightedSum {
  static constexpr const char* kMode = "WEIGHTED_SUM";
  static constexpr std::array<const char*, kGates> kGateNames = {};
  static constexpr CellShape kShape = {.gates = kGates, .slots = kSlots, .saves_slots = true};

  template <typename V>
  static RNNKERN_INLINE void forward(Step<V>& s) {
    V sum{};
    for (int k = 0; k < kSlots; ++k) sum = sum + s.slot[k] * (V{} + weight_of(k));
    s.h = relu(sum);
    for (int k = 0; k < kSlots; ++k) s.slot[k] = s.h;
  }
  template <typename V>
  static RNNKERN_INLINE void backward(Step<V>& s) {
    const V d = where_above_zero(s.slot[kSlots - 1], s.dh);
    for (int k = 0; k < kSlots; ++k) s.slot[k] = times(weight_of(k), d);
  }
  template <typename V>
  static RNNKERN_INLINE void tangent(Step<Dual<V>>& s) {
    V sum{};
    for (int k = 0; k < kSlots; ++k) sum = sum + times(weight_of(k), s.slot[k].tangent);
    s.h.tangent = where_above_zero(s.slot[0].value, sum);
    for (int k = 0; k < kSlots; ++k) s.slot[k].tangent = s.h.tangent;
  }

 private:
  template <typename V>
  static RNNKERN_INLINE V times(double factor, const V& v) {
    return v * (V{} + factor);
  }
  template <typename V>
  static RNNKERN_INLINE Dual<V> times(double factor, const Dual<V>& v) {
    return {times(factor, v.value), times(factor, v.tangent)};
  }
};

using Cells = CellList<WeightedSum<1, 1>, WeightedSum<2, 2>, WeightedSum<3, 3>, WeightedSum<4, 4>,
                       WeightedSum<5, 5>, WeightedSum<6, 6>, WeightedSum<7, 7>, WeightedSum<8, 8>,
                       WeightedSum<1, 2>, WeightedSum<2, 3>, WeightedSum<2, 4>, WeightedSum<3, 5>,
                       WeightedSum<4, 7>, WeightedSum<5, 8>>;

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
