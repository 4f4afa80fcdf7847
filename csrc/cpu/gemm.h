// Matrix products on panels: the one micro-kernel behind every product of forward and backward.
//
//   acc[m][0..W) += a[m][0..K) x panel[K][W]          W = 1..4 vectors
//
// The left operand is a list of row pointers, so that no layout of the rows (packed, permuted,
// batch first, expanded) is ever copied. Every sum runs over k in ascending order, kDepth k in one
// accumulator of their own, which is then added: the result depends neither on the tile, nor on the
// vector width, nor on who computes it, and rounding grows with kDepth and K / kDepth, not with K.
//
// Of a tile of 6 x 4 vectors, one k costs 24 multiply-adds, 4 loads of the panel and 6 broadcasts.
// Blocks of kDepth k keep the part of the panel near while all row tiles pass over it: in the
// second-level cache, whence 256 bytes in 24 multiply-adds come in time. Shorter blocks that fit
// the first-level cache read and write the accumulators more often, which costs 2 % more.
#pragma once

#include "cpu/vec.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

constexpr int kPanelVectors = 4;
constexpr int64_t kDepth = 256;
constexpr int64_t kGroupRows =
    48;  // rows that share one pass over a panel where the result is not padded
static_assert(kGroupRows % kTileRows == 0, "row groups are whole tiles");
static_assert(kDepth * kPanelVectors * kVectorBytes <= 64 * 1024,
              "a panel block fits a quarter of a small L2 cache");

template <typename T>
constexpr int64_t kPanelWidth = kPanelVectors * kLanes<T>;

RNNKERN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
RNNKERN_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
RNNKERN_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

template <typename T, int kVectors, int kRows>
void tile(int64_t k_begin, int64_t k_count, const T* const* a, const T* panel, T* acc,
          int64_t acc_row) {
  using V = Vec<T>;
  V c[kRows][kVectors];
  const T* row[kRows];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
    row[m] = a[m] + k_begin;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) c[m][v] = V{};
  }
  const V* b = reinterpret_cast<const V*>(panel);
  for (int64_t k = 0; k < k_count; ++k, b += kVectors) {
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) c[m][v] = row[m][k] * b[v] + c[m][v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      T* to = acc + m * acc_row + v * kLanes<T>;
      store(to, load(to) + c[m][v]);
    }
  }
}

template <typename T>
using TileFunction = void (*)(int64_t, int64_t, const T* const*, const T*, T*, int64_t);

template <typename T, int kVectors>
TileFunction<T> tile_of(int64_t rows) {
  static_assert(kTileRows <= 6, "extend the table");
  constexpr auto at_most = [](int rows) { return rows < kTileRows ? rows : kTileRows; };
  static constexpr TileFunction<T> kTable[6] = {
      tile<T, kVectors, at_most(1)>, tile<T, kVectors, at_most(2)>, tile<T, kVectors, at_most(3)>,
      tile<T, kVectors, at_most(4)>, tile<T, kVectors, at_most(5)>, tile<T, kVectors, at_most(6)>};
  return kTable[rows - 1];
}

template <typename T>
TileFunction<T> tile_of(int vectors, int64_t rows) {
  switch (vectors) {
    case 1:
      return tile_of<T, 1>(rows);
    case 2:
      return tile_of<T, 2>(rows);
    case 3:
      return tile_of<T, 3>(rows);
    default:
      return tile_of<T, 4>(rows);
  }
}

// acc[m][..] += a[m][0..K) x panel for `rows` rows; the rows of acc are padded to whole vectors.
template <typename T>
void product(int vectors, int64_t rows, int64_t K, const T* const* a, const T* panel, T* acc,
             int64_t acc_row) {
  const int64_t whole = rows / kTileRows * kTileRows;
  const TileFunction<T> full = tile_of<T>(vectors, kTileRows);
  for (int64_t k = 0; k < K; k += kDepth) {
    const int64_t depth = min_of(kDepth, K - k);
    const T* block = panel + k * vectors * kLanes<T>;
    for (int64_t m = 0; m < whole; m += kTileRows)
      full(k, depth, a + m, block, acc + m * acc_row, acc_row);
    if (whole < rows) {
      tile_of<T>(vectors, rows - whole)(k, depth, a + whole, block, acc + whole * acc_row, acc_row);
    }
  }
}

