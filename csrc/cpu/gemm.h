// Matrix products on panels: the one micro-kernel behind every product of forward and backward.
//
//   acc[m][0..W) += a[m][0..K) x panel[K][W]          W = 1..4 vectors
//
// The left operand is a list of row pointers, so that no layout of the rows (packed, permuted,
// batch first, expanded) is ever copied. Every sum runs over k in ascending order, kDepth k in one
// accumulator of their own, which is then added: the result depends neither on the tile, nor on the
// vector width, nor on the thread, and rounding grows with kDepth and K / kDepth, not with K. Three
// exceptions have orders of their own, which do not depend on rows and threads either: pairs of
// bfloat16, AMX tiles (amx_product.h), and dot products (dot_rows). A fourth depends on the vector
// width: weights that backward reads in place (ColumnPanels::add), whose sums end with each gate
// and before a last row that is copied. Sums of integers are exact (int8.h).
//
// A lane of a panel holds one *group* of consecutive k: one element; or a pair of bfloat16, if the
// CPU multiplies pairs of them and adds both products to a float (for Bf16 and F32ByBf16); or four
// integers. If the CPU has no products of a 16-bit type, its numbers are multiplied as float.
//
// In a tile of 6 x 4 vectors, one group costs 24 multiply-adds, 4 loads of the panel and 6
// broadcasts; with half as many registers, in a tile of 3 x 4, 12, 4 and 3. Blocks of kDepth k keep
// the part of the panel near while all row tiles pass over it: in the second-level cache, which
// delivers 256 bytes within 24 multiply-adds. Shorter blocks that fit the first-level cache read
// and write the accumulators more often, which costs 2 % more.
#pragma once

#ifdef RNNKERN_AMX
#include "cpu/amx_product.h"
#endif
#include "cpu/int8.h"
#include "cpu/rows.h"
#include "plan.h"
#include "workspace.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

constexpr int kMostTileRows = 6;
// The rows of a register tile: its sums, the operands of the side that has fewer of them, and one
// operand of the other side are all in registers. A sum that is not is loaded and stored for every
// group, and these wait for each other, so a tile takes twice as long. Without a multiply-add, as
// in the baseline of x86-64, the product needs one register more, and some sums do go that way.
constexpr int tile_rows(int vectors) {
  const auto registers = [=](int rows) {
    return rows * vectors + (rows < vectors ? rows : vectors) + 1;
  };
  int rows = kMostTileRows;
  while (registers(rows) > kRegisters) --rows;
  return rows;
}
constexpr int kTileRows = tile_rows(kPanelVectors);
// The most rows of a tile that is the only one. Two tiles of two rows would read each vector of a
// panel for two rows alone, so four rows are multiplied by one half of the vectors, then the other.
constexpr int lone_rows(int vectors) { return tile_rows(vectors) < 4 ? 4 : tile_rows(vectors); }
constexpr int64_t kDepth = 256;
constexpr int kAhead = 8;  // groups that are prefetched
static_assert(kDepth * kPanelVectors * kVectorBytes <= 64 * 1024,
              "a panel block fits a quarter of a small L2 cache");

// Whether operands E are multiplied in AMX tiles, which add to the result every 32 k. kRowsAtOnce
// rows share one reading of a panel if the result is not padded.
#ifdef RNNKERN_AMX
template <typename E>
constexpr bool kByTiles = std::is_same_v<E, Bf16> || std::is_same_v<E, I8>;
// Fewer rows of integers are multiplied by AVX512-VNNI, which gives the same sums.
constexpr int64_t kRowsWorthTilesOfIntegers = 5;
constexpr int64_t kRowsAtOnce = 4 * kTileHeight;
#else
template <typename E>
constexpr bool kByTiles = false;
constexpr int64_t kRowsAtOnce = 48;
static_assert(kRowsAtOnce % tile_rows(1) == 0 && kRowsAtOnce % tile_rows(2) == 0 &&
                  kRowsAtOnce % tile_rows(3) == 0 && kRowsAtOnce % tile_rows(4) == 0,
              "these rows are whole tiles");
#endif

// The lanes of a panel.
template <typename T>
constexpr int64_t kPanelWidth = kPanelVectors * kLanes<T>;

// Half of the rows that a part of the batch should have. For tiles it is one tile.
#ifdef RNNKERN_AMX
constexpr int kRowsOfPart = kTileHeight / 2;
#else
constexpr int kRowsOfPart = kTileRows;
#endif

// The type as which products take elements of type T.
template <typename T>
struct OperandOf {
  using Type = Compute<T>;
};
#if defined(__AVX512BF16__)
template <>
struct OperandOf<Bf16> {
  using Type = Bf16;
};
template <>
struct OperandOf<F32ByBf16> {
  using Type = Bf16;
};
template <>
struct OperandOf<F32By3Bf16> {
  using Type = Bf16;
};
#endif
template <>
struct OperandOf<F32ByI8> {
  using Type = I8;
};
template <typename T>
using Operand = typename OperandOf<T>::Type;

