// The product of one block in one step:  sums[m][n] = sum over k of a[m][k] b[n][k],  a the block's
// part of the weights, prepared once, b rows of a state or of gradients that change with each step.
//
// k comes in chunks of 64 bytes. A warp takes whole chunks, all rows m and all columns n of them.
// So each number of b is read once in a block. Afterwards the sums of the warps are added through
// shared memory, always in the same order. Lane 4 g + q holds bytes 16 q to 16 q + 15 of the chunk
// for columns g, g + 8, ... of b, which it reads where the other blocks have written them.
//
// Operands E of Bf16, F16 and Tf32 are multiplied on the tensor cores. Those of float and double
// are multiplied one by one, all k of a chunk in their order in memory, for results as exact as
// those of the CPU.
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

// How many quads a row of a chunk has.
constexpr int kQuadsOfRow = kChunkBytes / int(sizeof(Quad));

template <typename E>
constexpr bool kOnTensorCores = sizeof(E) == 2 || std::is_same_v<E, Tf32>;

// Stores a number as an operand.
RNNKERN_DEVICE void put_operand(float* to, float x) { *to = x; }
RNNKERN_DEVICE void put_operand(double* to, double x) { *to = x; }
RNNKERN_DEVICE void put_operand(Bf16* to, float x) { *to = narrowed<Bf16>(x); }
RNNKERN_DEVICE void put_operand(F16* to, float x) { *to = narrowed<F16>(x); }
RNNKERN_DEVICE void put_operand(Tf32* to, float x) { *to = to_tf32(x); }

// A place of the exchange buffer holds a NaN of ones alone while its number is not there yet
// (plan.h). A number that is such a NaN becomes another one.
template <typename E>
RNNKERN_DEVICE E absent() {
  struct Bytes {
    unsigned char of[sizeof(E)];
  } bytes;
#pragma unroll
  for (unsigned char& byte : bytes.of) byte = 0xff;
  return bit_cast<E>(bytes);
}
template <typename E>
RNNKERN_DEVICE E present(E x) {
  using Bits = Unsigned<sizeof(E)>;
  const Bits bits = bit_cast<Bits>(x);
  return bit_cast<E>(bits == Bits(~Bits(0)) ? Bits(bits >> 1) : bits);
}
// Whether any number of the quad is absent.
template <typename E>
RNNKERN_DEVICE bool any_absent(const Quad& quad) {
  if constexpr (sizeof(E) == 2) {
    uint32_t found = 0;  // the first bit of a half of ones
#pragma unroll
    for (uint32_t word : quad.words) found |= (~word - 0x10001u) & word & 0x80008000u;
    return found;
  } else {
    bool any = false;
#pragma unroll
    for (int i = 0; i < 4; i += int(sizeof(E)) / 4) {
      any |= (sizeof(E) == 4 ? quad.words[i] : quad.words[i] & quad.words[i + 1]) == ~0u;
    }
    return any;
  }
}

// A stored number as an operand.
template <typename E, typename T>
RNNKERN_DEVICE E operand(T stored) {
  if constexpr (std::is_same_v<T, E>) {
    return stored;
  } else {
    E to;
    put_operand(&to, value(stored));
    return to;
  }
}

// The sums of the warps in shared memory: [warp], then in the order of sum_place.
template <typename A, int kRows, int kColumns>
struct Partials {
  static constexpr int kOfWarp = kRows * kColumns;

  A* sums;

  RNNKERN_DEVICE static int place(int m, int column) {
    return cuda::sum_place(m, column, kColumns);
  }
  RNNKERN_DEVICE A* of(int warp) const { return sums + warp * kOfWarp; }
};

// How many of `lanes` use the same one of the 32 banks, at most. place(lane) is a lane's word.
template <typename Place>
constexpr int bank_conflicts(int lanes, Place place) {
  int visits[32] = {}, most = 0;
  for (int lane = 0; lane < lanes; ++lane) {
    const int now = ++visits[place(lane) % 32];
    most = now > most ? now : most;
  }
  return most;
}
// Half a warp stores pairs of sums at once: rows g of four lanes each.
constexpr int conflicts_of_stores(int columns) {
  return bank_conflicts(32, [&](int word) { return cuda::sum_place(word / 8, word % 8, columns); });
}
// A warp reads the sums of `units` in neighbouring columns.
constexpr int conflicts_of_reads(int units, int columns) {
  return bank_conflicts(
      32, [&](int lane) { return cuda::sum_place(lane % units, lane / units, columns); });
}
static_assert(conflicts_of_stores(8) == 1 && conflicts_of_stores(16) == 1 &&
              conflicts_of_stores(32) == 1);
static_assert(conflicts_of_reads(4, 8) == 1 && conflicts_of_reads(8, 8) == 1 &&
              conflicts_of_reads(16, 8) == 1 && conflicts_of_reads(32, 8) == 1);
static_assert(conflicts_of_reads(4, 16) == 1 && conflicts_of_reads(8, 16) == 1 &&
              conflicts_of_reads(16, 16) == 1 && conflicts_of_reads(32, 16) == 1);
static_assert(conflicts_of_reads(4, 32) == 1 && conflicts_of_reads(8, 32) == 1 &&
              conflicts_of_reads(16, 32) == 1 && conflicts_of_reads(32, 32) == 1);
// The units of a GRU, whose number is no power of two.
static_assert(conflicts_of_reads(5, 8) <= 2 && conflicts_of_reads(10, 16) <= 2);

template <typename E, int kRowTiles, int kColumnTiles, bool = kOnTensorCores<E>>
class Tile;

