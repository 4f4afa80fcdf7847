// The product of gemm.h on AMX. Two by two tiles of 16 rows by 16 columns are in registers, with
// two tiles of the left operand and two of the panel: 32 k of bfloat16, or 64 of integers.
//
// Every sum of bfloat16 consists of sums over 32 k, with even and odd k apart, each in ascending
// order. It does not depend on the place of a row in a tile, or on the number of other rows.
//
// A product of 2 x 2 tiles takes 64 cycles. Loading its operands takes 32 from the first-level
// cache, and 84 from the second-level one. In blocks of kNear k of bfloat16, the rows (16 KiB) stay
// in the first-level cache while all vectors of the panel are multiplied by them. Integers have one
// scale for all k, so their sums stay in registers.
#pragma once

#include "cpu/amx.h"
#include "cpu/int8.h"
#include "cpu/vec.h"
#include "elements.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

template <typename E>
class TileProduct {
 public:
  // The same as `product` in gemm.h. K is a multiple of a tile's. If there are `tails`, the rows a
  // end before the last tile, and the tails are there in place of them, side by side.
  TileProduct(int vectors, int64_t rows, int64_t first, int64_t K, const E* const* a,
              const float* panel, float* acc, int64_t acc_row, const E* tails = nullptr)
      : vectors_(vectors),
        rows_(rows),
        first_(first),
        K_(K),
        a_(a),
        left_stride_(rows > 1 ? reinterpret_cast<intptr_t>(a[1]) - reinterpret_cast<intptr_t>(a[0])
                              : 0),
        panel_(panel),
        acc_(acc),
        acc_row_(acc_row),
        tails_(tails) {}

  template <bool kAdds>
  void run() const {
    for (int64_t row = 0; row < rows_; row += 2 * kTileHeight) {
      const int64_t upper = min_of(kTileHeight, rows_ - row);
      const int64_t lower = min_of(kTileHeight, rows_ - row - upper);
      TilesOfThread::set(upper, lower);
      multiply<kAdds>(row, upper, lower, 0);
      if constexpr (!kIntegers) {
        for (int64_t k = kNear; k < K_; k += kNear) multiply<true>(row, upper, lower, k);
      }
    }
  }

 private:
  static constexpr bool kIntegers = std::is_same_v<E, I8>;
  static constexpr int64_t kNear = 256, kL = kTileHeight;
  static constexpr int64_t kGroup = sizeof(float) / sizeof(E),
                           kHead = kIntegers ? kHeadOfIntegers : 0;
  static_assert(kLanes<float> == kL, "a vector is as wide as a tile");
  static_assert(!kIntegers || kLeftOffset > 0, "the left integers have no sign");

  // Adds or writes the products over a block of k that begins at `k`.
  template <bool kAdds>
  void multiply(int64_t row, int64_t upper, int64_t lower, int64_t k) const {
    for (int v = 0; v < vectors_; v += 2) {
      const bool wide = v + 1 < vectors_;
      if (lower) {
        wide ? add<kAdds, true, true>(row, upper, lower, v, k)
             : add<kAdds, true, false>(row, upper, lower, v, k);
      } else {
        wide ? add<kAdds, false, true>(row, upper, lower, v, k)
             : add<kAdds, false, false>(row, upper, lower, v, k);
      }
    }
  }

  template <bool kAdds, int tile>
  static void begin(const float* acc, int64_t stride) {
    if constexpr (kAdds) {
      load_tile<tile>(acc, stride);
    } else {
      zero_tile<tile>();
    }
  }

