// The tiles of Intel's AMX: eight registers of up to 16 rows of 64 bytes, and a product of two of
// them added to a third. This is the only file with its instructions.
//
// RNNKERN_AMX_STAND_IN puts plain C++ in their place, for tests on CPUs without AMX. It ends the
// program where the CPU would raise an exception.
#pragma once

#include <cstdint>

#include "elements.h"

#ifdef RNNKERN_AMX_STAND_IN
#include <cstdio>
#include <cstdlib>
#include <cstring>
#endif

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

constexpr int kTiles = 8, kTileHeight = 16, kTileBytes = 64;
// How many k a tile of operands has: 16 groups of 4 bytes.
template <typename E>
constexpr int64_t kTileDepth = kTileBytes / int64_t(sizeof(E));

// The operand of LDTILECFG.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t height, int64_t bytes) {
    rows[tile] = uint8_t(height);
    row_bytes[tile] = uint16_t(bytes);
  }
};
static_assert(sizeof(TileShapes) == 64, "as the instruction reads it");

#ifdef RNNKERN_AMX_STAND_IN

struct TileState {
  bool configured = false;
  TileShapes shapes;
  alignas(64) uint8_t data[kTiles][kTileHeight][kTileBytes];
};
inline thread_local TileState tile_state;

inline void expect(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "AMX stand-in: %s\n", what);
  std::abort();
}

// Tile registers become zero.
inline void shape_tiles(const TileShapes& shapes) {
  for (int t = 0; t < kTiles; ++t) {
    expect(shapes.rows[t] <= kTileHeight && shapes.row_bytes[t] <= kTileBytes, "a tile too large");
    expect(!shapes.rows[t] == !shapes.row_bytes[t], "a tile of rows or of bytes alone");
  }
  tile_state = {true, shapes, {}};
}
inline void release_tiles() { tile_state.configured = false; }

template <int tile>
void load_tile(const void* from, int64_t stride) {
  expect(tile_state.configured && tile_state.shapes.rows[tile], "a tile without a shape");
  std::memset(tile_state.data[tile], 0, sizeof(tile_state.data[tile]));
  for (int r = 0; r < tile_state.shapes.rows[tile]; ++r) {
    std::memcpy(tile_state.data[tile][r], static_cast<const char*>(from) + r * stride,
                tile_state.shapes.row_bytes[tile]);
  }
}
template <int tile>
void zero_tile() {
  expect(tile_state.configured && tile_state.shapes.rows[tile], "a tile without a shape");
  std::memset(tile_state.data[tile], 0, sizeof(tile_state.data[tile]));
}
template <int tile>
void store_tile(void* to, int64_t stride) {
  expect(tile_state.configured && tile_state.shapes.rows[tile], "a tile without a shape");
  for (int r = 0; r < tile_state.shapes.rows[tile]; ++r) {
    std::memcpy(static_cast<char*>(to) + r * stride, tile_state.data[tile][r],
                tile_state.shapes.row_bytes[tile]);
  }
}
// c += a x b. Of bfloat16 they are a [M][K/2][2], b [K/2][N][2], c [M][N] of float; of integers,
// those of a without a sign, they are a [M][K/4][4], b [K/4][N][4], c [M][N] of int32.
template <typename E, int c, int a, int b>
void multiply_tiles() {
  const TileShapes& s = tile_state.shapes;
  expect(tile_state.configured && s.rows[a] && s.rows[b] && s.rows[c], "a tile without a shape");
  expect(
      s.rows[c] == s.rows[a] && s.row_bytes[c] == s.row_bytes[b] && s.row_bytes[a] == 4 * s.rows[b],
      "tiles do not fit each other");
  if constexpr (sizeof(E) == 1) {
    for (int m = 0; m < s.rows[c]; ++m) {
      int32_t sums[16];
      std::memcpy(sums, tile_state.data[c][m], sizeof(sums));
      for (int k = 0; k < s.row_bytes[a]; ++k) {
        for (int n = 0; n < 16; ++n) {
          const auto right = int8_t(tile_state.data[b][k / 4][4 * n + k % 4]);
          sums[n] += int32_t(tile_state.data[a][m][k]) * right;
        }
      }
      std::memcpy(tile_state.data[c][m], sums, s.row_bytes[c]);
    }
    return;
  }
  const auto widen = [](const uint8_t (&tile)[kTileHeight][kTileBytes], float (*to)[32]) {
    for (int r = 0; r < kTileHeight; ++r) {
      uint16_t bits[32];
      std::memcpy(bits, tile[r], sizeof(bits));
      for (int i = 0; i < 32; ++i) {
        const uint32_t wide = uint32_t(bits[i]) << 16;
        std::memcpy(&to[r][i], &wide, sizeof(wide));
      }
    }
  };
  float left[kTileHeight][32], right[kTileHeight][32];
  widen(tile_state.data[a], left);
  widen(tile_state.data[b], right);
  for (int m = 0; m < s.rows[c]; ++m) {
    float even[16] = {}, odd[16] = {}, sums[16];
    for (int k = 0; k < s.rows[b]; ++k) {
      for (int n = 0; n < 16; ++n) {
        even[n] += left[m][2 * k] * right[k][2 * n];
        odd[n] += left[m][2 * k + 1] * right[k][2 * n + 1];
      }
    }
    std::memcpy(sums, tile_state.data[c][m], sizeof(sums));
    for (int n = 0; n < 16; ++n) sums[n] += even[n] + odd[n];
    std::memcpy(tile_state.data[c][m], sums, s.row_bytes[c]);
  }
}

