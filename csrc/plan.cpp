#include "plan.h"

#include <algorithm>
#include <cstdio>

#include "cells/cells.h"

namespace rnnkern {

double flops_per_row(const Sizes& z) {
  const CellShape shape = cell_shape(z.cell);
  return 2.0 * shape.gates * double(z.H) * double(z.I + z.O) +
         (z.projected ? 2.0 * double(z.H) * double(z.O) : 0.0);
}

namespace {

// Operations that make it worth waking another thread: a parallel region costs some 3 us, which one
// core spends on about 200 kFLOP, less where weights come from afar; a barrier a step costs some
// 0.5 us.
constexpr double kFlopsPerThread = 200e3;
constexpr double kFlopsPerThreadStep = 40e3;
// Rows of one block of the input product: enough to read the weights of the input once for many
// rows; more where they come from beyond the second-level cache.
constexpr int64_t kInputRows = 48, kInputRowsOfLarge = 256;
// Forward, in products of one row of panels. Packing reads and writes all weights once; more where
// they come from beyond the second-level cache.
constexpr double kPacking = 8, kPackingOfLarge = 16;
// Of dot products along the rows of weights: sums of lanes, in vectors of k.
constexpr double kSumOfLanes = 3;
// Of weights that are broadcast: the batch is transposed, and so are the sums, in vectors of k; and
// weights that the products take as another type are converted for each product.
constexpr double kTransposition = 0.7, kConversion = 1.5;
// Backward, their rows are rows of a panel already, and packing only draws them together: for many
// reads, in one step or in several; or where they are this far apart, so that all of them want the
// same places of the cache.
constexpr int64_t kBytesOfSamePlace = 4096;
constexpr int64_t kReadsInPlace = 64, kReadsInPlaceOfSamePlace = 3;
constexpr int64_t kReadsInPlaceOfOneStep = 300, kReadsInPlaceOfOneStepOfSamePlace = 48;

// Rounding float32 weights to bfloat16 while they are packed costs some 8 products of one row of
// float32, and each row then costs half; to round them each time they are read gains nothing.
constexpr int64_t kRowsWorthBfloat16 = 16;

double weight_bytes(const Sizes& z, int64_t columns, const Machine& machine) {
  return double(cell_shape(z.cell).gates) * double(z.H) * double(columns) * machine.element_bytes;
}

// A matrix of weights comes from beyond the second-level cache each time it is read.
bool large(const Sizes& z, int64_t columns, const Machine& machine) {
  return weight_bytes(z, columns, machine) > double(machine.l2_bytes);
}

// How a matrix of that many columns is read, forward. It depends on no number of threads, because
// dot products have bits of their own.
Reading cheapest_reading(const Problem& problem, const Machine& machine, int64_t columns,
                         bool may_broadcast) {
  if (machine.rounded_for_products) return Reading::kPacked;
  const Sizes& z = problem.sizes;
  const double vectors = double(columns) / (machine.lanes * machine.group);
  const auto total = double(problem.total);
  const double packed = total + (large(z, z.I + z.O, machine) ? kPackingOfLarge : kPacking);
  const double dots = total * (1 + kSumOfLanes / vectors);
  const double filled = double((problem.N + machine.lanes - 1) / machine.lanes * machine.lanes);
  const bool converts = !machine.multiplies_in_place && machine.group == 1;
  const double broadcast =
      double(problem.T) * (filled * (1 + kTransposition / vectors) + (converts ? kConversion : 0));
  const bool may_dot = !problem.deterministic && columns >= 2 * machine.lanes;
  if (may_dot && dots <= packed && (!may_broadcast || dots <= broadcast)) return Reading::kDots;
  return may_broadcast && broadcast < packed ? Reading::kBroadcast : Reading::kPacked;
}

// Rows are split where every part still fills its register tiles, for no barrier is needed then.
// Units are split where the rows are too few; and first where the recurrent weights are large, for
// each thread then reads its part of them in a step, and not all, and where they are broadcast, for
// the rows that fill vectors then stay together.
void split_work(const Problem& problem, const Machine& machine, double work, Plan* plan) {
  const int64_t tasks = problem.sizes.D;
  const int64_t wanted =
      std::min<int64_t>(machine.threads, int64_t(work * double(problem.total) / kFlopsPerThread));
  if (wanted <= 1) return;
  const int64_t parts = std::max<int64_t>(1, wanted / tasks);  // of each direction
  const int64_t tiles = (problem.N + machine.tile_rows - 1) / machine.tile_rows;
  const int64_t most_rows = std::max<int64_t>(1, tiles / 2);
  const int64_t panels = (problem.sizes.H + 4 * machine.lanes - 1) / (4 * machine.lanes);
  const auto step = int64_t(work * double(problem.N) / kFlopsPerThreadStep);
  const int64_t most_units = std::max<int64_t>(1, std::min(panels, step));
  int64_t rows = std::min(parts, most_rows), units = 1;
  if (rows < parts || plan->recurrent == Reading::kBroadcast ||
      large(problem.sizes, problem.sizes.O, machine)) {
    units = std::min(parts, most_units);
    rows = std::min(parts / units, most_rows);
    if (rows * units < parts && most_rows >= parts) {
      units = 1;
      rows = parts;
    }
  }
  plan->row_blocks = int(rows);
  plan->unit_blocks = int(units);
  plan->threads = int(std::min(wanted, tasks * rows * units));
}

}  // namespace

bool worth_bfloat16(int64_t total, bool deterministic) {
  return deterministic || total >= kRowsWorthBfloat16;
}

Plan plan_forward(const Problem& problem, const Machine& machine, bool may_broadcast) {
  Plan plan;
  plan.input = cheapest_reading(problem, machine, problem.sizes.I, may_broadcast);
  plan.recurrent = cheapest_reading(problem, machine, problem.sizes.O, may_broadcast);
  split_work(problem, machine, flops_per_row(problem.sizes), &plan);
  const int64_t rows = std::max<int64_t>(1, problem.N / plan.row_blocks);
  const int64_t wanted =
      large(problem.sizes, problem.sizes.I, machine) ? kInputRowsOfLarge : kInputRows;
  plan.block_steps = std::clamp<int64_t>(wanted / rows, 1, std::max<int64_t>(1, problem.T));
  return plan;
}

Plan plan_backward(const Problem& problem, const Machine& machine, double work) {
  Plan plan;
  split_work(problem, machine, work * flops_per_row(problem.sizes), &plan);
  const auto reading = [&](int64_t columns) {
    const bool same_place = columns * machine.element_bytes % kBytesOfSamePlace == 0;
    const int64_t most =
        problem.T == 1 ? same_place ? kReadsInPlaceOfOneStepOfSamePlace : kReadsInPlaceOfOneStep
        : same_place   ? kReadsInPlaceOfSamePlace
                       : kReadsInPlace;
    // If a row is shorter than a vector, the vector would reach beyond the next row.
    const bool packed = problem.deterministic || !machine.multiplies_in_place ||
                        columns < machine.lanes || problem.total > most;
    return packed ? Reading::kPacked : Reading::kInPlace;
  };
  plan.input = reading(problem.sizes.I);
  plan.recurrent = reading(problem.sizes.O);
  return plan;
}

std::string describe(const Plan& plan, const Problem& problem, const Machine& machine) {
  char line[512];
  const bool rows = plan.row_blocks > 1, units = plan.unit_blocks > 1;
  const char* split =
      rows && units ? "batch rows and hidden units split: one barrier a step"
      : rows        ? "batch rows split: each thread runs its rows through all steps, no barrier"
      : units
          ? large(problem.sizes, problem.sizes.O, machine)
                ? "hidden units split, one barrier a step: the recurrent weights are large, and "
                  "each thread reads its part of them"
                : "hidden units split, one barrier a step: too few rows to split"
      : plan.threads > 1    ? "one thread per direction"
      : machine.threads > 1 ? "one thread: too little work to wake another"
                            : "one thread: no more are allowed";
  const auto read = [](Reading reading) {
    switch (reading) {
      case Reading::kPacked:
        return "packed into panels";
      case Reading::kBroadcast:
        return "as they lie, each weight times a vector of rows: it costs less to transpose these";
      case Reading::kDots:
      case Reading::kInPlace:
        break;
    }
    return "as they lie: too few reads to repay packing";
  };
  std::snprintf(
      line, sizeof(line),
      "threads %d of %d (%s); W_ih %s; W_hh %s; input product of %lld step%s at once; %.3g MFLOP",
      plan.threads, machine.threads, split, read(plan.input), read(plan.recurrent),
      static_cast<long long>(plan.block_steps), plan.block_steps == 1 ? "" : "s",
      flops_per_row(problem.sizes) * double(problem.total) * 1e-6);
  return line;
}

}  // namespace rnnkern