  template <bool kAdds, bool kLower, bool kWide>
  void add(int64_t row, int64_t rows_above, int64_t rows_below, int v, int64_t k) const {
    const int64_t vector = (kHead + K_ / kGroup) * kL;  // lanes of the panel
    const float* const head = panel_ + v * vector;
    float* const upper = acc_ + row * acc_row_ + v * kL;
    float* const lower = upper + kTileHeight * acc_row_;
    if constexpr (kIntegers) {
      // The value with which all sums of a column begin.
      const float* const first = head + kL;
      load_tile<0>(first, 0);
      if constexpr (kWide) load_tile<1>(first + vector, 0);
      if constexpr (kLower) load_tile<2>(first, 0);
      if constexpr (kLower && kWide) load_tile<3>(first + vector, 0);
      add_products<kLower, kWide>(row, head, vector, 0, K_);
      store_scaled<0>(row, rows_above, head, upper);
      if constexpr (kWide) store_scaled<1>(row, rows_above, head + vector, upper + kL);
      if constexpr (kLower) store_scaled<2>(row + kTileHeight, rows_below, head, lower);
      if constexpr (kLower && kWide) {
        store_scaled<3>(row + kTileHeight, rows_below, head + vector, lower + kL);
      }
    } else {
      const int64_t stride = acc_row_ * int64_t(sizeof(float));
      begin<kAdds, 0>(upper, stride);
      if constexpr (kWide) begin<kAdds, 1>(upper + kL, stride);
      if constexpr (kLower) begin<kAdds, 2>(lower, stride);
      if constexpr (kLower && kWide) begin<kAdds, 3>(lower + kL, stride);
      add_products<kLower, kWide>(row, head, vector, k, min_of(kNear, K_ - k));
      store_tile<0>(upper, stride);
      if constexpr (kWide) store_tile<1>(upper + kL, stride);
      if constexpr (kLower) store_tile<2>(lower, stride);
      if constexpr (kLower && kWide) store_tile<3>(lower + kL, stride);
    }
  }

  // Adds the products over [k, k + depth) to tiles 0 to 3.
  template <bool kLower, bool kWide>
  RNNKERN_INLINE void add_products(int64_t row, const float* head, int64_t vector, int64_t k,
                                   int64_t depth) const {
    const float* panel = head + (kHead + k / kGroup) * kL;
    const E *left = a_[row] + first_ + k,
            *left_lower = kLower ? a_[row + kTileHeight] + first_ + k : nullptr;
    if constexpr (kIntegers) left += kScaleBytes, left_lower += kLower ? kScaleBytes : 0;
    const auto add_tile = [&](int64_t stride) __attribute__((always_inline)) {
      load_tile<6>(panel, kTileBytes);
      load_tile<4>(left, stride);
      multiply_tiles<E, 0, 4, 6>();
      if constexpr (kWide) {
        load_tile<7>(panel + vector, kTileBytes);
        multiply_tiles<E, 1, 4, 7>();
      }
      if constexpr (kLower) {
        load_tile<5>(left_lower, stride);
        multiply_tiles<E, 2, 5, 6>();
        if constexpr (kWide) multiply_tiles<E, 3, 5, 7>();
      }
    };
    const bool has_tail = tails_ && k + depth == K_;
    for (depth -= has_tail * kTileDepth<E>; depth > 0; depth -= kTileDepth<E>) {
      add_tile(left_stride_);
      panel += kTileHeight * kL;
      left += kTileDepth<E>;
      if constexpr (kLower) left_lower += kTileDepth<E>;
    }
    if (has_tail) {
      left = tails_ + row * kTileDepth<E>;
      if constexpr (kLower) left_lower = left + kTileHeight * kTileDepth<E>;
      add_tile(kTileDepth<E> * int64_t(sizeof(E)));
    }
  }

  template <int tile>
  void store_scaled(int64_t row, int64_t rows, const float* head, float* acc) const {
    alignas(kTileBytes) int32_t sums[kTileHeight][kL];
    store_tile<tile>(sums, kTileBytes);
    for (int64_t m = 0; m < rows; ++m) {
      add_scaled(*reinterpret_cast<const Ints*>(sums[m]), load(head), scale_of(a_[row + m]),
                 acc + m * acc_row_);
    }
  }

  const int vectors_;
  const int64_t rows_, first_, K_;
  const E* const* const a_;
  const int64_t left_stride_;  // in bytes
  const float* const panel_;
  float* const acc_;
  const int64_t acc_row_;
  const E* const tails_;
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
