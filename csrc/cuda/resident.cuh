// What the forward and the backward pass of the resident tier share. The weights of the loop are
// read once and stay in the multiprocessors that use them. What passes between steps goes through
// the L2.
//
//            k (h, or gradients of slots) ────────────►
//   block 0  ┌────────────────────────────────────────┐  its units' weights: chunks of 64 bytes
//            │ warp 0 │ warp 1 │ warp 2 │ ...          │  along k, each warp its own; in registers,
//   block 1  ├────────────────────────────────────────┤  then in shared memory as far as it goes,
//            │                                        │  the rest from scratch memory through the
//    ...     └────────────────────────────────────────┘  L2
//
// A team of blocks takes one direction of some batch rows through all steps. One step of a block:
//   1. Each thread computes what does not depend on other blocks: addresses, and what is added to
//      the products. Then each warp waits for the flags of the blocks that compute its part of k,
//      and not for the whole team. It reads that part from the exchange buffer straight into the
//      registers of the products (tile.cuh).
//   2. The sums of the warps meet in shared memory. Each thread computes the cells of its own unit
//      and rows, whose states stay with it, and writes what others need to the exchange buffer.
//      Then the flag of the block is set.
//   3. Only then do the threads store outputs and what backward needs, and load what the next step
//      adds to the products.
// The exchange buffer is double. What a block overwrites after step i was read in step i-1, and the
// flags of step i have told the block that all of the team have done so.
//
// In place of flags, the values themselves may say that they are there (plan.h). The buffer is then
// fourfold, because a place has to be made absent before it is written again. Once a block has read
// what step i-1 gave, the whole team has read what step i-2 gave. So each thread first gives its
// own values of step i, then makes those of step i-2 absent, and then orders its memory. A thread
// that loads such a place again, for step i+2, has seen a value that was stored after that, and has
// ordered its own memory since. Rows that take no part in a step are given as they are, as long as
// others of their pass take part, because warps load whole tiles. A pass without rows is left out
// by all blocks.
//
// If a team has more rows than a block has columns, each step takes several passes, each with flags
// of its own. If it has more units than all its blocks have rows, the units are in several groups.
#pragma once

#include "cells/cells.h"
#include "cuda/plan.h"
#include "cuda/stores.cuh"
#include "cuda/tile.cuh"
#include "steps.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

using cuda::kResidentThreads, cuda::kResidentWarps;
static_assert(kResidentThreads % kWarp == 0, "a block is whole warps");

// The plan, and the memory that goes with it.
struct Residency : cuda::Plan {
  int* flags = nullptr;    // [D][parts][unit_blocks], zero at the start
  int* gave_up = nullptr;  // in the host's memory: a block has waited too long
  // [kExchangeBuffers][D][parts * columns][chunks], zero at the start
  Quad* exchange = nullptr;
  // [blocks][groups][chunks] of weights that do not stay in a multiprocessor; null if all stay.
  Quad* scratch = nullptr;
};

// A pass and a group within a step. next() is what comes after: the next group, pass or step.
struct Turn {
  int pass = 0, group = 0;

  RNNKERN_DEVICE bool is_last_group(const Residency& r) const { return group + 1 == r.groups; }
  RNNKERN_DEVICE bool is_last(const Residency& r) const {
    return is_last_group(r) && pass + 1 == r.passes;
  }
  RNNKERN_DEVICE Turn next(const Residency& r) const {
    if (!is_last_group(r)) return {pass, group + 1};
    return {is_last(r) ? 0 : pass + 1, 0};
  }
};

template <typename E, cuda::TileShape kTile>
class ResidentBlock {
  static constexpr int kRowTiles = kTile.row_tiles, kColumnTiles = kTile.column_tiles;

 public:
  static constexpr bool kByValue = cuda::kExchangesByValue;
  using Product = Tile<E, kRowTiles, kColumnTiles>;
  using A = typename Product::A;
  static constexpr int kRows = Product::kRows, kColumns = Product::kColumns;
  using Sums = Partials<A, kRows, kColumns>;