// The type of the lanes of a panel of weights in memory. A lane that is narrower than the type that
// is computed with is widened when it is read.
template <typename T>
using Panel = std::conditional_t<std::is_same_v<T, F32ByBf16> && std::is_same_v<Operand<T>, float>,
                                 Bf16, Compute<T>>;

// Whether products take weights in another type than that of tensors.
template <typename T>
constexpr bool kConverted = !std::is_same_v<T, Operand<T>>;
// Whether that takes few instructions.
#if defined(__AVX512F__) || defined(__F16C__)
template <typename T>
constexpr bool kConvertedFast = true;
#else
template <typename T>
constexpr bool kConvertedFast = !std::is_same_v<T, F16>;
#endif
// Whether rows of weights can be rows of a panel as they are: a lane holds one number, which the
// tile widens if it has fewer bits than the products take, and no bits are dropped.
template <typename T>
constexpr bool kMultipliedInPlace =
    std::is_same_v<Operand<T>, Compute<T>> && sizeof(T) <= sizeof(Panel<T>) && kConvertedFast<T>;

// For operands E: how many k a group has, and how many groups K elements have.
template <typename E>
constexpr int kGroup = int(sizeof(Compute<E>) / sizeof(E));
template <typename E>
RNNKERN_INLINE int64_t groups(int64_t K) {
  return ceil_div(K, kGroup<E>);
}
// The groups of a panel that come before the weights in memory.
template <typename E>
constexpr int64_t kHead = std::is_same_v<E, I8> ? kHeadOfIntegers : 0;
// The length to which both operands of K elements are filled with zeros, so that tiles are whole.
template <typename E>
constexpr int64_t filled(int64_t K) {
#ifdef RNNKERN_AMX
  if constexpr (kByTiles<E>) return ceil_div(K, kTileDepth<E>) * kTileDepth<E>;
#endif
  return K;
}
template <typename E>
RNNKERN_INLINE int64_t groups_in_memory(int64_t K) {
  return kHead<E> + groups<E>(filled<E>(K));
}

// The layout of a panel for K elements: group by group, each with all lanes. For AMX tiles it is
// vector by vector, each with all groups, so that a tile is one piece of memory.
template <typename E>
class PanelLayout {
  static constexpr int64_t kL = kLanes<Compute<E>>;

 public:
  PanelLayout(int64_t K, int64_t lanes) : groups_(groups_in_memory<E>(K)), lanes_(lanes) {}

  // The place of a lane in the first group.
  int64_t at(int64_t lane) const {
    return kByTiles<E> ? lane / kL * kL * groups_ + lane % kL : lane;
  }
  // The distance from a group to the next.
  int64_t stride() const { return kByTiles<E> ? kL : lanes_; }
  // The distance from a panel to the panel of what rounding has lost.
  int64_t part() const { return groups_ * lanes_; }

 private:
  const int64_t groups_, lanes_;
};

// Whether an element becomes the sum of two operands: the element rounded, and what this rounding
// has lost, rounded. Both factors are such sums. The product of the two lost parts is left out, so
// that the relative error of a product is about 2^-16. The lost parts of a row of left operands
// follow it in memory, and those of a panel are another panel behind it.
template <typename T>
constexpr bool kSplit = std::is_same_v<T, F32By3Bf16>;
template <typename T>
constexpr int kParts = kSplit<T> ? 2 : 1;

// The bytes of a weight in a panel.
template <typename T>
constexpr int kPanelBytes = int(sizeof(Panel<T>)) / kGroup<Operand<T>> * kParts<T>;
// Whether weights have fewer bits in panels than in tensors. They are always packed then.
template <typename T>
constexpr bool kRoundedForProducts = kSplit<T> || sizeof(T) > kPanelBytes<T>;
// Whether there are kernels for frozen weights only.
template <typename T>
constexpr bool kFrozenOnly = std::is_same_v<T, F32ByI8> || !std::is_same_v<Panel<T>, Compute<T>>;

