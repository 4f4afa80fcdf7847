// Around the products of whole matrices: operands whose rows do not stand one after the other are
// gathered first, and biases are sums of columns.
#pragma once

#include "cuda/stores.cuh"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

#ifdef RNNKERN_SIMT
constexpr int kRowThreads = 64, kRowBlocks = 1;  // fibers are dear
#else
constexpr int kRowThreads = 256, kRowBlocks = 4;  // of a multiprocessor
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

// Sums over all rows of a dense matrix, by columns. Rows are shared out among the warps of a block,
// and each warp's sum is one of sums over kSumRows rows, so that rounding does not grow with their
// number.
template <typename T>
class ColumnSums {
  using A = Compute<T>;
  static constexpr int kSumRows = 64;

 public:
  static constexpr bool kBlocksWait = false;
  static constexpr int kMostThreads = kRowThreads;
  static constexpr int kColumns = kWarp;  // of a block

  struct Arguments {
    const T* from;  // [rows, width], from column `first` on
    int64_t rows, width, first, count;
    T* to;  // [count]
  };

  static constexpr int64_t kSharedBytes = sizeof(A) * kRowThreads;

  RNNKERN_DEVICE static void run(const Arguments& a) {
    A* const shared = reinterpret_cast<A*>(shared_memory());  // [warp][column]
    const int warps = threads_per_block() / kWarp, warp = thread_index() / kWarp;
    const int64_t column = int64_t(block_index()) * kColumns + thread_index() % kWarp;
    A all = 0;
    for (int64_t begin = warp; column < a.count && begin < a.rows; begin += warps * kSumRows) {
      A part = 0;
      const int64_t end = least(begin + warps * kSumRows, a.rows);
      for (int64_t row = begin; row < end; row += warps) {
        part += value(a.from[row * a.width + a.first + column]);
      }
      all += part;
    }
    shared[thread_index()] = all;
    sync_block();
    if (warp > 0 || column >= a.count) return;
    for (int w = 1; w < warps; ++w) all += shared[w * kWarp + thread_index()];
    put(a.to + column, all);
  }
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
