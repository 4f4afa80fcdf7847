// The product of whole matrices of any layout:  to[m][n] = sum over k of a[m][k] b[k][n].
//
// A block computes a tile of kRows x kColumns numbers, and each of its warps all rows of
// kTileColumns columns. Both operands go through shared memory, as tile.cuh needs them, one chunk
// along k at a time. The next chunk is loaded while one is multiplied. A result is a sum of sums
// over at most kSumWidth k: the order depends on k alone, and rounding does not grow with it.
#pragma once

#include "cuda/library.h"
#include "cuda/stores.cuh"
#include "cuda/tile.cuh"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

// The product of operands that are stored as T and multiplied as E, with results R.
template <typename T, typename E, typename R>
class MatrixProduct {
  using A = Compute<T>;
  // Without tensor cores there are just enough rows that every thread has a number to move.
  using Product = Tile<E, kOnTensorCores<E> ? 4 : int(sizeof(E)) / 4, 1>;
  using Sums = Partials<A, Product::kRows, cuda::kTileColumns>;

 public:
  static constexpr int kThreads = cuda::kBlockThreads;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kRows = Product::kRows, kColumns = kWarps * cuda::kTileColumns;

  struct Arguments {
    cuda::Product product;
    int64_t row_blocks;  // of kRows rows each
  };

  static constexpr bool kBlocksWait = false;
  static constexpr int kMostThreads = kThreads;
  static constexpr int64_t kStagedBytes = int64_t(kRows + kColumns) * kChunkBytes;
  static constexpr int64_t kSumBytes = int64_t(kWarps) * Sums::kOfWarp * int64_t(sizeof(A));
  static constexpr int64_t kSharedBytes = kStagedBytes > kSumBytes ? kStagedBytes : kSumBytes;

  RNNKERN_DEVICE static void run(const Arguments& arguments) { MatrixProduct(arguments).all(); }

 private:
  static constexpr int kWidth = kChunkElements<E>, kSumWidth = 256;
  // How many numbers a thread moves at once.
  static constexpr int kOfA = kRows * kWidth / kThreads, kOfB = kColumns * kWidth / kThreads;
  static_assert(kRows * kWidth % kThreads == 0 && kColumns * kWidth % kThreads == 0 &&
                kSumWidth % kWidth == 0);

  struct Numbers {
    A a[kOfA], b[kOfB];
  };

  // Which numbers of an operand's tile a thread moves, by their place across k (in rows of a, in
  // columns of b) and along k. Neighbouring threads take neighbours in memory.
  struct Walk {
    int across, k, across_step, k_step;
  };
  template <int kAcross>
  RNNKERN_DEVICE static Walk walk(bool k_is_contiguous) {
    static_assert(kThreads % kAcross == 0 && kThreads % kWidth == 0);
    const int thread = thread_index();
    if (k_is_contiguous) return {thread / kWidth, thread % kWidth, kThreads / kWidth, 0};
    return {thread % kAcross, thread / kAcross, 0, kThreads / kAcross};
  }

  RNNKERN_DEVICE explicit MatrixProduct(const Arguments& a)
      : p_(a.product),
        first_row_(block_index() % a.row_blocks * kRows),
        first_column_(block_index() / a.row_blocks * kColumns),
        walk_a_(walk<kRows>(!p_.a.transposed)),
        walk_b_(walk<kColumns>(p_.b.transposed)) {}

  RNNKERN_DEVICE void all() const {
    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    Product sums, part;
    Numbers next;
    load(0, &next);
    for (int64_t k = 0; k < p_.k; k += kWidth) {
      sync_block();  // what was staged before has been multiplied
      stage(next);
      sync_block();
      load(k + kWidth, &next);
      const Quad b[1] = {staged_b()[warp * cuda::kTileColumns * kQuadsOfRow + lane]};
      part.add(staged_a(), b);
      if ((k + kWidth) % kSumWidth == 0) {
        sums.add(part);
        part = {};
      }
    }
    sums.add(part);
    sync_block();
    const Sums shared = {reinterpret_cast<A*>(shared_memory())};
    sums.store(shared, warp);
    sync_block();
    R* const to = static_cast<R*>(p_.to);
    for (int i = thread_index(); i < kRows * kColumns; i += kThreads) {
      const int m = i / kColumns, column = i % kColumns;
      const int64_t row = first_row_ + m, n = first_column_ + column;
      if (row >= p_.m || n >= p_.n) continue;
      R* const at = to + row * p_.row + n;
      const A sum =
          shared.of(column / cuda::kTileColumns)[shared.place(m, column % cuda::kTileColumns)];
      put(at, p_.adds ? value(*at) + sum : sum);
    }
  }

  RNNKERN_DEVICE void load(int64_t k, Numbers* to) const {
    if (k >= p_.k) return;  // there is no such chunk
    load(p_.a, walk_a_, !p_.a.transposed, first_row_, p_.m, k, to->a);
    load(p_.b, walk_b_, p_.b.transposed, first_column_, p_.n, k, to->b);
  }
  // Loads numbers of the tile that begins at `across` and `k`, and zeros beyond its ends.
  template <int kCount>
  RNNKERN_DEVICE void load(const cuda::Matrix& matrix, const Walk& w, bool k_is_contiguous,
                           int64_t across, int64_t across_end, int64_t k, A (&to)[kCount]) const {
    across += w.across, k += w.k;
    const int64_t across_apart = k_is_contiguous ? matrix.row : 1;
    const int64_t k_apart = k_is_contiguous ? 1 : matrix.row;
    const T* from = static_cast<const T*>(matrix.data) + across * across_apart + k * k_apart;
    const int64_t apart = w.across_step * across_apart + w.k_step * k_apart;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const bool is_there = across + j * w.across_step < across_end && k + j * w.k_step < p_.k;
      to[j] = is_there ? value(from[j * apart]) : A(0);
    }
  }

  RNNKERN_DEVICE void stage(const Numbers& numbers) const {
#pragma unroll
    for (int j = 0; j < kOfA; ++j) {
      const int m = walk_a_.across + j * walk_a_.across_step;
      const int k = walk_a_.k + j * walk_a_.k_step;
      put_operand(Product::number(staged_a(), m, k), numbers.a[j]);
    }
#pragma unroll
    for (int j = 0; j < kOfB; ++j) {
      const int n = walk_b_.across + j * walk_b_.across_step;
      const int k = walk_b_.k + j * walk_b_.k_step;
      put_operand(reinterpret_cast<E*>(staged_b() + n * kQuadsOfRow) + k, numbers.b[j]);
    }
  }

  RNNKERN_DEVICE static Quad* staged_a() { return reinterpret_cast<Quad*>(shared_memory()); }
  RNNKERN_DEVICE static Quad* staged_b() { return staged_a() + kRows * kQuadsOfRow; }

  const cuda::Product& p_;
  const int64_t first_row_, first_column_;
  const Walk walk_a_, walk_b_;
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