template <typename E>
RNNKERN_INLINE E group_at(const E* row) {
  return *row;
}
// A vector of one group.
template <typename E, typename Left>
RNNKERN_INLINE Vec<E> broadcast(Left group) {
  return group - Vec<E>{};  // x - 0 is x, also if x is -0
}
// c + a * b, group by group; a is one group, or a vector of them.
template <typename E, typename Left>
RNNKERN_INLINE Vec<E> multiply_add(Left a, Vec<E> b, Vec<E> c) {
  return a * b + c;
}
#if defined(__AVX512BF16__)
struct Pair {
  int32_t bits;
};
RNNKERN_INLINE Pair group_at(const Bf16* row) {
  Pair pair;
  __builtin_memcpy(&pair, row, sizeof(pair));
  return pair;
}
// The last element of a row of odd length.
RNNKERN_INLINE Pair half_group_at(const Bf16* row) { return {row->bits}; }
template <>
RNNKERN_INLINE Vec<Bf16> broadcast<Bf16>(Pair group) {
  return (Vec<Bf16>)_mm512_set1_epi32(group.bits);
}
template <>
RNNKERN_INLINE Vec<Bf16> multiply_add<Bf16>(Vec<Bf16> a, Vec<Bf16> b, Vec<Bf16> c) {
  return (Vec<Bf16>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
}
template <>
RNNKERN_INLINE Vec<Bf16> multiply_add<Bf16>(Pair a, Vec<Bf16> b, Vec<Bf16> c) {
  return multiply_add<Bf16>(broadcast<Bf16>(a), b, c);
}
#endif

// P is the type of the panel's lanes. With kAdds the sums are added to acc, else they are written
// to it.
template <typename E, typename P, int kVectors, int kRows, bool kAdds>
void tile(int64_t k_begin, int64_t k_count, const E* const* a, const P* panel, int64_t panel_row,
          Compute<E>* acc, int64_t acc_row) {
  if constexpr (kRows > tile_rows(kVectors)) {
    constexpr int kFirst = kVectors / 2, kLanesOfFirst = kFirst * kLanes<E>;
    tile<E, P, kFirst, kRows, kAdds>(k_begin, k_count, a, panel, panel_row, acc, acc_row);
    tile<E, P, kVectors - kFirst, kRows, kAdds>(k_begin, k_count, a, panel + kLanesOfFirst,
                                                panel_row, acc + kLanesOfFirst, acc_row);
  } else {
    using V = Vec<E>;
    // A core loads as often as it multiplies. So a tile prefetches if it has no more loads than
    // multiply-adds. On a shared Intel Xeon the next lines of a panel come too late without it.
    constexpr int kBytes = kLanes<E> * int(sizeof(P));  // of a vector of the panel
    constexpr int kPerLine = kBytes < 64 ? 64 / kBytes : 1;
    constexpr bool kPrefetches =
        kRows * kVectors >= kVectors + kRows + ceil_div(kVectors, kPerLine);
    V c[kRows][kVectors];
    const E* row[kRows];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      row[m] = a[m] + k_begin;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) c[m][v] = V{};
    }
    const auto load_vector = [&](int v) __attribute__((always_inline)) {
      if (kPrefetches && v % kPerLine == 0) {
        // At the end this is no address of the panel any more, which a prefetch may have.
        __builtin_prefetch(reinterpret_cast<const char*>(panel) +
                           int64_t(sizeof(P)) * (kAhead * panel_row + v * kLanes<E>));
      }
      return load(panel + v * kLanes<E>);
    };
    // The operands of the side that has fewer of them are held.
    const auto add = [&](auto group) __attribute__((always_inline)) {
      if constexpr (kRows < kVectors) {
        V left[kRows];
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) left[m] = broadcast<E>(group(row[m]));
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const V b = load_vector(v);
#pragma GCC unroll 8
          for (int m = 0; m < kRows; ++m) c[m][v] = multiply_add<E>(left[m], b, c[m][v]);
        }
      } else {
        V b[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) b[v] = load_vector(v);
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
          const auto left = group(row[m]);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) c[m][v] = multiply_add<E>(left, b[v], c[m][v]);
        }
      }
      panel += panel_row;
    };
    int64_t k = 0;
#pragma GCC unroll 4
    for (; k + kGroup<E> <= k_count; k += kGroup<E>) {
      add([k](const E* r) { return group_at(r + k); });
    }
    if constexpr (kGroup<E> > 1) {
      if (k < k_count) add([k](const E* r) { return half_group_at(r + k); });
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        Compute<E>* to = acc + m * acc_row + v * kLanes<E>;
        store(to, kAdds ? load(to) + c[m][v] : c[m][v]);
      }
    }
  }
}

template <typename E, typename P>
using TileFunction = void (*)(int64_t, int64_t, const E* const*, const P*, int64_t, Compute<E>*,
                              int64_t);

template <typename E, typename P, int kVectors, int kRows, bool kAdds>
constexpr TileFunction<E, P> tile_function() {
  if constexpr (std::is_same_v<E, I8>) {
    static_assert(kAdds, "integers are added");
    return tile_of_integers<kVectors, kRows>;
  } else {
    return tile<E, P, kVectors, kRows, kAdds>;
  }
}

template <typename E, typename P, int kVectors, bool kAdds>
TileFunction<E, P> tile_of(int64_t rows) {
  static_assert(kMostTileRows == 6, "extend the table");
  constexpr int kMost = std::is_same_v<E, I8> ? kRowsOfIntegers : lone_rows(kVectors);
  constexpr auto at_most = [](int rows) { return rows < kMost ? rows : kMost; };
  static constexpr TileFunction<E, P> kTable[6] = {
      tile_function<E, P, kVectors, at_most(1), kAdds>(),
      tile_function<E, P, kVectors, at_most(2), kAdds>(),
      tile_function<E, P, kVectors, at_most(3), kAdds>(),
      tile_function<E, P, kVectors, at_most(4), kAdds>(),
      tile_function<E, P, kVectors, at_most(5), kAdds>(),
      tile_function<E, P, kVectors, at_most(6), kAdds>()};
  return kTable[rows - 1];
}

