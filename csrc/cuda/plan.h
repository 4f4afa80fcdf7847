// Which kernels run on a GPU, from sizes alone: the stepwise tier, or the resident one and how it
// is laid out.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <type_traits>

#include "scan.h"

namespace rnnkern::cuda {

// The tiles of the resident tier. A product on the tensor cores is 16 rows by 8 columns, and takes
// 64 bytes along k at a time.
constexpr int kTileRows = 16, kTileColumns = 8, kChunkBytes = 64;

// The stand-in has small blocks, because fibers cost more than threads. With RNNKERN_SIMT_FULL it
// has those of a GPU.
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
// whoever needs it loads until it is another one. That takes two trips through the L2 in place of
// four, and twice the buffers.
#ifdef RNNKERN_CUDA_BY_VALUE
constexpr bool kExchangesByValue = true;
#else
constexpr bool kExchangesByValue = false;
#endif
constexpr int kExchangeBuffers = kExchangesByValue ? 4 : 2;

constexpr int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The memory that cuBLAS may use, and the memory for numbers of each step. A call handles one
// window of steps at a time, so that its memory does not grow with T.
constexpr int64_t kLibraryBytes = 32 << 20, kWindowBytes = 32 << 20;

// How many steps such a window has, if each takes so many bytes: all T if they fit, else equal
// parts of them, at least one step. There are several `buffers` if one is written while another one
// is read. RNNKERN_CUDA_WINDOW_BYTES names another limit, for tests.
int64_t window_steps(int64_t T, int64_t bytes_of_step, int buffers);

// What a GPU can do. Its properties are those of the device, and the costs are those of its kind,
// from kinds.h.
struct Device {
  int multiprocessors = 1;
  int blocks_at_once = 1;           // guaranteed, if the process has the whole device
  int64_t shared_bytes = 48 << 10;  // that a block may have
  double clock_ghz = 1;
  double l2_tb_per_s = 2;      // read by all multiprocessors together
  double l2_mb = 40;           //
  double memory_tb_per_s = 1;  //
  double hand_off_us = 1;      // from a block's write to the others' having read it
  double launch_us = 2;        // of one kernel after the other
};

// A device with the costs of its kind, by compute capability.
Device device_of_kind(int major, int minor);

// How numbers are stored and multiplied.
struct Numbers {
  int operand_bytes = 4;      // of a number in a product
  int computed_bytes = 4;     // of a number in all else
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
  // The input product is stored in the memory of the saved slots; its operand x has to be gathered.
  bool inputs_are_saved = false, gathers_input = false;

  bool has_fixed_order() const { return deterministic && !backward; }
  bool own_products() const { return has_fixed_order() || !has_library; }
};

// Whether the memory of the saved slots can hold their input product before, because slots are
// saved in the type in which they are computed.
template <typename T>
constexpr bool kSavesInputs = !kNarrow<T>;

// The sums of a product, in tiles of rows and columns, and how many chunks of weights a warp can
// hold beside them.
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
  // Forward: steps whose input product is computed at once, and which the resident tier runs in one
  // launch. Meanwhile the product of the next window is computed into a second buffer.
  int64_t window = 0;
  double us_per_step = 0;  // as expected, with the step's share of what comes before the first

  constexpr int rows() const { return tile.row_tiles * kTileRows; }
  constexpr int columns() const { return tile.column_tiles * kTileColumns; }
  constexpr int64_t blocks(int directions) const {
    return int64_t(directions) * row_teams * unit_blocks;
  }
};

// Where the sum of row m and a column of a tile is in the sums of a warp in shared memory. The rows
// follow each other. Within a row, columns are exchanged: the bits of m on which the bank does not
// depend yet are added to those of the column, from the top. So the banks are all different, both
// if a tensor core's result is stored and if the sums of neighbouring units are read (tile.cuh
// proves it).
constexpr int sum_mask(int m, int columns) {
  int mask = 0;
  for (int bit = 0; bit < 5; ++bit) mask |= (m >> bit & 1) << (4 - bit);
  return mask & (columns - 1);
}
constexpr int sum_place(int m, int column, int columns) {
  return m * columns + (column ^ sum_mask(m, columns));
}

// How many numbers the sums of all warps have, and how many a block keeps for its units and rows.
constexpr int64_t sum_count(int rows, int columns) {
  return int64_t(kResidentWarps) * rows * columns;
}
constexpr int64_t kept_count(const Plan& plan, int slots) {
  const int64_t units = int64_t(plan.groups) * plan.units;
  return 2 * units * plan.passes * plan.columns() + slots * units;
}

// Most kernels of small blocks have room for fewer chunks, because their layers are small and their
// warps few.
constexpr int room_for(int chunks) { return kSmallBlocks && chunks > 3 ? 3 : chunks; }

// The register tiles for which there are kernels. In the forward pass the largest has 16 units, or
// 32 of a cell with one gate.
constexpr std::array<TileShape, 3> forward_tiles(int gates) {
  return {{{2, 1, 6}, {2, 2, room_for(3)}, {gates == 1 ? 2 : gates, 4, 0}}};
}
constexpr TileShape kBackwardTiles[] = {{1, 1, room_for(12)}, {1, 2, room_for(9)}, {2, 4, 0}};
// The same without tensor cores. A lane has sums of all rows then, and no registers to spare.
constexpr TileShape kOneByOneForwardTiles[] = {{2, 1, 0}, {2, 2, 0}};
constexpr TileShape kOneByOneBackwardTiles[] = {{1, 1, 0}, {1, 2, 0}, {1, 4, 0}};

Plan plan_for(const Problem& problem, const Device& device);

// How many multiprocessors the blocks that wait for each other may take. RNNKERN_CUDA_LEAVE_FREE
// says how many are left to kernels that wait for a peer, as those of NCCL do.
int blocks_of(int multiprocessors);

// The choice and its reason, for people to read.
std::string describe(const Plan& plan, const Problem& problem, const Device& device);

}  // namespace rnnkern::cuda
