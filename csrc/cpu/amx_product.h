// The product of gemm.h for bfloat16 on AMX: tiles of 16 rows by 16 columns, two by two of them in
// registers, which 32 k of two tiles of the left operand and two of the panel feed.
//
// Every sum is made of sums over 32 k: even and odd k apart, each in ascending order. It does not
// depend on where in a tile, or with how many other rows, a row stands.
#pragma once

#include <cstring>

#include "cpu/amx.h"
#include "cpu/vec.h"
#include "elements.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

class TileProduct {
 public:
  // As `product` in gemm.h.
  TileProduct(int vectors, int64_t rows, int64_t first, int64_t K, const Bf16* const* a,
              const float* panel, int64_t panel_row, float* acc, int64_t acc_row)
      : vectors_(vectors),
        rows_(rows),
        first_(first),
        K_(K),
        a_(a),
        panel_(panel),
        panel_row_(panel_row),
        acc_(acc),
        acc_row_(acc_row) {}

  void run() {
    for (int64_t row = 0; row < rows_; row += 2 * kTileHeight) {
      const int64_t upper = min_of(kTileHeight, rows_ - row);
      const int64_t lower = min_of(kTileHeight, rows_ - row - upper);
      const int64_t whole = K_ / kTileDepth * kTileDepth, rest = K_ - whole;
      if (whole) {
        shape(upper, lower, kTilePairs);
        for (int64_t k = 0; k < whole; k += kCopiedDepth) {
          multiply(row, upper, lower, k, min_of(kCopiedDepth, whole - k), kTileDepth);
        }
      }
      if (rest) {
        shape(upper, lower, (rest + 1) / 2);
        multiply(row, upper, lower, whole, rest, rest);
      }
    }
    release_tiles();
  }

 private:
  static constexpr int64_t kTilePairs = kTileHeight, kTileDepth = 2 * kTilePairs;
  static constexpr int64_t kCopiedDepth = 512;  // k of rows that have to be copied
  static_assert(kLanes<float> == kTileHeight, "a vector is as wide as a tile");

  // Rows of the left operand at equal distances, in bytes.
  struct Left {
    const Bf16* data;
    int64_t stride;
  };

  // Tiles 0-3: two by two of the result; 4, 5: of the left operand; 6, 7: of the panel.
  static void shape(int64_t upper, int64_t lower, int64_t pairs) {
    TileShapes shapes;
    for (int column = 0; column < 2; ++column) {
      shapes.set(column, upper, kTileBytes);
      if (lower) shapes.set(2 + column, lower, kTileBytes);
      shapes.set(6 + column, pairs, kTileBytes);
    }
    shapes.set(4, upper, 4 * pairs);
    if (lower) shapes.set(5, lower, 4 * pairs);
    shape_tiles(shapes);
  }

  // Adds the products over [k, k + depth), in parts of `part`.
  void multiply(int64_t row, int64_t upper, int64_t lower, int64_t k, int64_t depth, int64_t part) {
    const Left left[2] = {rows(row, upper, k, depth, copies_[0]),
                          rows(row + upper, lower, k, depth, copies_[1])};
    for (int v = 0; v < vectors_; v += 2) {
      const bool wide = v + 1 < vectors_;
      if (lower) {
        wide ? add<true, true>(left, row, v, k, depth, part)
             : add<true, false>(left, row, v, k, depth, part);
      } else {
        wide ? add<false, true>(left, row, v, k, depth, part)
             : add<false, false>(left, row, v, k, depth, part);
      }
    }
  }

  template <bool kLower, bool kWide>
  void add(const Left (&left)[2], int64_t row, int v, int64_t k, int64_t depth, int64_t part) {
    constexpr int kLanesOfTile = kTileHeight;
    const int64_t panel_stride = panel_row_ * int64_t(sizeof(float));
    const int64_t acc_stride = acc_row_ * int64_t(sizeof(float));
    float* upper = acc_ + row * acc_row_ + v * kLanesOfTile;
    float* lower = upper + kTileHeight * acc_row_;
    load_tile<0>(upper, acc_stride);
    if constexpr (kWide) load_tile<1>(upper + kLanesOfTile, acc_stride);
    if constexpr (kLower) load_tile<2>(lower, acc_stride);
    if constexpr (kLower && kWide) load_tile<3>(lower + kLanesOfTile, acc_stride);
    for (int64_t i = 0; i < depth; i += part) {
      const float* panel = panel_ + (k + i) / 2 * panel_row_ + v * kLanesOfTile;
      load_tile<6>(panel, panel_stride);
      load_tile<4>(left[0].data + i, left[0].stride);
      multiply_tiles<0, 4, 6>();
      if constexpr (kWide) {
        load_tile<7>(panel + kLanesOfTile, panel_stride);
        multiply_tiles<1, 4, 7>();
      }
      if constexpr (kLower) {
        load_tile<5>(left[1].data + i, left[1].stride);
        multiply_tiles<2, 5, 6>();
        if constexpr (kWide) multiply_tiles<3, 5, 7>();
      }
    }
    store_tile<0>(upper, acc_stride);
    if constexpr (kWide) store_tile<1>(upper + kLanesOfTile, acc_stride);
    if constexpr (kLower) store_tile<2>(lower, acc_stride);
    if constexpr (kLower && kWide) store_tile<3>(lower + kLanesOfTile, acc_stride);
  }

  // Where they lie, if they lie at equal distances and are whole pairs; else copied, and the last
  // pair filled up with zero.
  Left rows(int64_t row, int64_t count, int64_t k, int64_t depth, Bf16* copies) const {
    if (count == 0) return {nullptr, 0};
    const Bf16* const* a = a_ + row;
    const auto address = [&](int64_t i) { return reinterpret_cast<intptr_t>(a[i]); };
    const int64_t stride = count > 1 ? address(1) - address(0) : 0;
    bool lie = depth % 2 == 0;
    for (int64_t i = 1; i < count; ++i) lie = lie && address(i) - address(i - 1) == stride;
    if (lie) return {a[0] + first_ + k, stride};
    for (int64_t i = 0; i < count; ++i) {
      Bf16* to = copies + i * kCopiedDepth;
      std::memcpy(to, a[i] + first_ + k, size_t(depth) * sizeof(Bf16));
      if (depth % 2) to[depth] = Bf16{0};
    }
    return {copies, kCopiedDepth * int64_t(sizeof(Bf16))};
  }

  const int vectors_;
  const int64_t rows_, first_, K_;
  const Bf16* const* const a_;
  const float* const panel_;
  const int64_t panel_row_;
  float* const acc_;
  const int64_t acc_row_;
  alignas(kTileBytes) Bf16 copies_[2][kTileHeight * kCopiedDepth];
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