template <typename E, typename P, bool kAdds>
TileFunction<E, P> tile_of(int vectors, int64_t rows) {
  switch (vectors) {
    case 1:
      return tile_of<E, P, 1, kAdds>(rows);
    case 2:
      return tile_of<E, P, 2, kAdds>(rows);
    case 3:
      return tile_of<E, P, 3, kAdds>(rows);
    default:
      return tile_of<E, P, 4, kAdds>(rows);
  }
}

template <typename E, typename P>
TileFunction<E, P> tile_of(int vectors, int64_t rows, bool adds) {
  if constexpr (!std::is_same_v<E, I8>) {
    if (!adds) return tile_of<E, P, false>(vectors, rows);
  }
  return tile_of<E, P, true>(vectors, rows);
}

// How rows are divided among tiles: as equally high as can be, because a low one reads the panel
// for fewer products. The first `higher` tiles have one row more. A single tile, of a small call,
// needs no division.
template <typename E>
struct TileHeights {
  int64_t height, higher;

  TileHeights(int vectors, int64_t rows) {
    static constexpr int kMost[] = {0, most(1), most(2), most(3), most(4)};
    static constexpr int kAlone[] = {0, alone(1), alone(2), alone(3), alone(4)};
    const int64_t tiles = rows <= kAlone[vectors] ? 1 : ceil_div(rows, kMost[vectors]);
    height = tiles == 1 ? rows : rows / tiles;
    higher = rows - tiles * height;
  }

  static constexpr int most(int vectors) {
    return std::is_same_v<E, I8> ? kRowsOfIntegers : tile_rows(vectors);
  }
  static constexpr int alone(int vectors) {
    return std::is_same_v<E, I8> ? kRowsOfIntegers : lone_rows(vectors);
  }
};

// acc = or += a x a block of a panel, tile by tile.
template <typename E, typename P>
void multiply_block(int vectors, int64_t rows, const TileHeights<E>& heights, int64_t first,
                    int64_t depth, const E* const* a, const P* block, int64_t panel_row, bool adds,
                    Compute<E>* acc, int64_t acc_row) {
  const int64_t height = heights.height;
  int64_t m = 0;
  if (heights.higher > 0) {
    const TileFunction<E, P> high = tile_of<E, P>(vectors, height + 1, adds);
    for (int64_t i = 0; i < heights.higher; ++i, m += height + 1) {
      high(first, depth, a + m, block, panel_row, acc + m * acc_row, acc_row);
    }
  }
  if (height == 0) return;
  const TileFunction<E, P> low = tile_of<E, P>(vectors, height, adds);
  for (; m < rows; m += height) {
    low(first, depth, a + m, block, panel_row, acc + m * acc_row, acc_row);
  }
}

// Whether a block of a panel is copied before its tiles read it. This pays where tiles are low,
// because they read it often: if its groups are far apart, as the rows of a matrix are, or if it is
// bfloat16, which takes two instructions to widen. (float16 takes one.) Groups whose distance is a
// large power of two also compete for the same places in the cache.
constexpr bool kMayCopy = kRegisters < 32;
constexpr int64_t kTilesWorthCopying = 5;
template <typename E, typename P>
bool worth_copying(int64_t rows, const TileHeights<E>& heights, int64_t panel_row) {
  return rows >= kTilesWorthCopying * max_of(kTileRows, heights.height) &&
         (panel_row > 2 * kPanelWidth<E> || std::is_same_v<P, Bf16>);
}
// The same as `multiply_block`, with the block copied. Not inlined, because the copy would be on
// the stack of every product.
template <typename E, typename P>
__attribute__((noinline)) void multiply_copied_block(int vectors, int64_t rows,
                                                     const TileHeights<E>& heights, int64_t first,
                                                     int64_t depth, const E* const* a,
                                                     const P* block, int64_t panel_row, bool adds,
                                                     Compute<E>* acc, int64_t acc_row) {
  alignas(kVectorBytes) Compute<E> copy[kDepth * kPanelWidth<E>];
  const int64_t copy_row = vectors * kLanes<E>;
  for (int64_t k = 0; k < depth; ++k) {
    const P* const group = block + k * panel_row;
    for (int64_t i = 0; i < copy_row; i += kLanes<E>) {
      // At the end this is no address of the panel any more, which a prefetch may have.
      __builtin_prefetch(reinterpret_cast<const char*>(group) +
                         int64_t(sizeof(P)) * (kAhead * panel_row + i));
      store(copy + k * copy_row + i, load(group + i));
    }
  }
  multiply_block<E>(vectors, rows, heights, first, depth, a, copy, copy_row, adds, acc, acc_row);
}