  // Quads of a chunk of packed weights.
  static constexpr int kQuadsOfChunk = kRows * kQuadsOfRow;

  // Each unit has `per_unit` numbers along k.
  RNNKERN_DEVICE ResidentBlock(const Residency& r, int directions, int64_t N, int64_t H,
                               int per_unit)
      : r_(r),
        N_(N),
        H_(H),
        member_(block_index() % r.unit_blocks),
        team_(block_index() / r.unit_blocks % r.row_teams),
        direction_(block_index() / (r.unit_blocks * r.row_teams)),
        directions_(directions),
        first_chunk_(thread_index() / kWarp * r.warp_chunks),
        sums_{reinterpret_cast<A*>(shared_chunk(r.groups, 0, 0))} {
    if (thread_index() / kWarp >= r_.working_warps) return;
    chunks_ = int(least(r.warp_chunks, r.chunks - first_chunk_));
    const int64_t per_block = int64_t(r.units) * r.groups * per_unit;
    const int64_t first = int64_t(first_chunk_) * kChunkElements<E>;
    const int64_t last = least(H * per_unit, first + chunks_ * kChunkElements<E>) - 1;
    first_maker_ = int(first / per_block);
    last_maker_ = int(last / per_block);
  }

  RNNKERN_DEVICE int direction() const { return direction_; }

  // Calls f(turn) for every pass and group, in their order within a step.
  template <typename F>
  RNNKERN_DEVICE void for_each_turn(F f) const {
    for (int pass = 0; pass < r_.passes; ++pass) {
      for (int group = 0; group < r_.groups; ++group) f(Turn{pass, group});
    }
  }

  // The shared memory behind the sums.
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

  // Reads the weights that the warp multiplies by. They can be used after the next barrier of the
  // block. Row m of a group begins at row_of(group, m), which is null if there is no such row, and
  // its number k < K is at + place_of(k). Each lane reads what it holds itself: 16 bytes of two
  // rows of each row tile.
  template <typename T, typename RowOf, typename PlaceOf>
  RNNKERN_DEVICE void pack(int K, RowOf row_of, PlaceOf place_of) {
    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    if (warp >= r_.working_warps) {  // its sums stay zero
      for (int i = lane; i < Sums::kOfWarp; i += kWarp) sums_.of(warp)[i] = 0;
    }
    // Unrolling more beside held weights would cost registers.
    [[maybe_unused]] constexpr int kUnrolled = kTile.held_chunks > 0 ? 1 : 4;
    for (int group = 0; group < r_.groups; ++group) {
      const T* rows[kRowTiles * 2];
#pragma unroll
      for (int i = 0; i < kRowTiles * 2; ++i) {
        rows[i] = row_of(group, i / 2 * kTileRows + lane / 4 + i % 2 * 8);
      }
#pragma unroll
      for (int j = 0; j < kTile.held_chunks; j += together()) {
        if (j >= r_.held_chunks) break;
        pack_chunks<together()>(rows, K, j, place_of, held_ + j);
      }
#pragma unroll kUnrolled
      for (int j = r_.held_chunks; j < chunks_; ++j) {
        Quad quads[1][kRowTiles * 2];
        pack_chunks<1>(rows, K, j, place_of, quads);
        Quad* const chunk = j < r_.held_chunks + r_.shared_chunks
                                ? shared_chunk(group, warp, j - r_.held_chunks)
                                : scratch_chunk(group, first_chunk_ + j);
#pragma unroll
        for (int i = 0; i < kRowTiles * 2; ++i) {
          chunk[Product::place_of_quad(i / 2, i % 2)] = quads[0][i];
        }
      }
    }
  }

