// Which kernels run on a GPU, from sizes alone: the stepwise tier, or the resident one and how it
// is laid out.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <type_traits>

#include "scan.h"

namespace rnnkern::cuda {

// Of the resident tier. A product on the tensor cores is made of 16 rows by 8 columns; along k it
// goes by 64 bytes.
constexpr int kTileRows = 16, kTileColumns = 8, kChunkBytes = 64;

// Blocks of the stand-in are small, because fibers cost more than threads. RNNKERN_SIMT_FULL gives
// it those of a GPU.
#if defined(RNNKERN_SIMT) && !defined(RNNKERN_SIMT_FULL)
constexpr bool kSmallBlocks = true;
#else
constexpr bool kSmallBlocks = false;
#endif
constexpr int kBlockThreads = kSmallBlocks ? 64 : 256;  // of most kernels
constexpr int kResidentThreads = kBlockThreads, kResidentWarps = kResidentThreads / 32;

// How a block of the resident tier learns that what the others give it is there. By flags: a block
// writes its values, waits until they are in the L2, and sets a flag, which the others look at
// before they load. By value: a place holds a NaN that no block writes until its value is there, so
// whoever needs it loads until it is another one. That takes one trip through the L2 in place of
// four, and twice the buffers.
#ifdef RNNKERN_CUDA_BY_VALUE
constexpr bool kExchangesByValue = true;
#else
constexpr bool kExchangesByValue = false;
#endif
constexpr int kExchangeBuffers = kExchangesByValue ? 4 : 2;

constexpr int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of a call's memory that does not depend on the weights: what cuBLAS may use, and what may hold
// numbers of each step. So that it does not grow with T, a window of steps is handled at a time.
constexpr int64_t kLibraryBytes = 32 << 20, kWindowBytes = 32 << 20;

// How many steps such a window has, if each takes so many bytes: all T if they fit, else equal
// parts of them, at least one step. Where one buffer is written while another one is read there are
// `buffers` of them. RNNKERN_CUDA_WINDOW_BYTES names another limit, for tests.
int64_t window_steps(int64_t T, int64_t bytes_of_step, int buffers);

// What a GPU can do. The properties are its own; the costs are of its kind, as kinds.h has them.
struct Device {
  int multiprocessors = 1;
  int blocks_at_once = 1;  // for certain: one a multiprocessor, where the device is the process's
  int64_t shared_bytes = 48 << 10;  // that a block may have
  double clock_ghz = 1;
  double l2_tb_per_s = 2;      // read by all multiprocessors together
  double l2_mb = 40;           //
  double memory_tb_per_s = 1;  //
  double hand_off_us = 1;      // from a block's write to the others' having read it
  double launch_us = 2;        // of one kernel after the other
};

// The kind of GPU by compute capability: costs filled in.
Device device_of_kind(int major, int minor);

// How numbers are stored and multiplied.
struct Numbers {
  int operand_bytes = 4;      // of a number in a product
  int computed_bytes = 4;     // of what is computed with
  bool tensor_cores = false;  // multiply it

  friend bool operator==(const Numbers&, const Numbers&) = default;
};
template <typename T>
constexpr Numbers numbers_of(bool tf32) {
  return {int(sizeof(T)), int(sizeof(Compute<T>)),
          kNarrow<T> || (std::is_same_v<T, float> && tf32)};
}

struct Problem {
  Sizes sizes;
  int64_t T = 0, N = 0;
  Numbers numbers;
  bool backward = false;
  bool deterministic = false;  // one order of summation for every N and T, forward
  bool has_library = true;     // for products of whole matrices
  // The input product is made where the slots will be saved; its operand x has to be gathered.
  bool inputs_are_saved = false, gathers_input = false;

  bool has_fixed_order() const { return deterministic && !backward; }
  bool own_products() const { return has_fixed_order() || !has_library; }
};

// Slots that are saved in the type that they are computed in hold their input product until then.
template <typename T>
constexpr bool kSavesInputs = !kNarrow<T>;

// A product's sums: tiles of so many rows and columns; and how many chunks of weights a warp has
// room for beside them.
struct TileShape {
  int row_tiles = 2, column_tiles = 1, held_chunks = 0;

