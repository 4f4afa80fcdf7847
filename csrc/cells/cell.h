// What a cell is: its shape, what it reads and writes in one time step of one unit, and the
// contract that it fulfils.
#pragma once

#include <concepts>
#include <string_view>

#include "cells/dual.h"
#include "scan.h"

namespace rnnkern {

constexpr int kMaxSlots = 8, kMaxMoreStates = 2;

// A slot is a number that a cell keeps for each unit: a gate, or one product's part of a gate.
//
// A gate has one slot, to which both products add; or two, if the cell must see the products apart.
// Only the last S - G of the G gates, in the order of the weights, can have two. The order of the S
// slots is: the recurrent parts of those gates, the other gates, the input parts. GRU, with the
// gates r, z, n, has m (the recurrent part of n), r, z, n (gru.h). So the recurrent product adds to
// the first G slots, and the input product to the last G.
struct CellShape {
  int gates;  // blocks of H rows of the weights
  int slots = gates;
  int input_slot = slots - gates;  // the first one of the input product
  bool cell_state = false;         // there is c beside h
  bool saves_slots = false;        // backward reads the slots, else h
  bool reads_h = false;            // the cell itself reads h_prev, and writes dh_direct
  int parameters = 0;              // of the cell's own: one number for each unit
  int more_states = 0;             // besides h and c; the tensors of c hold them too
  bool recurrent = true;           // there is a product with W_hh; else every gate has one slot
  bool normalises_c = false;       // layer normalisation takes c too, before the output

  // How many numbers are saved for a unit: one for each slot, then one for each parameter. Backward
  // puts their gradients in the same place. As for a bias, the gradient of a parameter is the sum
  // of its numbers over rows and steps.
  constexpr int stored() const { return slots + parameters; }

  // How many numbers layer normalisation computes for a unit: from the sums of both products, and
  // from c.
  constexpr int normalised() const { return 2 * gates + normalises_c; }

  // How many numbers c, c_0 and c_n hold for a unit: the cell state, and the states behind it.
  constexpr int planes() const { return cell_state + more_states; }

  // The gate whose part of the recurrent or of the input product a slot receives.
  constexpr int recurrent_gate(int slot) const { return (slot - input_slot + gates) % gates; }
  constexpr int input_gate(int slot) const { return slot - input_slot; }

  // Whether the resident tier of a GPU (cuda/plan.h) can run the cell.
  constexpr bool fits_resident() const { return parameters == 0 && more_states == 0 && recurrent; }

  // Without saved slots backward needs h, which is not saved if there is a projection. A cell that
  // reads h would find P features there in place of its H units.
  constexpr bool may_be_projected() const { return saves_slots && !reads_h && recurrent; }
  // Every slot belongs to a product.
  constexpr bool is_valid() const {
    return gates >= 1 && slots >= gates && slots <= 2 * gates && slots <= kMaxSlots &&
           (recurrent || slots == gates) && input_slot == slots - gates && parameters >= 0 &&
           parameters <= kMaxParameters && more_states >= 0 &&
           more_states <= (cell_state ? kMaxMoreStates : 0);
  }
};

// Elements of T that a row of a normalised layer saves for backward: `normalised` numbers for each
// unit, and three of Compute<T>.
template <typename T>
constexpr int64_t normalised_width(const CellShape& shape, int64_t H) {
  return shape.normalised() * H + 3 * int64_t(sizeof(Compute<T>) / sizeof(T));
}

namespace RNNKERN_NAMESPACE {

// One unit of one row in one time step, in registers.
//
// forward(s) reads slot (pre-activations), h_prev, c_prev and parameter. It writes slot (what
// backward needs), h and c.
//
// backward(s) reads slot (as saved) if the cell saves slots, else h. It also reads h_prev, c,
// c_prev, parameter, dh and dc. It writes every slot (gradients of the pre-activations, then of the
// parameters), dc (the gradient of c_prev) and dh_direct (the part of the gradient of h_prev that
// does not pass through W_hh).
//
// tangent(s), on dual numbers, reads slot (as saved, with the tangents of the pre-activations),
// h_prev, c_prev, parameter, the value of c and, if the cell saves no slots, the value of h. It
// writes slot, h and c. Only their tangents are read afterwards.
//
// A cell that normalises c has the parts of these functions that layer normalisation comes between.
// forward_state(s) is forward without h. forward_output(s) reads slot (as saved) and the normalised
// c, and writes h.
// backward_output(s) reads slot (as saved), the normalised c, dh and dc; it writes the slots of the
// output and dc (the gradient of that c). backward_state(s) reads the gradient of c itself as dc
// and does the rest of backward.
//
// A cell leaves alone what its shape says that it does not have: c, c_prev and dc without
// cell_state; h_prev and dh_direct without reads_h. Slots that are not saved need not be written,
// except by backward.
template <typename V>
struct Step {
  V slot[kMaxSlots + kMaxParameters];  // stored() of them; forward reads the first `slots`
  V parameter[kMaxParameters];
  V h_prev, c_prev;
  V h, c;
  V dh, dc, dh_direct;
  V more_prev[kMaxMoreStates], more[kMaxMoreStates], dmore[kMaxMoreStates];  // as c
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

// Says which member a cell misses. Whether the members do what the shape says is another question:
// g++ reports a value that is used uninitialized if a cell reads what its shape does not have, or
// does not write h, c or dh_direct. It does not report a slot or a dc that is not written, because
// these hold what they held before.
template <typename C>
consteval bool check_cell() {
  static_assert(
      HasShape<C>,
      "a cell has kShape, a CellShape of at least 1 gate and at most 8 slots: one for each "
      "gate, two for a gate whose products the cell must see apart");
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