  // The place of number k of a row in the exchange buffer of an epoch.
  RNNKERN_DEVICE E* exchanged(int64_t epoch, int64_t rank, int64_t k) const {
    return reinterpret_cast<E*>(row_of(epoch, rank)) + k;
  }
  // Writes a number to its place, or several ones, which are a struct with the array `of`.
  template <typename Numbers>
  RNNKERN_DEVICE static void give(Numbers* to, Numbers numbers) {
    if constexpr (!kByValue) {
      *to = numbers;
    } else if constexpr (std::is_same_v<Numbers, E>) {
      store_relaxed(to, present(numbers));
    } else {
#pragma unroll
      for (E& number : numbers.of) number = present(number);
      store_relaxed(to, numbers);
    }
  }
  template <typename Numbers>
  RNNKERN_DEVICE static void make_absent(Numbers* to) {
    store_relaxed(to, absent<Numbers>());
  }
  // Multiplies the weights of a turn's group by the rows of its pass, as exchanged in `epoch`. The
  // sums of all warps are then in shared memory, because this ends with a barrier of the block.
  RNNKERN_DEVICE void multiply(const Turn& turn, int64_t epoch) const {
    const int warp = thread_index() / kWarp;
    // By value, a block without units of this group must not load: the others do not wait for it.
    const bool looks = !kByValue || units(turn.group).begin < units(turn.group).end;
    if (warp < r_.working_warps && looks) {
      const Quad* states[kColumnTiles];
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        const int column = n * kTileColumns + thread_index() % kWarp / 4;
        states[n] = row_of(epoch, int64_t(part(turn.pass)) * kColumns + column) +
                    first_chunk_ * kQuadsOfRow + thread_index() % 4;
        compute_here(states[n]);
      }
      int stay = int(least(chunks_, r_.held_chunks + r_.shared_chunks));
      const Quad* shared = shared_chunk(turn.group, warp, 0);
      compute_here(stay, shared);
      if constexpr (!kByValue) wait_for(turn.pass, epoch);
      Product product;
      if constexpr (kTile.held_chunks > 0) {
        if (r_.held_chunks) {
          add_chunks<kTile.held_chunks>(0, stay, shared, states, &product);
        } else {
          add_chunks<0>(0, stay, shared, states, &product);
        }
      } else {
        add_chunks<0>(0, stay, shared, states, &product);
      }
      if (stay < chunks_) {
        add_chunks<0>(stay, chunks_, scratch_chunk(turn.group, first_chunk_ + stay), states,
                      &product);
      }
      product.store(sums_, warp);
    }
    sync_block();
  }

  // The result of multiply() for row m and a column is sum(place_of_sum(m, column)), which adds the
  // sums of the warps in order.
  RNNKERN_DEVICE static int place_of_sum(int m, int column) { return Sums::place(m, column); }
  // The place of the sum `rows` rows further on in the same column, if the two numbers of rows have
  // no bit in common.
  RNNKERN_DEVICE static int place_further_on(int place, int rows) {
    return (place ^ cuda::sum_mask(rows, kColumns)) + rows * kColumns;
  }
  RNNKERN_DEVICE A sum(int place) const {
    A all = sums_.of(0)[place];
#pragma unroll
    for (int warp = 1; warp < kResidentWarps; ++warp) all += sums_.of(warp)[place];
    return all;
  }

  // Waits until all threads of the block have read the sums of this turn. After the last group,
  // publishes for the team what they have written to the exchange buffer.
  RNNKERN_DEVICE void finish(const Turn& turn, int64_t epoch) const {
    publish(turn, epoch, !kByValue);
    if (kByValue && turn.is_last(r_)) order_memory();
  }
  // The same with a flag, also in builds whose steps have none.
  RNNKERN_DEVICE void publish(const Turn& turn, int64_t epoch, bool by_flag = true) const {
    sync_block();
    // The last thread is the most likely to have no cells of its own. With several passes its warp
    // does not multiply either (plan.cpp), because the fence would hold up the next pass.
    if (by_flag && turn.is_last_group(r_) && thread_index() == kResidentThreads - 1) {
      set_flag(flags(turn.pass) + member_, int(epoch));
    }
  }
  // Waits for what the team publishes, in all passes.
  RNNKERN_DEVICE void wait_for_team(int64_t epoch) const {
    if (thread_index() / kWarp >= r_.working_warps) return;
    for (int pass = 0; pass < r_.passes; ++pass) wait_for(pass, epoch);
  }

 private:
  RNNKERN_DEVICE int* flags(int pass) const {
    return r_.flags +
           (direction_ * r_.row_teams * r_.passes + part(pass)) * int64_t(r_.unit_blocks);
  }

  // Waits until the blocks that compute the warp's chunks have published the epoch, for all lanes.
  RNNKERN_DEVICE void wait_for(int pass, int64_t epoch) const {
    for (int m = first_maker_ + thread_index() % kWarp; m <= last_maker_; m += kWarp) {
      wait_until(flags(pass) + m, int(epoch), r_.gave_up);
    }
    sync_warp();
  }

  // How many chunks are loaded ahead, as far as registers allow: 3 KB for a warp if products take
  // little time.
  static constexpr int kMostAhead = !kOnTensorCores<E>             ? 1
                                    : kColumnTiles > 2             ? 2
                                    : kRowTiles * kColumnTiles > 1 ? 3
                                                                   : 6;
  static constexpr int kAhead =
      0 < kTile.held_chunks && kTile.held_chunks < kMostAhead ? kTile.held_chunks : kMostAhead;

  // Adds the products of the warp's chunks [begin, end), the first kHeld with weights in registers,
  // the next ones with `weights`.
  template <int kHeld>
  RNNKERN_DEVICE void add_chunks(int begin, int end, const Quad* weights,
                                 const Quad* const (&states)[kColumnTiles],
                                 Product* product) const {
    static_assert(kHeld % kAhead == 0, "places of chunks ahead are known to the compiler");
    Quad ahead[kAhead][kColumnTiles];
    const auto load = [&](int chunk, Quad(&to)[kColumnTiles]) {
      if (chunk >= end) return;
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        const Quad* const from = states[n] + int64_t(chunk) * kQuadsOfRow;
        to[n] = kByValue ? load_relaxed<E>(from) : load_from_l2(from);
      }
    };
    const auto are_there = [&](const Quad(&quads)[kColumnTiles]) {
      bool absent = false;
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) absent |= any_absent<E>(quads[n]);
      return !any_lane(absent);
    };
    // After multiply(chunk) the place of the chunk is free for another one. Products without tensor
    // cores take so long that the next chunk is loaded before them.
    const auto take = [&](int chunk, Quad(&from)[kColumnTiles], auto multiply) {
      if constexpr (kByValue) {
#pragma unroll 1
        for (int looks = 0; !are_there(from); ++looks) {
          look_again(looks, r_.gave_up);
          load(chunk, from);
        }
      }
      if constexpr (kOnTensorCores<E>) {
        multiply(from);
        load(chunk + kAhead, from);
      } else {
        Quad now[kColumnTiles];
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) now[n] = from[n];
        load(chunk + kAhead, from);
        multiply(now);
      }
    };