#else

// The instructions name tile registers by immediate numbers. Each is declared to touch memory,
// because the compiler must not move stores of what they read behind them.

// Tile registers become zero.
inline void shape_tiles(const TileShapes& shapes) {
  asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory");
}
inline void release_tiles() { asm volatile("tilerelease" ::: "memory"); }
template <int tile>
inline __attribute__((always_inline)) void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
inline __attribute__((always_inline)) void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile) : "memory");
}
template <int tile>
inline __attribute__((always_inline)) void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}
// c += a x b. Of bfloat16 they are a [M][K/2][2], b [K/2][N][2], c [M][N] of float; of integers,
// those of a without a sign, they are a [M][K/4][4], b [K/4][N][4], c [M][N] of int32.
template <typename E, int c, int a, int b>
inline __attribute__((always_inline)) void multiply_tiles() {
  if constexpr (sizeof(E) == 1) {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b) : "memory");
  } else {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b) : "memory");
  }
}

#endif

// The shapes of this thread's tiles, which take time to set. While this object lives they stay as
// they were set last, because nothing else on this thread uses tiles. It is constructed before the
// first product.
class TilesOfThread {
 public:
  TilesOfThread() { rows_ = 0; }
  ~TilesOfThread() {
    if (rows_) release_tiles();
    rows_ = 0;
  }
  TilesOfThread(const TilesOfThread&) = delete;
  TilesOfThread& operator=(const TilesOfThread&) = delete;

  // Tiles 0 to 3 are two by two of the result. Tiles 4 and 5 are those of the left operand, with
  // `upper` > 0 and `lower` rows, and 6 and 7 those of the right operand.
  static void set(int64_t upper, int64_t lower) {
    const auto rows = int(upper + (kTileHeight + 1) * lower);
    if (rows == rows_) return;
    rows_ = rows;
    TileShapes shapes;
    for (int column = 0; column < 2; ++column) {
      shapes.set(column, upper, kTileBytes);
      if (lower) shapes.set(2 + column, lower, kTileBytes);
      shapes.set(6 + column, kTileHeight, kTileBytes);
    }
    shapes.set(4, upper, kTileBytes);
    if (lower) shapes.set(5, lower, kTileBytes);
    shape_tiles(shapes);
  }

 private:
  static inline constinit thread_local int rows_ = 0;  // of both, as one number
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
