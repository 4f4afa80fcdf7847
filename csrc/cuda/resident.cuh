// What forward and backward of the resident tier share: the weights of the loop are read once and
// stay with the multiprocessors that use them, and what passes between steps goes through the L2.
//
//            k (h, or gradients of slots) ────────────►
//   block 0  ┌────────────────────────────────────────┐  its units' weights: chunks of 64 bytes
//            │ warp 0 │ warp 1 │ warp 2 │ ...          │  along k, each warp its own; in shared
//   block 1  ├────────────────────────────────────────┤  memory as far as it goes, the rest from
//            │                                        │  scratch memory through the L2
//    ...     └────────────────────────────────────────┘
//
// A team of blocks takes one direction of some batch rows through all steps. One step of a block:
//   1. Each warp waits for the flags of the blocks that make its part of k, not for the team; reads
//      it from the exchange buffer straight into the registers that the products want (tile.cuh).
//   2. The warps' sums meet in shared memory; each thread makes the cells of its own units and
//   rows,
//      whose states stay with it, writes what others need to the exchange buffer, and the block's
//      flag says so.
//   3. Only then it stores outputs and what backward needs, and loads what the next step adds to
//   the
//      products.
// The exchange buffer is double: what a block writes after step i was read in step i-1, and its
// flags of step i have told it that all of the team are past that.
//
// Where a team has more rows than a block has columns it takes them in several passes, each with
// flags of its own; where it has more units than all blocks have rows, in several groups.
#pragma once

#include "cells/cells.h"
#include "cuda/plan.h"
#include "cuda/tile.cuh"
#include "steps.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

using cuda::kResidentThreads, cuda::kResidentWarps;
static_assert(kResidentThreads % kWarp == 0, "a block is whole warps");

// The plan, and the memory that goes with it.
struct Residency : cuda::Plan {
  int* flags = nullptr;      // [D][parts][unit_blocks], zero at the start
  Quad* exchange = nullptr;  // [2][D][parts * columns][chunks], zero at the start
  Quad* streamed = nullptr;  // [blocks][groups][chunks - resident_chunks] chunks of weights
};

template <typename E, int kRowTiles, int kColumnTiles>
class ResidentBlock {
 public:
  using Product = Tile<E, kRowTiles, kColumnTiles>;
  using A = typename Product::A;
  static constexpr int kRows = Product::kRows, kColumns = Product::kColumns;
  using Sums = Partials<A, kColumns>;

  // Quads of a row of the exchange buffer, and of a chunk of packed weights.
  static constexpr int kQuadsOfRow = kChunkBytes / int(sizeof(Quad));
  static constexpr int kQuadsOfChunk = kRows * kQuadsOfRow;

  RNNKERN_DEVICE ResidentBlock(const Residency& r, int directions, int64_t N, int64_t H)
      : r_(r),
        N_(N),
        H_(H),
        member_(block_index() % r.unit_blocks),
        team_(block_index() / r.unit_blocks % r.row_teams),
        direction_(block_index() / (r.unit_blocks * r.row_teams)),
        directions_(directions),
        weights_(reinterpret_cast<Quad*>(shared_memory())),
        sums_{
            reinterpret_cast<A*>(weights_ + int64_t(r.groups) * r.resident_chunks * kQuadsOfChunk),
            kRows} {}

  RNNKERN_DEVICE int direction() const { return direction_; }
  // What follows in shared memory.
  RNNKERN_DEVICE A* rest() const { return sums_.sums + cuda::sum_count(kRows, kColumns); }

  RNNKERN_DEVICE int part(int pass) const { return pass * r_.row_teams + team_; }
  RNNKERN_DEVICE Range rows(int pass) const {
    const int64_t begin = int64_t(part(pass)) * kColumns;
    return {least(begin, N_), least(begin + kColumns, N_)};
  }
  RNNKERN_DEVICE Range units(int group) const {
    const int64_t begin = (int64_t(member_) * r_.groups + group) * r_.units;
    return {least(begin, H_), least(begin + r_.units, H_)};
  }

  // Reads the weights: weight(group, m, k) for k < K. Rows m come first in memory where m_first.
  // They are there once the block has met.
  template <bool m_first, typename Weight>
  RNNKERN_DEVICE void pack(int64_t K, int rows, Weight weight) const {
    const int64_t width = int64_t(r_.chunks) * kChunkElements<E>, count = width * kRows;
    for (int group = 0; group < r_.groups; ++group) {
      for (int64_t i = thread_index(); i < count; i += kResidentThreads) {
        const int m = int(m_first ? i % kRows : i / width);
        const int64_t k = m_first ? i / kRows : i % width;
        const int in_chunk = int(k % kChunkElements<E>) * int(sizeof(E));
        char* const chunk = reinterpret_cast<char*>(chunk_of(group, int(k / kChunkElements<E>)));
        auto* const to =
            reinterpret_cast<E*>(chunk + Product::place(m, in_chunk / 4) * 4 + in_chunk % 4);
        put_operand(to, k < K && m < rows ? weight(group, m, k) : A(0));
      }
    }
  }