#pragma unroll
    for (int j = 0; j < kAhead; ++j) load(begin + j, ahead[j]);
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
        if (begin + j >= end) return;
        take(begin + j, ahead[j % kAhead],
             [&](const auto& states) { product->add_held(held_[j], states, j); });
      }
    }
    for (int c = kHeld; begin + c < end; c += kAhead) {
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (begin + c + j >= end) break;
        take(begin + c + j, ahead[j], [&](const auto& states) {
          product->add(weights + int64_t(c - kHeld + j) * kQuadsOfChunk, states, j);
        });
      }
    }
  }

  RNNKERN_DEVICE Quad* row_of(int64_t epoch, int64_t rank) const {
    const int64_t rows = int64_t(r_.row_teams) * r_.passes * kColumns;
    return r_.exchange +
           ((epoch % cuda::kExchangeBuffers * directions_ + direction_) * rows + rank) * r_.chunks *
               kQuadsOfRow;
  }

  // The chunk of that index among those of a warp in shared memory.
  RNNKERN_DEVICE Quad* shared_chunk(int group, int warp, int index) const {
    // The argument is used in place of the member, with which ptxas spills more registers for true
    // float32.
    const int64_t warps = int64_t(group) * r_.working_warps + warp;
    return reinterpret_cast<Quad*>(shared_memory()) +
           (warps * r_.shared_chunks + index) * kQuadsOfChunk;
  }
  RNNKERN_DEVICE Quad* scratch_chunk(int group, int chunk) const {
    return r_.scratch +
           ((int64_t(block_index()) * r_.groups + group) * r_.chunks + chunk) * kQuadsOfChunk;
  }
  // Chunks of weights that are read at once: so many that a lane has 64 loads under way.
  static constexpr int together() {
    constexpr int kLoads = kRowTiles * 2 * int(sizeof(Quad) / sizeof(E));
    int count = kTile.held_chunks > 0 ? kTile.held_chunks : 1;
    while (count > 1 && (count * kLoads > 64 || kTile.held_chunks % count > 0)) --count;
    return count;
  }

  // Reads the lane's quads of the warp's chunks from `index` on, of rows that begin at `rows`.
  template <int kCount, typename T, typename PlaceOf>
  RNNKERN_DEVICE void pack_chunks(const T* const (&rows)[kRowTiles * 2], int K, int index,
                                  PlaceOf place_of, Quad (*to)[kRowTiles * 2]) const {
    constexpr int kPerQuad = int(sizeof(Quad) / sizeof(E));
    T numbers[kCount][kRowTiles * 2][kPerQuad];
    hold_loads();
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      int chunk = first_chunk_ + index + c;
      compute_here(chunk);
      const unsigned k =
          unsigned(chunk) * kChunkElements<E> + unsigned(thread_index() % 4) * kPerQuad;
      decltype(place_of(k)) places[kPerQuad];
#pragma unroll
      for (int j = 0; j < kPerQuad; ++j) places[j] = place_of(k + unsigned(j));
#pragma unroll
      for (int i = 0; i < kRowTiles * 2; ++i) {
        const int count = rows[i] && index + c < chunks_ ? K - int(k) : 0;
#pragma unroll
        for (int j = 0; j < kPerQuad; ++j) {
          numbers[c][i][j] = j < count ? rows[i][places[j]] : T{};
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
        Quad two[2], arranged[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) two[i] = quad_of(numbers[c][2 * tile + i]);
        Product::arrange(two, arranged);
        to[c][2 * tile] = arranged[0], to[c][2 * tile + 1] = arranged[1];
      }
    }
  }
  template <typename T, int kPerQuad>
  RNNKERN_DEVICE static Quad quad_of(const T (&numbers)[kPerQuad]) {
    struct Operands {
      E of[kPerQuad];
    } operands;
#pragma unroll
    for (int j = 0; j < kPerQuad; ++j) operands.of[j] = operand<E>(numbers[j]);
    return bit_cast<Quad>(operands);
  }

  const Residency& r_;
  const int64_t N_, H_;
  const int member_, team_, direction_, directions_;
  const int first_chunk_;  // of the warp
  // The number of its chunks, and the blocks that compute what they are multiplied by.
  int chunks_ = 0, first_maker_ = 0, last_maker_ = -1;
  const Sums sums_;
  // The weights of the first chunks of the warp: [chunk][row tile, half].
  Quad held_[kTile.held_chunks > 0 ? kTile.held_chunks : 1][kRowTiles * 2];
};