// The tile on the tensor cores. A chunk of a is [row tile][half][lane] quads. A product must wait
// for the one before if both add to the same sums. So a small tile has several sums for each row
// and column, which are added at the end: for the halves of a chunk, and for chunks in turn.
template <typename E, int kRowTiles, int kColumnTiles>
class Tile<E, kRowTiles, kColumnTiles, true> {
  static constexpr int kTiles = kRowTiles * kColumnTiles;
  static constexpr int kChains = kTiles == 1 ? 4 : kTiles == 2 ? 2 : 1;

 public:
  using A = float;
  static constexpr int kRows = kRowTiles * kTileRows, kColumns = kColumnTiles * kTileColumns;

  // The word of a packed chunk that has bytes 4 word to 4 word + 3 of row m.
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

  // Makes the two quads of lane 4 g + q from bytes 16 q to 16 q + 15 of rows g and g + 8 of a row
  // tile. place_of_quad is their place in a chunk.
  RNNKERN_DEVICE static void arrange(const Quad (&rows)[2], Quad (&quads)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) quads[half].words[i] = rows[i % 2].words[2 * half + i / 2];
    }
  }
  RNNKERN_DEVICE static int place_of_quad(int row_tile, int half) {
    return (row_tile * 2 + half) * kWarp + thread_index() % kWarp;
  }

  // `chunk` tells chunks that follow each other apart.
  RNNKERN_DEVICE void add(const Quad* a, const Quad (&b)[kColumnTiles], int chunk = 0) {
    const int lane = thread_index() % kWarp;
#pragma unroll
    for (int i = 0; i < kRowTiles * 2; ++i) add_half(i, chunk, a[i * kWarp + lane], b);
  }
  // The same with the lane's own quads of a.
  RNNKERN_DEVICE void add_held(const Quad (&a)[kRowTiles * 2], const Quad (&b)[kColumnTiles],
                               int chunk) {
#pragma unroll
    for (int i = 0; i < kRowTiles * 2; ++i) add_half(i, chunk, a[i], b);
  }

  // Adds the sums of another tile.
  RNNKERN_DEVICE void add(const Tile& other) {
    static_assert(kChains == 1);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums_[0][m][n][i] += other.sums_[0][m][n][i];
      }
    }
  }

  RNNKERN_DEVICE void store(const Partials<A, kRows, kColumns>& to, int warp) const {
    const int g = thread_index() % kWarp / 4, q = thread_index() % 4;
    A* const own = to.of(warp);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // Two columns are stored at once. sum_place exchanges them in every other row tile.
          const int place = to.place(m * kTileRows + g + 8 * half, n * kTileColumns + 2 * q);
          const int first = 2 * half + m % 2, second = 2 * half + 1 - m % 2;
          *reinterpret_cast<Pair*>(own + (place & ~1)) = {sum(m, n, first), sum(m, n, second)};
        }
      }
    }
  }

 private:
  struct alignas(8) Pair {
    A of[2];
  };

  // The products of a row tile and a half of the chunk.
  RNNKERN_DEVICE void add_half(int i, int chunk, const Quad& left, const Quad (&b)[kColumnTiles]) {
    const int m = i / 2, half = i % 2;
    const int chain = (half + chunk % 2 * 2) % kChains;
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
      multiply_tiles<E>(left, b[n].words[2 * half], b[n].words[2 * half + 1], sums_[chain][m][n]);
    }
  }

  RNNKERN_DEVICE A sum(int m, int n, int i) const {
    A all = sums_[0][m][n][i];
#pragma unroll
    for (int chain = 1; chain < kChains; ++chain) all += sums_[chain][m][n][i];
    return all;
  }

  A sums_[kChains][kRowTiles][kColumnTiles][4] = {};
};

// The tile that multiplies one by one. A chunk of a is [m][16] words, in their order.
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

  // The quads of lane 4 g + q are those of rows g and g + 8.
  RNNKERN_DEVICE static void arrange(const Quad (&rows)[2], Quad (&quads)[2]) {
    quads[0] = rows[0], quads[1] = rows[1];
  }
  RNNKERN_DEVICE static int place_of_quad(int row_tile, int i) {
    const int m = row_tile * kTileRows + thread_index() % kWarp / 4 + 8 * i;
    return m * (kChunkBytes / int(sizeof(Quad))) + thread_index() % 4;
  }

  RNNKERN_DEVICE void add(const Quad* a, const Quad (&b)[kColumnTiles], int = 0) {
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

  // Adds up the sums of the four lanes of a column. Each lane gets a quarter of the rows.
  RNNKERN_DEVICE void store(const Partials<A, kRows, kColumns>& to, int warp) const {
    const int g = thread_index() % kWarp / 4, q = thread_index() % 4;
    A* const own = to.of(warp);
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int m = 0; m < kRows; m += 4) {
        const A even = pair(sums_[m][n], sums_[m + 1][n], 1);
        const A odd = pair(sums_[m + 2][n], sums_[m + 3][n], 1);
        own[to.place(m + q, n * kTileColumns + g)] = pair(even, odd, 2);
      }
    }
  }

 private:
  static constexpr int kPerQuad = int(sizeof(Quad) / sizeof(A));
  struct Numbers {
    A of[kPerQuad];
  };

  // Of two lanes whose numbers differ in `bit`, one gets the sum of their first values, and the
  // other the sum of their second values.
  RNNKERN_DEVICE static A pair(A first, A second, int bit) {
    const bool upper = thread_index() & bit;
    return (upper ? second : first) + from_lane_xor(upper ? first : second, bit);
  }

  A sums_[kRows][kColumnTiles] = {};
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