// acc[m][..] += a[m][first..first+K) x panel for `rows` rows; the rows of acc are padded to whole
// vectors. The panel has panel_row lanes. With kAdds false, acc is written. For tiles, all K are
// given at once, and the 16 rows of a tile are at equal distances; `tails` are as TileProduct has
// them.
template <typename E, bool kAdds = true, typename P>
void product(int vectors, int64_t rows, int64_t first, int64_t K, const E* const* a, const P* panel,
             int64_t panel_row, Compute<E>* acc, int64_t acc_row,
             [[maybe_unused]] const E* tails = nullptr) {
  static_assert(kDepth % kGroup<E> == 0, "a block is whole groups");
#ifdef RNNKERN_AMX
  if constexpr (kByTiles<E>) {
    if (!std::is_same_v<E, I8> || rows >= kRowsWorthTilesOfIntegers) {
      TileProduct<E>(vectors, rows, first, filled<E>(K), a, panel, acc, acc_row, tails)
          .template run<kAdds>();
      return;
    }
  }
#endif
  const TileHeights<E> heights(vectors, rows);
  if constexpr (std::is_same_v<E, I8>) {
    // Their tile takes the distance of vectors in place of the first k, which is zero. Sums of
    // integers have one scale each, so all K are one block.
    const PanelLayout<E> layout(K, panel_row);
    multiply_block<E>(vectors, rows, heights, layout.at(kLanes<float>), max_of(1, K), a, panel,
                      layout.stride(), kAdds, acc, acc_row);
  } else {
    const auto multiply = kMayCopy && worth_copying<E, P>(rows, heights, panel_row)
                              ? multiply_copied_block<E, P>
                              : multiply_block<E, P>;
    // A sum of nothing is written too.
    for (int64_t k = 0; k < K || (k == 0 && !kAdds); k += kDepth) {
      multiply(vectors, rows, heights, first + k, min_of(kDepth, K - k), a,
               panel + groups<E>(k) * panel_row, panel_row, kAdds || k > 0, acc, acc_row);
    }
  }
}

// acc[m][..] += a[m] x panel, over all K, for elements T. `part` is PanelLayout::part.
template <typename T, bool kAdds = true>
void product_of(int vectors, int64_t rows, int64_t K, const Operand<T>* const* a,
                const Panel<T>* panel, int64_t panel_row, [[maybe_unused]] int64_t part,
                Compute<T>* acc, int64_t acc_row) {
  using E = Operand<T>;
  product<E, kAdds>(vectors, rows, 0, K, a, panel, panel_row, acc, acc_row);
  if constexpr (kSplit<T>) {
    product<E>(vectors, rows, 0, K, a, panel + part, panel_row, acc, acc_row);
    product<E>(vectors, rows, filled<E>(K), K, a, panel, panel_row, acc, acc_row);
  }
}

// out[m][0..width) = or += what add_to(first row, rows, acc) adds to zeros, width <= kPanelWidth:
// for results that are not padded. If it adds, the new sum is computed separately and added once,
// so that long sums stay accurate.
template <typename A, typename Out, typename AddTo>
void product_to(int64_t rows, Out* const* out, int64_t width, bool add, AddTo add_to) {
  constexpr int64_t kWidth = kPanelWidth<A>;
  alignas(kVectorBytes) A acc[kRowsAtOnce * kWidth];
  for (int64_t first = 0; first < rows; first += kRowsAtOnce) {
    const int64_t count = min_of(kRowsAtOnce, rows - first);
    for (int64_t i = 0; i < count * kWidth; i += kLanes<A>) store(acc + i, Vec<A>{});
    add_to(first, count, acc);
    for (int64_t m = 0; m < count; ++m) {
      Out* to = out[first + m];
      for (int64_t i = 0; i < width; i += kLanes<A>) {
        Vec<A> sum = load(acc + m * kWidth + i);
        if (add) sum += load_up_to(to + i, width - i);
        store_up_to(to + i, sum, width - i);
      }
    }
  }
}

// One of the two operands whose sum a number is.
template <typename T, int kPart>
RNNKERN_INLINE Vec<T> part_of(Vec<T> number) {
  static_assert(kPart < kParts<T>);
  if constexpr (kPart > 0) return number - rounded<Operand<T>>(number);
  return number;
}

// The n elements at p, n > 0, as one vector of groups: at most lanes of them, zero behind the end.
template <typename T, int kPart = 0>
RNNKERN_INLINE Vec<T> load_groups(const T* p, int64_t n) {
  using E = Operand<T>;
  if constexpr (kGroup<E> == 1) {
    return load_up_to(p, n);
  } else {
#if defined(__AVX512BF16__)
    constexpr int kL = kLanes<T>;
    if constexpr (std::is_same_v<T, E>) {
      const __mmask32 present = n >= 2 * kL ? ~0u : (1u << n) - 1;
      return (Vec<T>)_mm512_maskz_loadu_epi16(present, p);
    } else {
      const Vec<T> low = part_of<T, kPart>(load_up_to(p, n)),
                   high = n > kL ? part_of<T, kPart>(load_up_to(p + kL, n - kL)) : Vec<T>{};
      return (Vec<T>)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    }
#endif
  }
}