  // Where number k of a row stands in the exchange buffer of an epoch.
  RNNKERN_DEVICE E* exchanged(int64_t epoch, int64_t slot, int64_t k) const {
    return reinterpret_cast<E*>(row_of(epoch, slot)) + k;
  }

  // The sums of one group over the rows of one pass, as exchanged in `epoch`; then of all warps in
  // shared memory, once the block has met. `per_unit` numbers along k are of one unit.
  RNNKERN_DEVICE void multiply(int pass, int group, int64_t epoch, int per_unit) const {
    constexpr int kAhead = kColumnTiles > 2 ? 2 : 4;  // chunks on their way at once
    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    if (warp < working_warps()) {
      const Range chunks = split(r_.chunks, working_warps(), warp);
      wait_for(pass, chunks, epoch, per_unit);
      Product product;
      for (int64_t c = chunks.begin; c < chunks.end; c += kAhead) {
        Quad b[kAhead][kColumnTiles];
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          if (c + j >= chunks.end) break;
#pragma unroll
          for (int n = 0; n < kColumnTiles; ++n) {
            const int64_t slot = int64_t(part(pass)) * kColumns + n * kTileColumns + lane / 4;
            b[j][n] = load_from_l2(row_of(epoch, slot) + (c + j) * kQuadsOfRow + lane % 4);
          }
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          if (c + j >= chunks.end) break;
          product.add(chunk_of(group, int(c + j)), b[j]);
        }
      }
      product.store(sums_, warp);
    }
    sync_block();
  }

  // What multiply() has found for row m and a column, the warps' sums in their order.
  RNNKERN_DEVICE A sum(int m, int column) const {
    A all = 0;
    for (int warp = 0; warp < working_warps(); ++warp) all += sums_.at(warp, m)[column];
    return all;
  }

  // All of the block have read the sums; what they have written to the exchange buffer is there for
  // the team.
  RNNKERN_DEVICE void publish(int pass, int64_t epoch) const {
    sync_block();
    if (thread_index() == 0) set_flag(flags(pass) + member_, int(epoch));
  }

 private:
  RNNKERN_DEVICE int working_warps() const {
    return r_.chunks < kResidentWarps ? r_.chunks : kResidentWarps;
  }

  RNNKERN_DEVICE int* flags(int pass) const {
    return r_.flags +
           (direction_ * r_.row_teams * r_.passes + part(pass)) * int64_t(r_.unit_blocks);
  }

  // The blocks that make these chunks have published the epoch, for all lanes of the warp.
  RNNKERN_DEVICE void wait_for(int pass, const Range& chunks, int64_t epoch, int per_unit) const {
    const int64_t per_block = int64_t(r_.units) * r_.groups * per_unit;
    const int64_t last = least(H_ * per_unit, chunks.end * kChunkElements<E>) - 1;
    const int64_t first = chunks.begin * kChunkElements<E> / per_block;
    for (int64_t m = first + thread_index() % kWarp; m <= last / per_block; m += kWarp) {
      wait_until(flags(pass) + m, int(epoch));
    }
    sync_warp();
  }

  RNNKERN_DEVICE Quad* row_of(int64_t epoch, int64_t slot) const {
    const int64_t rows = int64_t(r_.row_teams) * r_.passes * kColumns;
    return r_.exchange +
           ((epoch % 2 * directions_ + direction_) * rows + slot) * r_.chunks * kQuadsOfRow;
  }

  RNNKERN_DEVICE Quad* chunk_of(int group, int chunk) const {
    if (chunk < r_.resident_chunks) {
      return weights_ + (int64_t(group) * r_.resident_chunks + chunk) * kQuadsOfChunk;
    }
    const int64_t streamed = r_.chunks - r_.resident_chunks;
    return r_.streamed +
           ((int64_t(block_index()) * r_.groups + group) * streamed + chunk - r_.resident_chunks) *
               kQuadsOfChunk;
  }

  const Residency& r_;
  const int64_t N_, H_;
  const int member_, team_, direction_, directions_;
  Quad* const weights_;  // in shared memory
  const Sums sums_;
};

// The units and rows of which a thread makes the cells, the same ones in every step: the units of a
// row are neighbours.
template <int kUnits, int kColumns>
struct Pairs {
  static constexpr int kCount = (kUnits * kColumns + kResidentThreads - 1) / kResidentThreads;

  int unit[kCount], column[kCount];
  int units;

  RNNKERN_DEVICE explicit Pairs(int units) : units(units) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int index = thread_index() + i * kResidentThreads;
      unit[i] = index % units;
      column[i] = index / units;
    }
  }

  // f(i, slot, unit) for those of the thread that there are.
  template <typename F>
  RNNKERN_DEVICE void for_each(const Range& rows, const Range& own_units, F f) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int64_t slot = rows.begin + column[i], u = own_units.begin + unit[i];
      if (slot < rows.end && u < own_units.end) f(i, slot, u);
    }
  }
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
