// How a pass runs, decided from sizes alone: the threads, how rows and units are split among them,
// and how the weights are read.
#pragma once

#include <cstdint>
#include <string>

#include "scan.h"

namespace rnnkern {

// The vectors of a panel of weights, or of rows of the batch if weights are broadcast.
constexpr int kPanelVectors = 4;

// What the plan needs to know about the machine and about the code that will run.
struct Machine {
  int threads = 1;                    // at most
  int lanes = 4;                      // elements of one vector
  int tile_rows = 3;                  // rows of one register tile; with AMX half of a tile's
  int element_bytes = 4;              // of a weight in the type that the products take
  int group = 1;                      // elements of a weight that one lane holds
  bool multiplies_in_place = true;    // a row of weights serves as one of a panel
  bool converts = false;              // products take weights in another type than that of tensors
  bool rounded_for_products = false;  // weights have more bits than the products take
  bool by_tiles = false;              // 16 rows cost little more than one
  int64_t l2_bytes = 1 << 20;         // second-level cache of one core
};

struct Problem {
  Sizes sizes;
  int64_t T = 0, N = 0;
  int64_t total = 0;           // rows over all steps
  bool deterministic = false;  // one order of summation for every N and T
  bool frozen = false;         // the weights have been packed before
  bool from_zeros = false;     // a single step whose states are zero, so that W_hh is not read
};

// How a matrix of weights is read.
enum class Reading {
  kPacked,  // repacked into panels, once for all steps; of a frozen layer once for all calls
  kDots,    // in place, forward: dot products along its rows
  // In place, forward: each weight times a vector of batch rows. The batch is transposed instead of
  // the weights. The bits are those of packed weights, but for the last rows
  // (`Plan::input_by_dots`).
  kBroadcast,
  kInPlace,  // in place, backward: its rows are already rows of panels
  kNone,     // there is no such matrix, or it is not read
};

struct Plan {
  int threads = 1;
  int row_blocks = 1;   // independent parts of the batch
  int unit_blocks = 1;  // parts of the hidden units, with one barrier in each step
  Reading input = Reading::kPacked, recurrent = Reading::kPacked;  // of W_ih and W_hh
  // How many of the last rows of the batch a matrix meets in dot products, although it is
  // broadcast: they would leave most of a vector unused.
  int64_t input_by_dots = 0, recurrent_by_dots = 0;
  int64_t block_steps = 1;  // steps whose input product is computed at once
};

// The operations of the forward pass for one step of one row in one direction.
double flops_per_row(const Sizes& sizes);

// Whether it pays to multiply float32 as bfloat16 for `total` rows, if the CPU can.
bool worth_bfloat16(int64_t total, bool deterministic);
// The same for float32 as the sum of two bfloat16, on AMX, with N rows in a step.
bool worth_split(int64_t total, int64_t N, bool deterministic);

Plan plan_forward(const Problem& problem, const Machine& machine, bool may_broadcast = true);
// The operations of a pass, in units of those of the forward pass.
constexpr double kBackwardWork = 2;
Plan plan_backward(const Problem& problem, const Machine& machine, double work = kBackwardWork);

// The choice and its reason, for people to read.
std::string describe(const Plan& plan, const Problem& problem, const Machine& machine,
                     bool backward);

}  // namespace rnnkern