// Weights read in place, for few rows and few steps: dot products along rows of w. Several rows are
// read at once, each as a stream of its own, because a single stream is slower beyond the caches.
// Lane i of a sum adds up the k that are i modulo the lanes, in ascending order, and the lanes are
// added at the end. This does not depend on how many rows are read at once.
constexpr int kDotLeftRows = kRegisters < 32 ? 2 : 4;

// sums[m][i] += a[m] . w[i], lane by lane, for kRows rows of a and kRight rows of w.
template <typename T, int kRows, int kRight>
RNNKERN_INLINE void add_products(int64_t K, const Operand<T>* const* a, const T* const (&w)[kRight],
                                 Vec<T> (&sums)[kRows][kRight]) {
  constexpr int kStep = kLanes<T> * kGroup<Operand<T>>;
  const auto add = [&](int64_t k, int64_t n) __attribute__((always_inline)) {
    Vec<T> left[kRows];
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) left[m] = load_groups(a[m] + k, n);
#pragma GCC unroll 8
    for (int i = 0; i < kRight; ++i) {
      const Vec<T> right = load_groups(w[i] + k, n);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        sums[m][i] = multiply_add<Operand<T>>(left[m], right, sums[m][i]);
      }
    }
  };
  int64_t k = 0;
  for (; k + kStep <= K; k += kStep) add(k, kStep);
  if (k < K) add(k, K - k);
}

// out[m][i] += a[m] . row i of w, for kRows rows of a and `count` <= lanes rows of w.
template <typename T, int kRows>
void dot_rows(int64_t K, const Operand<T>* const* a, const T* w, int64_t w_row, int64_t count,
              Compute<T>* out, int64_t out_row) {
  // So many sums hide the latency of an addition.
  constexpr int kRight = int(min_of(kRows == 1 ? 8 : 4, kLanes<T>));
  // Unrolled, all indices are constants: the sums of one row of a stay in registers.
  Vec<T> sums[kRows][kLanes<T>];
  const T* next = w;  // the last row again if there are no more
#pragma GCC unroll 4
  for (int i = 0; i < kLanes<T>; i += kRight) {
    Vec<T> part[kRows][kRight] = {};
    if (i < count) {
      const T* rows[kRight];
#pragma GCC unroll 8
      for (int j = 0; j < kRight; ++j) {
        rows[j] = next;
        if (i + j + 1 < count) next += w_row;
      }
      add_products<T>(K, a, rows, part);
    }
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
      for (int j = 0; j < kRight; ++j) sums[m][i + j] = part[m][j];
    }
  }
  for (int m = 0; m < kRows; ++m) {
    Compute<T>* to = out + m * out_row;
    store_up_to(to, load_up_to(to, count) + sum_each<Compute<T>>(sums[m]), count);
  }
}

// For any number of rows of a.
template <typename T>
void dot_rows(int64_t rows, int64_t K, const Operand<T>* const* a, const T* w, int64_t w_row,
              int64_t count, Compute<T>* out, int64_t out_row) {
  static_assert(kDotLeftRows <= 4, "extend the switch");
  for (int64_t m = 0; m < rows;
       m += kDotLeftRows, a += kDotLeftRows, out += kDotLeftRows * out_row) {
    switch (min_of(kDotLeftRows, rows - m)) {
      case 1:
        dot_rows<T, 1>(K, a, w, w_row, count, out, out_row);
        break;
      case 2:
        dot_rows<T, 2>(K, a, w, w_row, count, out, out_row);
        break;
      case 3:
        dot_rows<T, min_of(3, kDotLeftRows)>(K, a, w, w_row, count, out, out_row);
        break;
      default:
        dot_rows<T, kDotLeftRows>(K, a, w, w_row, count, out, out_row);
    }
  }
}

// panel[group of k][column] = row_of(column)[k] for `width` <= lanes columns, `count` of them real,
// the others zero; consecutive groups are panel_row lanes apart.
template <typename T, int kPart = 0, typename RowOf>
void pack_transposed(int64_t K, RowOf row_of, int64_t count, Panel<T>* panel, int64_t panel_row,
                     int64_t width) {
  using E = Operand<T>;
  constexpr int kL = kLanes<T>;
  const T* rows[kL];
#pragma GCC unroll 16
  for (int i = 0; i < kL; ++i) rows[i] = i < count ? row_of(i) : nullptr;
  for (int64_t k = 0; k < K; k += kL * kGroup<E>) {
    const int64_t depth = kByTiles<E> ? kL : min_of(kL, groups<E>(K - k));
    Vec<T> block[kL];
#pragma GCC unroll 16
    for (int i = 0; i < kL; ++i)
      block[i] = i < count ? load_groups<T, kPart>(rows[i] + k, K - k) : Vec<T>{};
    transpose<Compute<T>>(block);
    Panel<T>* to = panel + groups<E>(k) * panel_row;
#pragma GCC unroll 16
    for (int i = 0; i < kL; ++i) {
      __builtin_prefetch(to + (kL + i) * panel_row, 1);  // stores wait longer than loads
      if (i < depth) store_up_to(to + i * panel_row, block[i], width);
    }
  }
}

