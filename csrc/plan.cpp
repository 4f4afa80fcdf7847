#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "known_cells.h"

namespace rnnkern {

double flops_per_row(const Sizes& z) {
  const CellShape shape = known_shape(z.cell);
  return 2.0 * shape.gates * double(z.H) * double(z.I + z.O) +
         (z.projected ? 2.0 * double(z.H) * double(z.O) : 0.0);
}

namespace {

// The operations that make it worth waking another thread. A parallel region costs about 3 us, in
// which one core does about 200 kFLOP, or less if the weights come from beyond its caches. A
// barrier in each step costs about 0.5 us.
constexpr double kFlopsPerThread = 200e3;
constexpr double kFlopsPerThreadStep = 40e3;
// The rows of one block of the input product: enough to read the weights of the input once for many
// rows, and more if they come from beyond the second-level cache.
constexpr int64_t kInputRows = 48, kInputRowsOfLarge = 256;
// The costs of the forward pass, in products of one row by packed weights. Packing reads and writes
// all weights once, which costs more if they come from beyond the second-level cache. A row that is
// alone in its step waits for the weights however they are read. So it takes longer, and packing
// costs fewer of them.
struct Costs {
  double packing, packing_of_large, dots, dots_of_unaligned;
};
constexpr Costs kOfOneRow = {8, 16, 1, 1}, kOfSeveralRows = {16, 24, 1.2, 1.2};
// With 16 registers only two rows share what is read of the weights, and not four. So each of them
// takes longer, and longer yet if rows of weights are not whole vectors, because every other load
// is then from two lines of the cache. Measured on an AMD EPYC (Zen 3), of weights that the
// products take as they are.
constexpr int kTileRowsOfFewRegisters = 3;
constexpr Costs kOfSeveralRowsInFewRegisters = {16, 24, 1.33, 1.9};
// A row by weights that are broadcast; and what a panel of one vector of rows takes besides, with
// few registers, for each of them.
constexpr double kBroadcast = 1.08, kLoneVector = 0.27;
// The last rows may be in dot products, while the others fill vectors. The dot products read the
// weights once more, which costs this much besides. Measured with 16 registers. With 32 it is done
// if rows of weights are not whole vectors, where dot products lose most.
constexpr double kRowsApart = 2;
// Dot products end with sums of lanes. Their cost is in vectors of k.
constexpr double kSumOfLanes = 3;
// If weights are broadcast, the batch is transposed, and so are the sums. The cost is in vectors of
// k. Weights that the products take in another type are converted for each product.
constexpr double kTransposition = 0.7, kConversion = 1.5;
// What 16 rows cost together in tiles: of packed weights, and of weights that are read in place.
constexpr double kRowsOfTile = 16, kTile = 2, kTileAsItLies = 2.5;
// In the backward pass the rows of the weights are already rows of a panel, and packing only moves
// them together. It pays for many reads, in one step or in several, or if the rows are such a
// distance apart that all of them compete for the same places in the cache. Every tile widens
// weights of fewer bits again. Measured where products copy no blocks of panels (gemm.h).
constexpr int64_t kBytesOfSamePlace = 4096;
constexpr int64_t kReadsInPlace = 64, kReadsInPlaceOfSamePlace = 3;
constexpr int64_t kReadsInPlaceOfWidened = 24;
constexpr int64_t kReadsInPlaceOfOneStep = 300, kReadsInPlaceOfOneStepOfSamePlace = 48;

// Rounding float32 weights to bfloat16 while they are packed costs about 8 products of one row of
// float32, and each row then costs half. Rounding them each time they are read gains nothing.
constexpr int64_t kRowsWorthBfloat16 = 16;
// Weights as sums of two bfloat16 take as many bytes as in float32, and are read twice. So the
// three products pay only if many rows share them.
constexpr int64_t kRowsWorthSplit = 64, kRowsOfStepWorthSplit = 4;

// Few batch rows are split among threads if each thread gets so many, if W_ih and W_hh each take at
// most this share of the second-level cache, and if a step has so many operations. Measured on two
// threads.
constexpr int64_t kFewRows = 4;
constexpr double kShareOfCache = 0.25, kFlopsOfStepOfFewRows = 320e3;

double weight_bytes(const Sizes& z, int64_t columns, const Machine& machine) {
  return double(known_shape(z.cell).gates) * double(z.H) * double(columns) * machine.element_bytes;
}

// Whether a matrix of weights comes from beyond the second-level cache each time it is read.
bool large(const Sizes& z, int64_t columns, const Machine& machine) {
  return weight_bytes(z, columns, machine) > double(machine.l2_bytes);
}

bool reads_recurrent(const Problem& problem) {
  return known_shape(problem.sizes.cell).recurrent && !problem.from_zeros;
}

struct Choice {
  Reading reading;
  int64_t by_dots = 0;  // of the last rows, if the matrix is broadcast
};

// How the forward pass reads a matrix of that many columns. This does not depend on the number of
// threads, because dot products have their own bits.
Choice cheapest_reading(const Problem& problem, const Machine& machine, int64_t columns,
                        bool may_broadcast) {
  if (problem.frozen || machine.rounded_for_products) return {Reading::kPacked};
  const Sizes& z = problem.sizes;
  const double vectors = double(columns) / (machine.lanes * machine.group);
  const auto T = double(problem.T), total = double(problem.total);
  const bool few_registers = machine.tile_rows <= kTileRowsOfFewRegisters && !machine.converts;
  const Costs& costs = problem.N == 1  ? kOfOneRow
                       : few_registers ? kOfSeveralRowsInFewRegisters
                                       : kOfSeveralRows;
  const bool is_aligned = columns % (machine.lanes * machine.group) == 0;
  const auto in_vectors = [&](int64_t rows) {
    return (rows + machine.lanes - 1) / machine.lanes * machine.lanes;
  };
  const auto tiles = [&](int64_t rows) {
    return std::ceil(double(in_vectors(rows)) / kRowsOfTile);
  };
  const double packed = (machine.by_tiles ? T * tiles(problem.N) * kTile : total) +
                        (large(z, z.I + z.O, machine) ? costs.packing_of_large : costs.packing);
  const double dot = (is_aligned ? costs.dots : costs.dots_of_unaligned) + kSumOfLanes / vectors;
  const double dots = total * dot;
  const bool converts = machine.converts && machine.group == 1;
  const auto broadcast_of = [&](int64_t rows) {
    const int64_t filled = in_vectors(rows);
    const bool has_lone_vector = few_registers && filled / machine.lanes % kPanelVectors == 1;
    const double as_it_lies =
        double(filled) * kBroadcast + (has_lone_vector ? machine.lanes * kLoneVector : 0);
    return T * ((machine.by_tiles ? tiles(rows) * kTileAsItLies : as_it_lies) +
                double(filled) * kTransposition / vectors + (converts ? kConversion : 0));
  };
  const bool may_dot = !problem.deterministic && columns >= 2 * machine.lanes;
  double broadcast = broadcast_of(problem.N);
  int64_t by_dots = 0;
  const bool may_be_apart = may_dot && (few_registers || !is_aligned) && !machine.converts &&
                            !machine.by_tiles && problem.T == 1;
  if (may_be_apart && problem.N > machine.lanes) {
    const int64_t last = problem.N % machine.lanes;
    const double apart = broadcast_of(problem.N - last) + kRowsApart + double(last) * dot;
    if (apart < broadcast) broadcast = apart, by_dots = last;
  }
  if (may_dot && dots <= packed && (!may_broadcast || dots <= broadcast)) return {Reading::kDots};
  if (may_broadcast && broadcast < packed) return {Reading::kBroadcast, by_dots};
  return {Reading::kPacked};
}

// Whether rows are split although the parts do not fill their tiles. Every thread then reads all
// weights in each step, and if they are small, that costs less than the barrier of split units.
// Weights that are broadcast want all rows in one vector, and tiles of AMX want 16.
bool splits_few_rows(const Problem& problem, const Machine& machine, const Plan& plan,
                     int64_t parts) {
  const Sizes& z = problem.sizes;
  return plan.recurrent == Reading::kPacked && !machine.by_tiles && problem.N >= kFewRows * parts &&
         flops_per_row(z) * double(problem.N) >= kFlopsOfStepOfFewRows &&
         weight_bytes(z, std::max(z.I, z.O), machine) <= kShareOfCache * double(machine.l2_bytes);
}

// Rows are split if every part still fills its register tiles, because then no barrier is needed,
// or if few rows are worth it. Units are split if there are too few rows. Units come first if the
// recurrent weights are large, because each thread then reads only its part of them in a step, and
// if they are broadcast, because the rows that fill vectors then stay together.
void split_work(const Problem& problem, const Machine& machine, double work, Plan* plan) {
  const int64_t tasks = problem.sizes.D;
  const int64_t wanted =
      std::min<int64_t>(machine.threads, int64_t(work * double(problem.total) / kFlopsPerThread));
  if (wanted <= 1) return;
  const int64_t parts = std::max<int64_t>(1, wanted / tasks);  // of each direction
  const int64_t tiles = (problem.N + machine.tile_rows - 1) / machine.tile_rows;
  const int64_t most_rows =
      std::max(splits_few_rows(problem, machine, *plan, parts) ? parts : 1, tiles / 2);
  const int64_t width = kPanelVectors * machine.lanes;
  const int64_t panels = (problem.sizes.H + width - 1) / width;
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

bool worth_split(int64_t total, int64_t N, bool deterministic) {
  return deterministic || (total >= kRowsWorthSplit && N >= kRowsOfStepWorthSplit);
}

Plan plan_forward(const Problem& problem, const Machine& machine, bool may_broadcast) {
  Plan plan;
  const Choice input = cheapest_reading(problem, machine, problem.sizes.I, may_broadcast),
               recurrent = cheapest_reading(problem, machine, problem.sizes.O, may_broadcast);
  plan.input = input.reading, plan.input_by_dots = input.by_dots;
  plan.recurrent = recurrent.reading, plan.recurrent_by_dots = recurrent.by_dots;
  split_work(problem, machine, flops_per_row(problem.sizes), &plan);
  const int64_t rows = std::max<int64_t>(1, problem.N / plan.row_blocks);
  const int64_t wanted =
      large(problem.sizes, problem.sizes.I, machine) ? kInputRowsOfLarge : kInputRows;
  plan.block_steps = std::clamp<int64_t>(wanted / rows, 1, std::max<int64_t>(1, problem.T));
  if (!reads_recurrent(problem)) plan.recurrent = Reading::kNone, plan.recurrent_by_dots = 0;
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
    const int64_t limit = machine.converts ? std::min(most, kReadsInPlaceOfWidened) : most;
    // If a row is shorter than a vector, the vector would reach beyond the next row.
    const bool packed = problem.deterministic || !machine.multiplies_in_place ||
                        columns < machine.lanes || problem.total > limit;
    return packed ? Reading::kPacked : Reading::kInPlace;
  };
  plan.input = reading(problem.sizes.I);
  plan.recurrent = reads_recurrent(problem) ? reading(problem.sizes.O) : Reading::kNone;
  return plan;
}

std::string describe(const Plan& plan, const Problem& problem, const Machine& machine,
                     bool backward) {
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
  const auto read = [&](Reading reading, int64_t by_dots) -> std::string {
    switch (reading) {
      case Reading::kPacked:
        return problem.frozen ? "packed before, when it was frozen" : "packed into panels";
      case Reading::kBroadcast:
        return "as they lie, each weight times a vector of rows: it costs less to transpose these" +
               (by_dots ? " (rows by dot products: " + std::to_string(by_dots) + ")" : "");
      case Reading::kDots:
      case Reading::kInPlace:
      case Reading::kNone:
        break;
    }
    return "as they lie: too few reads to repay packing";
  };
  const std::string recurrent =
      plan.recurrent != Reading::kNone ? "W_hh " + read(plan.recurrent, plan.recurrent_by_dots)
      : problem.from_zeros             ? "W_hh not read, because one step starts from zeros"
                                       : "no W_hh";
  const std::string steps = std::to_string(plan.block_steps);
  const std::string block =
      backward ? ""
               : "; input product of " + steps + (steps == "1" ? " step" : " steps") + " at once";
  std::snprintf(
      line, sizeof(line), "threads %d of %d (%s); W_ih %s; %s%s; %.3g MFLOP", plan.threads,
      machine.threads, split, read(plan.input, plan.input_by_dots).c_str(), recurrent.c_str(),
      block.c_str(),
      (backward ? kBackwardWork : 1) * flops_per_row(problem.sizes) * double(problem.total) * 1e-6);
  return line;
}

}  // namespace rnnkern