// The visits of a step and of its neighbours. Each step costs one load, well ahead of its use.
class Visits {
 public:
  RNNKERN_DEVICE Visits(const Steps& s, bool ascending, int first = 0)
      : s_(s), ascending_(ascending), index_(first) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) active_[i] = int(active_at(s, ascending, first + i - 2));
  }

  // Goes on to the next step.
  RNNKERN_DEVICE void advance() {
    ++index_;
#pragma unroll
    for (int i = 0; i + 1 < kKept; ++i) active_[i] = active_[i + 1];
    active_[kKept - 1] = int(active_at(s_, ascending_, index_ + kKept - 3));
  }

  RNNKERN_DEVICE Visit before(const Range& rows) const { return of<-1>(rows); }
  RNNKERN_DEVICE Visit now(const Range& rows) const { return of<0>(rows); }
  RNNKERN_DEVICE Visit next(const Range& rows) const { return of<1>(rows); }

 private:
  static constexpr int kKept = 5;  // of the steps from index - 2 on

  template <int kStep>
  RNNKERN_DEVICE Visit of(const Range& rows) const {
    const int64_t index = index_ + kStep;
    return visit(ascending_ ? index : s_.T - 1 - index, active_[kStep + 1], active_[kStep + 2],
                 active_[kStep + 3], rows.begin, rows.end);
  }

  const Steps& s_;
  const bool ascending_;
  // An int suffices, because there is memory for all steps and rows.
  int index_;
  int active_[kKept];
};