  friend constexpr bool operator==(const TileShape&, const TileShape&) = default;
};

// What a step costs, and how the resident tier is laid out: D * row_teams * unit_blocks blocks.
struct Plan {
  bool resident = false;  // else stepwise, and the layout means nothing
  TileShape tile;         // of a block's product
  int row_teams = 1, unit_blocks = 1;
  int passes = 1;         // row_teams * passes parts of the batch, of as many rows as columns
  int groups = 1;         // unit_blocks * groups parts of the hidden units
  int units = 1;          // of a group
  int chunks = 1;         // along k
  int warp_chunks = 1;    // of them a warp takes so many, the last one maybe fewer,
  int working_warps = 1;  // until there are none left:
  int held_chunks = 0;    // the first ones stay in registers,
  int shared_chunks = 0;  // the next ones in shared memory, the rest comes through the L2
  int64_t shared_bytes = 0;
  int64_t bytes_per_step = 0;  // through the L2, by all blocks; stepwise, of weights
  // Forward: steps whose input product is made at once, and which the resident tier takes in one
  // launch. While it does, the next window's product is made in a second buffer.
  int64_t window = 0;
  double us_per_step = 0;  // as expected, with the step's share of what comes before the first

  constexpr int rows() const { return tile.row_tiles * kTileRows; }
  constexpr int columns() const { return tile.column_tiles * kTileColumns; }
  constexpr int64_t blocks(int directions) const {
    return int64_t(directions) * row_teams * unit_blocks;
  }
};

// Where the sum of row m and a column of a tile lies in shared memory, behind the sums of a warp
// before it. The rows follow each other. Within a row, a column is exchanged with another one: the
// bits of m that the bank does not depend on yet are added to the column's, from the top. So the
// banks are all different, both if a tensor core's result is stored and if the sums of neighbouring
// units are read (tile.cuh proves it).
constexpr int sum_mask(int m, int columns) {
  int mask = 0;
  for (int bit = 0; bit < 5; ++bit) mask |= (m >> bit & 1) << (4 - bit);
  return mask & (columns - 1);
}
constexpr int sum_place(int m, int column, int columns) {
  return m * columns + (column ^ sum_mask(m, columns));
}

// Numbers of all warps' sums, and those that a block keeps for its units and rows.
constexpr int64_t sum_count(int rows, int columns) {
  return int64_t(kResidentWarps) * rows * columns;
}
constexpr int64_t kept_count(const Plan& plan, int slots) {
  const int64_t units = int64_t(plan.groups) * plan.units;
  return 2 * units * plan.passes * plan.columns() + slots * units;
}

// Fewer chunks in most kernels of small blocks, whose warps are few, as their layers are small.
constexpr int room_for(int chunks) { return kSmallBlocks && chunks > 3 ? 3 : chunks; }

// Register tiles that there are kernels for. Forward, the largest has 16 units of a cell with
// several gates, 32 of one with one.
constexpr std::array<TileShape, 3> forward_tiles(int gates) {
  return {{{2, 1, 6}, {2, 2, room_for(3)}, {gates == 1 ? 2 : gates, 4, 0}}};
}
constexpr TileShape kBackwardTiles[] = {{1, 1, room_for(12)}, {1, 2, room_for(9)}, {2, 4, 0}};
// Without tensor cores, where a lane has sums of all rows and no registers to spare.
constexpr TileShape kOneByOneForwardTiles[] = {{2, 1, 0}, {2, 2, 0}};
constexpr TileShape kOneByOneBackwardTiles[] = {{1, 1, 0}, {1, 2, 0}, {1, 4, 0}};

Plan plan_for(const Problem& problem, const Device& device);

// Of so many multiprocessors, those that blocks may take which wait for each other. Others need
// some for kernels that wait for a peer, as those of NCCL do: RNNKERN_CUDA_LEAVE_FREE says how
// many.
int blocks_of(int multiprocessors);

// The choice and its reason, for people.
std::string describe(const Plan& plan, const Problem& problem, const Device& device);

}  // namespace rnnkern::cuda
