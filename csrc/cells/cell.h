// What a cell is: its shape, what it reads and writes in one time step of one unit, and the
// contract that it fulfils.
#pragma once

#include <concepts>
#include <string_view>

#include "cells/dual.h"

namespace rnnkern {

constexpr int kMaxSlots = 8;

// A slot is a number that a cell keeps of each unit: a gate, or one product's part of a gate. Of S
// slots the recurrent product owns the first G, and the input product the last G, for G gates. So
// both add to the same slot, but the last S - G gates have a slot for each product.
struct CellShape {
  int gates;  // blocks of H rows of the weights
  int slots = gates;
  int input_slot = slots - gates;  // the first one of the input product
  bool cell_state = false;         // there is c beside h
  bool saves_slots = false;        // backward needs the slots (else the output is enough)
  bool reads_h = false;            // the cell itself reads h_prev, and has dh_direct

  // The gate that a slot has from the recurrent or the input product.
  constexpr int recurrent_gate(int slot) const { return (slot - input_slot + gates) % gates; }
  constexpr int input_gate(int slot) const { return slot - input_slot; }

  // Without saved slots backward needs h, which is not saved if there is a projection. And h would
  // have fewer than H units.
  constexpr bool may_be_projected() const { return saves_slots && !reads_h; }
  // Every slot belongs to a product.
  constexpr bool is_valid() const {
    return gates >= 1 && slots >= gates && slots <= 2 * gates && slots <= kMaxSlots &&
           input_slot == slots - gates;
  }
};

namespace RNNKERN_NAMESPACE {

// One unit of one row in one time step, in registers.
//
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

// The contract, part by part.
template <typename C>
concept HasShape = requires { requires C::kShape.is_valid(); };
template <typename C>
concept HasNames = requires {
  { C::kMode } -> std::convertible_to<std::string_view>;
  { C::kGateNames[0] } -> std::convertible_to<std::string_view>;
  requires C::kGateNames.size() == (C::kShape.saves_slots ? C::kShape.gates : 0);
};
template <typename C>
concept HasForward = requires(Step<float>& s) { C::forward(s); };
template <typename C>
concept HasBackward = requires(Step<float>& s, Step<Dual<float>>& dual) {
  C::backward(s);
  C::backward(dual);
};
template <typename C>
concept HasTangent = requires(Step<Dual<float>>& dual) { C::tangent(dual); };
template <typename C>
concept IsCell = HasShape<C> && HasNames<C> && HasForward<C> && HasBackward<C> && HasTangent<C>;

// Says what a cell misses.
template <typename C>
consteval bool check_cell() {
  static_assert(HasShape<C>,
                "a cell has kShape, a CellShape of 1 to 8 gates and at most 2 * gates and 8 slots");
  static_assert(HasNames<C>,
                "a cell has kMode, its name, and kGateNames, a std::array: of its gates in the "
                "order of the weights, or empty if it saves no slots");
  static_assert(HasForward<C>, "a cell has forward(Step<V>&), for every V");
  static_assert(HasBackward<C>, "a cell has backward(Step<V>&), for every V, dual numbers too");
  static_assert(HasTangent<C>, "a cell has tangent(Step<Dual<V>>&), for second derivatives");
  return IsCell<C>;
}

template <typename... Cell>
struct CellList {
  static_assert((check_cell<Cell>() && ...));
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