// Flags in one register.
template <int kCount>
class Bits {
 public:
  static_assert(kCount <= 32, "one register");
  RNNKERN_DEVICE void set(int i, bool flag) { bits_ = (bits_ & ~(1u << i)) | uint32_t(flag) << i; }
  RNNKERN_DEVICE bool operator[](int i) const { return bits_ >> i & 1; }

 private:
  uint32_t bits_ = 0;
};

// The cells that a thread computes, which are the same in every step: one unit in several rows.
// Neighbouring threads have neighbouring units of a row.
template <int kUnits, int kColumns>
class Pairs {
 public:
  static_assert(kUnits <= kResidentThreads, "a sweep of the threads takes all units");
  static constexpr int kCount =
      (kColumns + kResidentThreads / kUnits - 1) / (kResidentThreads / kUnits);

  RNNKERN_DEVICE explicit Pairs(int units)
      : unit_(thread_index() % units),
        first_(thread_index() / units),
        apart_(kResidentThreads / units) {}

  RNNKERN_DEVICE int unit() const { return unit_; }
  RNNKERN_DEVICE int column(int i) const { return first_ + i * apart_; }

  // Calls f(i, rank, unit) for those cells of the thread that exist.
  template <typename F>
  RNNKERN_DEVICE void for_each(const Range& rows, const Range& units, F f) const {
    const int64_t u = units.begin + unit_;
    if (first_ >= apart_ || u >= units.end) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int64_t rank = rows.begin + column(i);
      if (rank < rows.end) f(i, rank, u);
    }
  }

 private:
  const int unit_, first_, apart_;
};

// Two numbers of each cell of a thread, kept in shared memory from step to step. It has no
// references to other members, because these would keep the whole kernel's object out of registers.
template <typename A, typename OwnPairs, int kColumns>
class Kept {
 public:
  RNNKERN_DEVICE Kept(const Residency& r, A* numbers)
      : numbers_(numbers),
        groups_(r.groups),
        units_(r.units),
        count_(r.passes * of_turn() * groups_) {}

  RNNKERN_DEVICE A& first(const Turn& turn, const OwnPairs& pairs, int i) const {
    return numbers_[(turn.pass * groups_ + turn.group) * of_turn() + pairs.column(i) * units_ +
                    pairs.unit()];
  }
  RNNKERN_DEVICE A& second(const Turn& turn, const OwnPairs& pairs, int i) const {
    return (&first(turn, pairs, i))[count_];
  }

  // The memory behind these numbers.
  RNNKERN_DEVICE A* end() const { return numbers_ + 2 * count_; }

  // The same numbers, in memory that has those of all blocks.
  RNNKERN_DEVICE Kept elsewhere(A* of_all) const {
    Kept other = *this;
    other.numbers_ = of_all + int64_t(block_index()) * 2 * count_;
    return other;
  }

 private:
  RNNKERN_DEVICE int of_turn() const { return units_ * kColumns; }

  A* numbers_;
  int groups_, units_, count_;
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
