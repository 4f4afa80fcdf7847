// Around the products of whole matrices: operands whose rows do not stand one after the other are
// gathered first, and biases are sums of columns.
#pragma once

#include "cuda/plan.h"
#include "cuda/stores.cuh"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

constexpr int kRowThreads = cuda::kBlockThreads;
#ifdef RNNKERN_SIMT
constexpr int kRowBlocks = 1;  // fibers are dear
#else
constexpr int kRowBlocks = 4;  // of a multiprocessor
#endif

// to[row] for every row with storage: row of x at that step, or the state that entered it; zero
// where a row takes no part.
template <typename T>
class GatherRows {
 public:
  struct Arguments {
    Steps steps;
    Rows<const T> rows;
    State<const T> initial;  // of a state
    const T* zeros;          // [width]
    bool is_state;
    int direction;
    int64_t width;
    T* to;  // [total, width]
  };

  static constexpr bool kBlocksWait = false;
  static constexpr int kMostThreads = kRowThreads;

  RNNKERN_DEVICE static void run(const Arguments& a) {
    const Steps& s = a.steps;
    const Rows<T> to = saved_rows(s, a.to, 0, a.width);
    const int warps = threads_per_block() / kWarp, lane = thread_index() % kWarp;
    const int64_t first = int64_t(block_index()) * warps + thread_index() / kWarp;
    for (int64_t i = first; i < s.T * s.N; i += int64_t(blocks_in_grid()) * warps) {
      const int64_t t = i / s.N, slot = i % s.N;
      const bool active = slot < active_rows(s, t);
      if (!active && s.start) continue;
      const T* const from =
          !active      ? a.zeros
          : a.is_state ? previous_state(s, a.direction, t, slot, a.rows, a.initial, a.zeros)
                       : row_at(s, a.rows, t, slot);
      T* const row = row_at(s, to, t, slot);
      for (int64_t k = lane; k < a.width; k += kWarp) row[k] = from[k];
    }
  }
};

// Sums over the rows of gradients of slots, by columns: a block has kColumns columns of a part of
// the rows, its warps take rows in turn, each several at once.
template <typename T>
class SlotSums {
  using A = Compute<T>;
  static constexpr int kAtOnce = 8;

 public:
  static constexpr bool kBlocksWait = false;
  static constexpr int kMostThreads = kRowThreads;
  static constexpr int kColumns = kWarp;

  struct Arguments {
    const T* dslots;  // [rows, width]
    int64_t rows, width, column_blocks, row_blocks;
    A* sums;  // [row_blocks, width]
  };

  static constexpr int64_t kSharedBytes = sizeof(A) * kRowThreads;

  RNNKERN_DEVICE static void run(const Arguments& a) {
    A* const shared = reinterpret_cast<A*>(shared_memory());  // [warp][column]
    constexpr int kWarps = kRowThreads / kWarp;
    const int warp = thread_index() / kWarp;
    const int64_t column = block_index() % a.column_blocks * kColumns + thread_index() % kWarp;
    const int64_t row_block = block_index() / a.column_blocks;
    const Range rows = split(a.rows, a.row_blocks, row_block);
    A parts[kAtOnce] = {};
    for (int64_t first = rows.begin + warp; column < a.width && first < rows.end;
         first += kAtOnce * kWarps) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int64_t row = first + j * kWarps;
        if (row < rows.end) parts[j] += value(a.dslots[row * a.width + column]);
      }
    }
    A all = parts[0];
#pragma unroll
    for (int j = 1; j < kAtOnce; ++j) all += parts[j];
    shared[thread_index()] = all;
    sync_block();
    if (warp > 0 || column >= a.width) return;
    for (int w = 1; w < kWarps; ++w) all += shared[w * kWarp + thread_index()];
    a.sums[row_block * a.width + column] = all;
  }
};

// Gradients of both biases from those sums, a thread for each column.
template <typename T, typename Cell>
class BiasGradients {
  using A = Compute<T>;
  static constexpr CellShape kShape = Cell::kShape;

 public:
  static constexpr bool kBlocksWait = false;
  static constexpr int kMostThreads = kRowThreads;

  struct Arguments {
    const A* sums;  // [parts, S * H]
    int64_t parts, H;
    T *b_ih, *b_hh;  // or null: not wanted
  };

  RNNKERN_DEVICE static void run(const Arguments& a) {
    const int64_t width = kShape.slots * a.H;
    const int64_t column = int64_t(block_index()) * kRowThreads + thread_index();
    if (column >= width) return;
    A sum = 0;
    for (int64_t part = 0; part < a.parts; ++part) sum += a.sums[part * width + column];
    const int slot = int(column / a.H);
    const int64_t unit = column % a.H;
    if (a.b_ih && slot >= kShape.input_slot) put(a.b_ih + input_gate<Cell>(slot) * a.H + unit, sum);
    if (a.b_hh && slot < kShape.gates) put(a.b_hh + recurrent_gate<Cell>(slot) * a.H + unit, sum);
  }
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
