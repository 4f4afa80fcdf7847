// The product of one block in one step:  sums[m][n] = sum over k of a[m][k] b[n][k],  a the block's
// part of the weights, prepared once, b rows of a state or of gradients that change with each step.
//
// k comes in chunks of 64 bytes. A warp takes whole chunks, all rows m and all columns n of them,
// so what is in b is read once in a block; the warps' sums are added through shared memory
// afterwards, always in the same order. Lane 4 g + q holds bytes 16 q to 16 q + 15 of the chunk for
// columns g, g + 8, ... of b, straight from where the other blocks have written it.
//
// Operands E: Bf16, F16 and Tf32 meet on the tensor cores; float and double are multiplied one by
// one, all of a chunk's k in the order in which they stand, for results as exact as those of the
// CPU.
#pragma once

#include "cuda/device.cuh"
#include "cuda/plan.h"
#include "elements.h"

namespace rnnkern {

template <>
struct ComputeOf<RNNKERN_NAMESPACE::Tf32> {
  using Type = float;
};

namespace RNNKERN_NAMESPACE {

using cuda::kChunkBytes, cuda::kTileColumns, cuda::kTileRows;
template <typename E>
constexpr int kChunkElements = kChunkBytes / int(sizeof(E));

// Quads of a row of a chunk.
constexpr int kQuadsOfRow = kChunkBytes / int(sizeof(Quad));

template <typename E>
constexpr bool kOnTensorCores = sizeof(E) == 2 || std::is_same_v<E, Tf32>;

// Numbers as operands.
RNNKERN_DEVICE void put_operand(float* to, float x) { *to = x; }
RNNKERN_DEVICE void put_operand(double* to, double x) { *to = x; }
RNNKERN_DEVICE void put_operand(Bf16* to, float x) { to->bits = uint16_t(narrow(Bf16{}, x)); }
RNNKERN_DEVICE void put_operand(F16* to, float x) { to->bits = uint16_t(narrow(F16{}, x)); }
RNNKERN_DEVICE void put_operand(Tf32* to, float x) { *to = to_tf32(x); }

// The warps' sums in shared memory: [warp][m][kStride].
template <typename A, int kColumns>
struct Partials {
  static constexpr int kStride = cuda::sum_stride(kColumns);

  A* sums;
  int rows;

  RNNKERN_DEVICE A* at(int warp, int m) const { return sums + (warp * rows + m) * kStride; }
};

template <typename E, int kRowTiles, int kColumnTiles, bool = kOnTensorCores<E>>
class Tile;

// On the tensor cores. A chunk of a: [row tile][half][lane] quads.
template <typename E, int kRowTiles, int kColumnTiles>
class Tile<E, kRowTiles, kColumnTiles, true> {
 public:
  using A = float;
  static constexpr int kRows = kRowTiles * kTileRows, kColumns = kColumnTiles * kTileColumns;

  // The word of a packed chunk where bytes 4 word to 4 word + 3 of row m stand.
  RNNKERN_DEVICE static int place(int m, int word) {
    const int q = word / 4, half = word % 4 / 2, lane = m % 8 * 4 + q;
    const int in_quad = m % kTileRows / 8 + 2 * (word % 2);
    return ((m / kTileRows * 2 + half) * kWarp + lane) * 4 + in_quad;
  }

  // Number k of row m of a packed chunk.
  RNNKERN_DEVICE static E* number(Quad* chunk, int m, int k) {
    const int byte = k * int(sizeof(E));
    return reinterpret_cast<E*>(reinterpret_cast<char*>(chunk) + place(m, byte / 4) * 4 + byte % 4);
  }

