// Which kernel, from sizes alone: threads, how rows and units are split among them, and how the
// weights are read.
#pragma once

#include <cstdint>
#include <string>

#include "scan.h"

namespace rnnkern {

// What the plan must know of the machine and of the code that will run.
struct Machine {
  int threads = 1;                    // at most
  int lanes = 4;                      // elements of one vector
  int tile_rows = 3;                  // rows of one register tile
  int element_bytes = 4;              // of a weight as the products take it
  int group = 1;                      // elements of a weight that one lane holds
  bool multiplies_in_place = true;    // rows of weights need no conversion to be rows of a panel
  bool rounded_for_products = false;  // weights, from more bits than the products take
  int64_t l2_bytes = 1 << 20;         // second-level cache of one core
};

struct Problem {
  Sizes sizes;
  int64_t T = 0, N = 0;
  int64_t total = 0;           // rows over all steps
  bool deterministic = false;  // one order of summation for every N and T
};

// How a matrix of weights is read.
enum class Reading {
  kPacked,     // repacked into panels, once for all steps
  kDots,       // as it lies, forward: dot products along its rows
  kBroadcast,  // as it lies, forward: each weight times a vector of rows of the batch, which are
               // transposed instead; the bits are those of packed weights
  kInPlace,    // as it lies, backward: its rows are rows of panels already
};

struct Plan {
  int threads = 1;
  int row_blocks = 1;   // independent parts of the batch
  int unit_blocks = 1;  // parts of the hidden units, one barrier a step between them
  Reading input = Reading::kPacked, recurrent = Reading::kPacked;  // of W_ih and W_hh
  int64_t block_steps = 1;  // steps whose input product is made at once
};

// Operations of one step of one row and direction, forward.
double flops_per_row(const Sizes& sizes);

// Whether float32 is worth being multiplied as bfloat16, where the CPU does that: for `total` rows.
bool worth_bfloat16(int64_t total, bool deterministic);

Plan plan_forward(const Problem& problem, const Machine& machine, bool may_broadcast = true);
// `work`: its operations, in those of the forward pass.
Plan plan_backward(const Problem& problem, const Machine& machine, double work = 2.0);

// The choice and its reason, for people.
std::string describe(const Plan& plan, const Problem& problem, const Machine& machine);

}  // namespace rnnkern
