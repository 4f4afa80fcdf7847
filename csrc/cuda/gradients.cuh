// Kernels around the products of whole matrices. They gather operands whose rows are not next to
// each other in memory, and sum columns for the gradients of biases.
#pragma once

#include "cuda/plan.h"
#include "cuda/stores.cuh"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

constexpr int kRowThreads = cuda::kBlockThreads;
constexpr int kRowBlocks = cuda::kSmallBlocks ? 1 : 4;  // of a multiprocessor

// Writes to[row] for every row with storage of some steps: the row of x at that step, or the state
// that entered it. A row that takes no part becomes zero.
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
    int64_t first_step, end_step;
    T* to;  // [total, width], which has memory for the rows of those steps alone
  };

  static constexpr bool kBlocksWait = false;
  static constexpr int kMostThreads = kRowThreads;

  RNNKERN_DEVICE static void run(const Arguments& a) {
    const Steps& s = a.steps;
    const Rows<T> to = saved_rows(s, a.to, 0, a.width);
    const int warps = threads_per_block() / kWarp, lane = thread_index() % kWarp;
    const int64_t first = int64_t(block_index()) * warps + thread_index() / kWarp;
    for (int64_t i = a.first_step * s.N + first; i < a.end_step * s.N;
         i += int64_t(blocks_in_grid()) * warps) {
      const int64_t t = i / s.N, rank = i % s.N;
      const bool active = rank < active_rows(s, t);
      if (!active && s.is_packed()) continue;
      const T* const from =
          !active      ? a.zeros
          : a.is_state ? previous_state(s, a.direction, t, rank, a.rows, a.initial, a.zeros)
                       : row_at(s, a.rows, t, rank);
      T* const row = row_at(s, to, t, rank);
      for (int64_t k = lane; k < a.width; k += kWarp) row[k] = from[k];
    }
  }
};

// Sums the rows of the gradients of slots, column by column. A block has kColumns columns of a part
// of the rows. Its warps take rows in turn, each several at once.
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

// Converts numbers to the type in which they are stored, with a thread for each.
template <typename T>
struct RoundNumbers {
  static constexpr bool kBlocksWait = false;
  static constexpr int kMostThreads = kRowThreads;

  struct Arguments {
    const Compute<T>* from;
    int64_t count;
    T* to;
  };

  RNNKERN_DEVICE static void run(const Arguments& a) {
    const int64_t i = int64_t(block_index()) * kRowThreads + thread_index();
    if (i < a.count) put(a.to + i, a.from[i]);
  }
};

// Computes the gradients of both biases, and of the cell's own parameters, from those sums, with a
// thread for each column.
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
    WeightGradients<T> to;
  };

  RNNKERN_DEVICE static void run(const Arguments& a) {
    const int64_t width = kShape.stored() * a.H;
    const int64_t column = int64_t(block_index()) * kRowThreads + thread_index();
    if (column >= width) return;
    A sum = 0;
    for (int64_t part = 0; part < a.parts; ++part) sum += a.sums[part * width + column];
    const int slot = int(column / a.H);
    const int64_t unit = column % a.H;
    const WeightGradients<T>& to = a.to;
    if constexpr (kShape.parameters > 0) {
      if (slot >= kShape.slots) {
        T* const own = to.parameters[slot - kShape.slots];
        if (own) put(own + unit, sum);
        return;
      }
    }
    if (to.b_ih && slot >= kShape.input_slot) {
      put(to.b_ih + input_gate<Cell>(slot) * a.H + unit, sum);
    }
    if (to.b_hh && slot < kShape.gates) put(to.b_hh + recurrent_gate<Cell>(slot) * a.H + unit, sum);
  }
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