// The same for rows of weights, in the `width` lanes of a panel from `lane` on. Rows of integers
// have scales.
template <typename T, typename RowOf>
void pack_weights(int64_t K, RowOf row_of, [[maybe_unused]] const float* scales, int64_t count,
                  const PanelLayout<Operand<T>>& layout, int64_t lane, Panel<T>* panel,
                  int64_t width) {
  panel += layout.at(lane);
  if constexpr (std::is_same_v<Operand<T>, I8>) {
    pack_integers(K, filled<I8>(K), row_of, scales, min_of(count, width), panel, layout.stride(),
                  width);
  } else {
    pack_transposed<T>(K, row_of, count, panel, layout.stride(), width);
    if constexpr (kSplit<T>) {
      pack_transposed<T, 1>(K, row_of, count, panel + layout.part(), layout.stride(), width);
    }
  }
}

// The weight at k of a column of a panel, as a number.
template <typename T>
Compute<T> unpacked(const Panel<T>* panel, const PanelLayout<Operand<T>>& layout, int64_t k,
                    int64_t column) {
  using E = Operand<T>;
  using Stored = std::conditional_t<kGroup<E> == 1, Panel<T>, E>;
  constexpr int kG = kGroup<E>;
  const int64_t lane = layout.at(column) + (kHead<E> + k / kG) * layout.stride();
  const int64_t place = lane * kG + k % kG;
  const auto number_in = [&](const Panel<T>* part) {
    Stored stored;
    __builtin_memcpy(&stored, reinterpret_cast<const char*>(part) + place * int(sizeof(stored)),
                     sizeof(stored));
    return value(stored);
  };
  if constexpr (kSplit<T>) return number_in(panel) + number_in(panel + layout.part());
  return number_in(panel);
}

// How many lanes rows take in the panel that they begin, if the batch is transposed.
template <typename T>
constexpr int64_t lanes_across(int64_t rows) {
  return min_of(kPanelWidth<T>, ceil_div(rows, kLanes<T>) * kLanes<T>);
}

// to[m][i] = or += from[i][m] for `count` <= lanes of m and `rows` <= lanes of i; the rows of `to`
// have `width` lanes.
template <bool kAdds, typename A>
void transpose_to(const A* from, int64_t from_row, int64_t rows, int64_t count, A* to,
                  int64_t to_row, int64_t width) {
  constexpr int kL = kLanes<A>;
  Vec<A> block[kL];
#pragma GCC unroll 16
  for (int i = 0; i < kL; ++i) block[i] = i < rows ? load(from + i * from_row) : Vec<A>{};
  transpose<A>(block);
#pragma GCC unroll 16
  for (int m = 0; m < kL; ++m) {
    if (m >= count) continue;
    A* const row = to + m * to_row;
    store_up_to(row, kAdds ? load_up_to(row, width) + block[m] : block[m], width);
  }
}

// The rows of the batch in a product, either as the left operand, or the first of them `across`:
// transposed into panels as a right operand, with panel p packed as [groups of K][its rows, whole
// vectors].
template <typename T>
struct BatchRows {
  const Operand<T>* const* rows;  // null if all are across
  const Compute<T>* across;
  int64_t rows_across = 0;
};

// The rows of a tensor for a product, by pointers. They are read in place, or copied if the
// products take another type or tiles, or transposed (`across`). If products take integers, each
// row gets a scale of its own.
template <typename T>
class LeftRows {
  using E = Operand<T>;
  static constexpr bool kCopied = kByTiles<E> || (!std::is_same_v<E, T> && sizeof(E) != sizeof(T));
  static constexpr bool kInIntegers = std::is_same_v<E, I8>;

 public:
  LeftRows() = default;
  LeftRows(int64_t rows, int64_t columns, Carver& carver, bool across = false)
      : columns_(columns), rows_(carver.take<const T*>(rows)) {
    if (across) {
      across_ = carver.take<Compute<T>>(ceil_div(rows, kLanes<T>) * kLanes<T> *
                                        groups_in_memory<E>(columns));
    } else if constexpr (kCopied) {
      copies_ = carver.take<E>(rows * stride());
      copied_ = carver.take<const E*>(rows);
    }
  }

  const T*& operator[](int64_t i) const { return rows_[i]; }

