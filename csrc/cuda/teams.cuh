// What the kernels of the plain tier share: every shape and every type, simple enough to be the
// reference of the faster tiers.
//
// A team of blocks takes one direction of one block of batch rows through all steps, as in
// cpu/forward.h: each block owns some hidden units, h(t) is read by the whole team. Between the
// steps stands a flag for each block, "I have come this far": a block waits for the flags of its
// team, and there is no barrier of the grid. All blocks of a launch have to run at once.
//
// A warp makes all gates of one unit for kRowTile rows; its lanes split the sum over k. The rows of
// the left operand are staged in shared memory by kChunk columns. Per step and tile of rows a block
// reads G U (I + O) weights for U units, from the cache.
#pragma once

#include "cuda/stores.cuh"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

constexpr int kRowTile = 4;
constexpr int kChunk = 512;
constexpr int kPlainThreads = 256;
static_assert(kRowTile <= kWarp, "one lane a row for the cell");
static_assert(kPlainThreads % kWarp == 0, "a block is whole warps");

// How a launch is laid out: teams of unit_blocks blocks each.
struct Teams {
  int row_blocks = 1, unit_blocks = 1;
  int* flags = nullptr;  // [D * row_blocks * unit_blocks], zero at the start
};

// A block's part of the scan.
struct Share {
  int direction, member;
  Range rows, units, outputs;  // of N, of H, of O
  int* flags;                  // of the team
};

RNNKERN_DEVICE Share share_of(const Sizes& z, const Steps& s, const Teams& teams, int block) {
  const int member = block % teams.unit_blocks, team = block / teams.unit_blocks;
  return {team % z.D,
          member,
          split(s.N, teams.row_blocks, team / z.D),
          split(z.H, teams.unit_blocks, member),
          split(z.O, teams.unit_blocks, member),
          teams.flags + team * teams.unit_blocks};
}

// All blocks of the team have published `epoch`; what they wrote before may be read once the block
// has met again, as it does at the start of add_product.
RNNKERN_DEVICE void wait_for(const Share& share, const Teams& teams, int epoch) {
  for (int m = thread_index(); m < teams.unit_blocks; m += threads_per_block()) {
    wait_until(share.flags + m, epoch);
  }
}
RNNKERN_DEVICE void publish(const Share& share, int epoch) {
  sync_block();
  if (thread_index() == 0) set_flag(share.flags + share.member, epoch);
}

RNNKERN_DEVICE int lane_index() { return thread_index() % kWarp; }
RNNKERN_DEVICE int warp_index() { return thread_index() / kWarp; }
RNNKERN_DEVICE int warps_per_block() { return threads_per_block() / kWarp; }

// sums[i][r] += sum over k < K of weight(i, k) left_row(r)[k], for i < kCount and r < rows, lane by
// lane. All threads of the block call this together; those of a warp without a column of its own
// (mine false) help to stage.
template <int kCount, typename A, typename LeftRow, typename Weight>
RNNKERN_DEVICE void add_product(int64_t K, int rows, bool mine, LeftRow left_row, Weight weight,
                                A (*sums)[kRowTile]) {
  A* staged = reinterpret_cast<A*>(shared_memory());  // [kRowTile][kChunk]
  for (int64_t k0 = 0; k0 < K; k0 += kChunk) {
    const int depth = int(least(kChunk, K - k0));
    sync_block();  // nobody reads the chunk before; all have waited for their team
    for (int i = thread_index(); i < rows * depth; i += threads_per_block()) {
      staged[i / depth * kChunk + i % depth] = value(left_row(i / depth)[k0 + i % depth]);
    }
    sync_block();
    for (int k = lane_index(); mine && k < depth; k += kWarp) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const A w = value(weight(i, k0 + k));
#pragma unroll
        for (int r = 0; r < kRowTile; ++r) {
          if (r < rows) sums[i][r] += w * staged[r * kChunk + k];
        }
      }
    }
  }
}

// The value of this lane's row, with indices that the compiler knows.
template <typename A>
RNNKERN_DEVICE A own_row(const A (&rows)[kRowTile]) {
  A own = 0;
#pragma unroll
  for (int r = 0; r < kRowTile; ++r) {
    if (r == lane_index()) own = rows[r];
  }
  return own;
}

// f(row, column) for the tiles of rows [begin, end) and the block's own columns, one column a warp;
// beyond the end of the columns too, for all threads call it together.
template <typename F>
RNNKERN_DEVICE void for_each_tile(const Range& rows, const Range& columns, F f) {
  for (int64_t row = rows.begin; row < rows.end; row += kRowTile) {
    for (int64_t c = columns.begin; c < columns.end; c += warps_per_block()) {
      f(row, c + warp_index());
    }
  }
}

// f(row, column) for the rows [begin, end) and the block's own columns, shared out among threads.
// The same thread takes the same column of the same row wherever the ranges are the same.
template <typename F>
RNNKERN_DEVICE void for_each_element(const Range& rows, const Range& columns, F f) {
  const int64_t width = columns.end - columns.begin;
  for (int64_t i = thread_index(); i < (rows.end - rows.begin) * width; i += threads_per_block()) {
    f(rows.begin + i / width, columns.begin + i % width);
  }
}

// Rows that never take part end where they began: a state, and the gradient of one, pass unchanged.
// Nothing where `to` is not wanted.
template <typename T>
RNNKERN_DEVICE void pass_idle_rows(const Steps& s, const Share& share, const Range& columns,
                                   const State<const T>& from, const State<T>& to) {
  const int64_t first = active_rows(s, 0);
  const Range idle = {first < share.rows.begin ? share.rows.begin : first, share.rows.end};
  for_each_element(idle, columns, [&](int64_t slot, int64_t column) {
    pass_element(s, from, to, share.direction, slot, column);
  });
}

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