// out[m][0..width) = or += a[m][0..K) x panel, width <= kPanelWidth: for results that are not
// padded. Where it adds, the new sum is made apart and added once, so that long sums stay accurate.
template <typename T>
void product_to(int64_t rows, int64_t K, const T* const* a, const T* panel, T* const* out,
                int64_t width, bool add) {
  constexpr int64_t kWidth = kPanelWidth<T>;
  alignas(kVectorBytes) T acc[kGroupRows * kWidth];
  const int vectors = int(ceil_div(width, kLanes<T>));
  for (int64_t first = 0; first < rows; first += kGroupRows) {
    const int64_t count = min_of(kGroupRows, rows - first);
    for (int64_t i = 0; i < count * kWidth; i += kLanes<T>) store(acc + i, Vec<T>{});
    product(vectors, count, K, a + first, panel, acc, kWidth);
    for (int64_t m = 0; m < count; ++m) {
      T* to = out[first + m];
      for (int64_t i = 0; i < width; i += kLanes<T>) {
        Vec<T> value = load(acc + m * kWidth + i);
        if (add) value += load_up_to(to + i, width - i);
        store_up_to(to + i, value, width - i);
      }
    }
  }
}

// Dot products of a[0..K) with `count` <= lanes rows of w, one per lane (lanes past count repeat
// the last row). For few rows and few steps: reads the weights once, as they lie.
template <typename T>
Vec<T> dot_rows(int64_t K, const T* a, const T* w, int64_t w_row, int64_t count) {
  constexpr int kL = kLanes<T>;
  const T* row[kL];
  Vec<T> sum[kL];
#pragma GCC unroll 16
  for (int i = 0; i < kL; ++i) {
    row[i] = w + min_of(i, count - 1) * w_row;
    sum[i] = Vec<T>{};
  }
  int64_t k = 0;
  for (; k + kL <= K; k += kL) {
    const Vec<T> x = load(a + k);
#pragma GCC unroll 16
    for (int i = 0; i < kL; ++i) sum[i] = x * load(row[i] + k) + sum[i];
  }
  if (k < K) {
    const Vec<T> x = load_part(a + k, K - k);
#pragma GCC unroll 16
    for (int i = 0; i < kL; ++i) sum[i] = x * load_part(row[i] + k, K - k) + sum[i];
  }
  return sum_each<T>(sum);
}

// panel[k][column] = rows[column][k] for `width` <= lanes columns, `count` of them real, the others
// zero; consecutive k are panel_row elements apart.
template <typename T>
void pack_transposed(int64_t K, const T* rows, int64_t row, int64_t count, T* panel,
                     int64_t panel_row, int64_t width) {
  constexpr int kL = kLanes<T>;
  for (int64_t k = 0; k < K; k += kL) {
    const int64_t depth = min_of(kL, K - k);
    Vec<T> block[kL];
#pragma GCC unroll 16
    for (int i = 0; i < kL; ++i)
      block[i] = i < count ? load_up_to(rows + i * row + k, depth) : Vec<T>{};
    transpose<T>(block);
#pragma GCC unroll 16
    for (int i = 0; i < kL; ++i) {
      if (i < depth) store_up_to(panel + (k + i) * panel_row, block[i], width);
    }
  }
}

// panel[k][0..width) = row[0..width), padded with zeros to whole vectors.
template <typename T>
RNNKERN_INLINE void pack_row(const T* row, int64_t width, T* panel) {
  for (int64_t i = 0; i < width; i += kLanes<T>) store(panel + i, load_up_to(row + i, width - i));
}

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