  // The first `count` rows, once they are set.
  const E* const* operands(int64_t count) const {
    if constexpr (kCopied) {
      for (int64_t i = 0; i < count; ++i) {
        E* const copy = copies_ + i * stride();
        copied_[i] = copy;
        if constexpr (kInIntegers) {
          quantize_row(numbers(rows_[i]), columns_, copy);
        } else {
          const int64_t end = filled<E>(columns_);
          copy_row(copy, rows_[i], 0, columns_);
          zero_row(copy, columns_, end);
          if constexpr (kSplit<T>) copy_lost(rows_[i], copy + end);
        }
      }
      return copied_;
    } else {
      return reinterpret_cast<const E* const*>(rows_);  // of numbers that are stored as E
    }
  }
  // The same if each `run` rows are at equal distances. Tiles read these without a copy if their
  // rows are. If the last columns fill no tile, only these are copied.
  struct AsTheyLie {
    const E* const* rows;
    const E* tails;  // of `product`
  };
  AsTheyLie as_they_lie(int64_t count, [[maybe_unused]] int64_t run) const {
    if constexpr (kByTiles<E> && std::is_same_v<T, E>) {
      constexpr int64_t kDeep = filled<E>(1);  // of a tile
      const int64_t whole = columns_ / kDeep * kDeep;
      if (run % kLanes<T> == 0 && whole == columns_) return {rows_, nullptr};
      if (run % kLanes<T> == 0) {
        for (int64_t i = 0; i < count; ++i) {
          E* const tail = copies_ + i * kDeep;
          copy_row(tail, rows_[i] + whole, 0, columns_ - whole);
          zero_row(tail, columns_ - whole, kDeep);
        }
        return {rows_, copies_};
      }
    }
    return {operands(count), nullptr};
  }
  // The first `count` rows, once they are set. If they are transposed, the last of them are left as
  // they lie, unless rows have to be copied.
  BatchRows<T> batch(int64_t count, int64_t as_they_lie = 0) const {
    if constexpr (kRoundedForProducts<T>) {
      return {operands(count), nullptr};
    } else {
      if (!across_) return {operands(count), nullptr};
      const int64_t rows_across = kCopied ? count : count - as_they_lie;
      pack_across(rows_across);
      return {rows_across < count ? operands(count) : nullptr, across_, rows_across};
    }
  }

 private:
  // The rows of a tile must not all compete for the same places in the cache.
  int64_t stride() const {
    const int64_t end = filled<E>(columns_);
    constexpr int64_t kApart = kByTiles<E> ? kVectorBytes / int64_t(sizeof(E)) : 0;
    return (kInIntegers ? bytes_of_integers(end) : kParts<T> * end) + kApart;
  }
  void copy_lost(const T* from, E* to) const {
    for (int64_t i = 0; i < columns_; i += kLanes<T>) {
      const int64_t n = columns_ - i;
      store_up_to(to + i, part_of<T, 1>(load_up_to(from + i, n)), n);
    }
    zero_row(to, columns_, filled<E>(columns_));
  }
  void pack_across(int64_t count) const {
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      const int64_t panel = i / kPanelWidth<T> * kPanelWidth<T>;
      const PanelLayout<E> layout(columns_, lanes_across<T>(count - panel));
      pack_transposed<T>(
          columns_, [&](int64_t row) { return rows_[i + row]; }, count - i,
          across_ + panel * groups_in_memory<E>(columns_) + layout.at(i - panel), layout.stride(),
          kLanes<T>);
    }
  }

  int64_t columns_ = 0;
  const T** rows_ = nullptr;
  E* copies_ = nullptr;
  const E** copied_ = nullptr;
  Compute<T>* across_ = nullptr;
};

// One group of a panel from the rows of its k: row_of(k)[0..width), padded with zeros to whole
// vectors.
template <typename T, typename RowOf>
RNNKERN_INLINE void pack_group(int64_t k, int64_t K, RowOf row_of, int64_t width,
                               const PanelLayout<Operand<T>>& layout, Panel<T>* panel) {
  using E = Operand<T>;
  static_assert(kGroup<E> <= 2, "integers are packed by pack_integers");
  const T* row = row_of(k);
  if constexpr (kGroup<E> == 1) {
    for (int64_t i = 0; i < width; i += kLanes<T>)
      store(panel + layout.at(i), load_up_to(row + i, width - i));
  } else {
    const T* next = k + 1 < K ? row_of(k + 1) : nullptr;
    const auto pack_part = [&]<int kPart>(std::integral_constant<int, kPart>) {
      const auto load_operands = [](const T* p, int64_t n) {
        const Vec<T> numbers = part_of<T, kPart>(load_up_to(p, n));
        // A widened bfloat16 is in the upper half of its lane.
        return bit_cast<Bits32>(std::is_same_v<T, E> ? numbers : rounded<E>(numbers));
      };
      for (int64_t i = 0; i < width; i += kLanes<T>) {
        const Bits32 low = load_operands(row + i, width - i) >> 16;
        const Bits32 high = next ? load_operands(next + i, width - i) : Bits32{};
        store(panel + layout.at(i) + kPart * layout.part(), bit_cast<Vec<T>>(high | low));
      }
    };
    pack_part(std::integral_constant<int, 0>{});
    if constexpr (kSplit<T>) pack_part(std::integral_constant<int, 1>{});
  }
}

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