  RNNKERN_DEVICE void add(const Quad* a, const Quad (&b)[kColumnTiles]) {
    const int lane = thread_index() % kWarp;
#pragma unroll
    for (int i = 0; i < kRowTiles * 2; ++i) add_half(i, a[i * kWarp + lane], b);
  }
  // With the lane's own quads of a.
  RNNKERN_DEVICE void add_held(const Quad (&a)[kRowTiles * 2], const Quad (&b)[kColumnTiles]) {
#pragma unroll
    for (int i = 0; i < kRowTiles * 2; ++i) add_half(i, a[i], b);
  }

  // Adds the sums of another one.
  RNNKERN_DEVICE void add(const Tile& other) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums_[m][n][i] += other.sums_[m][n][i];
      }
    }
  }

  RNNKERN_DEVICE void store(const Partials<A, kColumns>& to, int warp) const {
    const int g = thread_index() % kWarp / 4, q = thread_index() % 4;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          to.at(warp, m * kTileRows + g + i / 2 * 8)[n * kTileColumns + 2 * q + i % 2] =
              sums_[m][n][i];
        }
      }
    }
  }

 private:
  // Of a row tile and a half of the chunk.
  RNNKERN_DEVICE void add_half(int i, const Quad& left, const Quad (&b)[kColumnTiles]) {
    const int m = i / 2, half = i % 2;
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
      multiply_tiles<E>(left, b[n].words[2 * half], b[n].words[2 * half + 1], sums_[m][n]);
    }
  }

  A sums_[kRowTiles][kColumnTiles][4] = {};
};

// One by one. A chunk of a: [m][16] words, as they come.
template <typename E, int kRowTiles, int kColumnTiles>
class Tile<E, kRowTiles, kColumnTiles, false> {
 public:
  using A = E;
  static constexpr int kRows = kRowTiles * kTileRows, kColumns = kColumnTiles * kTileColumns;

  RNNKERN_DEVICE static int place(int m, int word) { return m * (kChunkBytes / 4) + word; }

  // Number k of row m of a packed chunk.
  RNNKERN_DEVICE static E* number(Quad* chunk, int m, int k) {
    const int byte = k * int(sizeof(E));
    return reinterpret_cast<E*>(reinterpret_cast<char*>(chunk) + place(m, byte / 4) * 4 + byte % 4);
  }

  RNNKERN_DEVICE void add(const Quad* a, const Quad (&b)[kColumnTiles]) {
    const int q = thread_index() % 4;
    Numbers right[kColumnTiles];
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) right[n] = bit_cast<Numbers>(b[n]);
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      if (m % 16 == 0) hold_loads();
      const Quad quad = a[m * 4 + q];  // whole: a cast in place would read it byte by byte
      const auto left = bit_cast<Numbers>(quad);
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int j = 0; j < kPerQuad; ++j) sums_[m][n] += left.of[j] * right[n].of[j];
      }
    }
  }

  RNNKERN_DEVICE void add(const Tile& other) {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) sums_[m][n] += other.sums_[m][n];
    }
  }

  // The four lanes of a column add their sums up, each for a quarter of the rows.
  RNNKERN_DEVICE void store(const Partials<A, kColumns>& to, int warp) const {
    const int g = thread_index() % kWarp / 4, q = thread_index() % 4;
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int m = 0; m < kRows; m += 4) {
        const A even = pair(sums_[m][n], sums_[m + 1][n], 1);
        const A odd = pair(sums_[m + 2][n], sums_[m + 3][n], 1);
        to.at(warp, m + q)[n * kTileColumns + g] = pair(even, odd, 2);
      }
    }
  }

 private:
  static constexpr int kPerQuad = int(sizeof(Quad) / sizeof(A));
  struct Numbers {
    A of[kPerQuad];
  };

  // Of two lanes that differ in `bit`, one gets the sum of both's first, the other of both's
  // second.
  RNNKERN_DEVICE static A pair(A first, A second, int bit) {
    const bool upper = thread_index() & bit;
    return (upper ? second : first) + from_lane_xor(upper ? first : second, bit);
  }

  A sums_[kRows][kColumnTiles] = {};
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
