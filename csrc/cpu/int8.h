// Products of integers of 8 bits, accumulated in 32 bits. A row of weights w is the integers q
// times a scale. So is each row of the batch, whose scale is computed in each step:
//
//   scale = max |x| / 127      q = round(x / scale)      a . w = scale_a scale_w (q_a . q_w)
//
//   left operand   [scale: kScaleBytes][q of each k, to whole vectors]
//   panel          [scale of each lane][first value of its sum][groups of four k]
//
// The instructions of AVX512-VNNI and AMX multiply unsigned integers by signed ones. So the left
// operand is q + 128 there, and each sum begins with -128 times the sum of its weights. Elsewhere
// the left operand is q. Without these instructions, x86-64 multiplies pairs of 16-bit integers.
// Two shifts widen the even integers of a group of weights, and one the odd ones. So the left
// operand has integers of 16 bits there, in each group those of even k first. All give the same
// integers.
//
// For a vector of 16 units, one instruction computes the products of one group with one row of a
// tile: four times as many as with float.
#pragma once

#include <cstring>

#include "cpu/vec.h"
#include "elements.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef int32_t UnalignedInts
    __attribute__((vector_size(kVectorBytes), aligned(sizeof(int32_t)), may_alias));

#if defined(__AVX512VNNI__)
constexpr int32_t kLeftOffset = 128;
#else
constexpr int32_t kLeftOffset = 0;
#endif
// Tiles read rows that begin with a cache line.
#ifdef RNNKERN_AMX
constexpr int64_t kScaleBytes = 64;
#else
constexpr int64_t kScaleBytes = sizeof(float);
#endif
constexpr int kIntegersOfGroup = 4;
RNNKERN_INLINE int32_t four_bytes_at(const char* p) {
  int32_t bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return bytes;
}
#if defined(__x86_64__) && !defined(__AVX512VNNI__)
constexpr bool kLeftInPairs = true;
struct LeftGroup {
  int32_t even, odd;  // two integers each
};
RNNKERN_INLINE LeftGroup left_group_at(const char* p) {
  return {four_bytes_at(p), four_bytes_at(p + sizeof(int32_t))};
}
#else
constexpr bool kLeftInPairs = false;
typedef int32_t LeftGroup;
RNNKERN_INLINE LeftGroup left_group_at(const char* p) { return four_bytes_at(p); }
#endif
constexpr int64_t kLeftBytes = sizeof(LeftGroup) / kIntegersOfGroup;  // of one integer
constexpr float kLargestInteger = 127;
// The groups of a panel before its weights.
constexpr int64_t kHeadOfIntegers = 2;

// The bytes of a left operand of K columns.
constexpr int64_t bytes_of_integers(int64_t K) {
  return kScaleBytes + ceil_div(K, kLanes<float>) * kLanes<float> * kLeftBytes;
}
RNNKERN_INLINE float scale_of(const I8* left) {
  float scale;
  std::memcpy(&scale, left, sizeof(scale));
  return scale;
}
// Converts sums of products of integers to numbers and adds them to acc.
RNNKERN_INLINE void add_scaled(Ints sums, Vec<float> scales, float scale_of_left, float* acc) {
  const Vec<float> numbers = __builtin_convertvector(sums, Vec<float>);
  store(acc, load(acc) + numbers * (scales * scale_of_left));
}

template <int kHalf = kLanes<float> / 2>
RNNKERN_INLINE int32_t largest_lane(Ints v) {
  if constexpr (kHalf == 0) {
    return v[0];
  } else {
    const Ints other = halves_swapped<kHalf, kLanes<float>>(v);
    return largest_lane<kHalf / 2>(v > other ? v : other);
  }
}

// Of each four integers, those of even places first.
template <int... i>
RNNKERN_INLINE Bits16 even_before_odd(Bits16 q, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(q, q, (i / 4 * 4 + i % 2 * 2 + i / 2 % 2)...);
}
RNNKERN_INLINE Bits16 even_before_odd(Bits16 q) {
  return even_before_odd(q, std::make_integer_sequence<int, kLanes<float>>{});
}

// Writes one left operand. A NaN or infinity makes its scale NaN, and so the whole result.
inline void quantize_row(const float* x, int64_t K, I8* to) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes<float>)));
  // The bits of magnitudes, as integers, are in the order of the magnitudes, with infinity and NaN
  // above all.
  Ints largest{};
  for (int64_t k = 0; k < K; k += kLanes<float>) {
    const Ints size = bit_cast<Ints>(load_up_to(x + k, K - k)) & 0x7fffffff;
    largest = largest > size ? largest : size;
  }
  const int32_t bits = largest_lane(largest);
  constexpr int32_t kInfinity = 0x7f800000;
  constexpr float kSmallest = 1e-30f;  // of less, the reciprocal would overflow
  const auto most = bit_cast<float>(bits);
  const float scale = bits < kInfinity ? most / kLargestInteger : bit_cast<float>(kInfinity + 1);
  const float reciprocal = most > kSmallest ? kLargestInteger / most : 0.0f;
  std::memcpy(to, &scale, sizeof(scale));
  to += kScaleBytes;
  // If a number below 2^22 is added to this, the lowest bits are its nearest integer.
  constexpr float kRound = 0x1.8p23f;
  for (int64_t k = 0; k < K; k += kLanes<float>) {
    const auto q = bit_cast<Bits32>(load_up_to(x + k, K - k) * reciprocal + kRound);
    if constexpr (kLeftInPairs) {
      const Bits16 ordered = even_before_odd(__builtin_convertvector(q, Bits16));
      std::memcpy(to + k * kLeftBytes, &ordered, sizeof(ordered));
    } else {
      const Bytes bytes = __builtin_convertvector(q, Bytes) ^ uint8_t(kLeftOffset);
      std::memcpy(to + k, &bytes, sizeof(bytes));
    }
  }
}

// c + left . right, four products in each lane.
RNNKERN_INLINE Ints add_products_of_group(LeftGroup left, Ints right, Ints c) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)c, _mm512_set1_epi32(left), (__m512i)right);
#elif defined(__x86_64__)
  // The even and the odd integers on the right, as 16-bit ones.
#if defined(__AVX512BW__)
  const auto b = (__m512i)right;
  const __m512i even = _mm512_madd_epi16(_mm512_set1_epi32(left.even),
                                         _mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_set1_epi32(left.odd), _mm512_srai_epi16(b, 8));
#elif defined(__AVX2__)
  const auto b = (__m256i)right;
  const __m256i even = _mm256_madd_epi16(_mm256_set1_epi32(left.even),
                                         _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_set1_epi32(left.odd), _mm256_srai_epi16(b, 8));
#else
  const auto b = (__m128i)right;
  const __m128i even =
      _mm_madd_epi16(_mm_set1_epi32(left.even), _mm_srai_epi16(_mm_slli_epi16(b, 8), 8));
  const __m128i odd = _mm_madd_epi16(_mm_set1_epi32(left.odd), _mm_srai_epi16(b, 8));
#endif
  return c + (Ints)even + (Ints)odd;
#else
#pragma GCC unroll 4
  for (int i = 0; i < kIntegersOfGroup; ++i) {
    const int32_t a = int32_t(uint32_t(left) << (24 - 8 * i)) >> 24;
    c += a * (bit_cast<Ints>(bit_cast<Bits32>(right) << (24 - 8 * i)) >> 24);
  }
  return c;
#endif
}

// The largest tile whose sums and operands are all in registers. Without AVX512-VNNI each vector on
// the right becomes two.
#if defined(__AVX512VNNI__)
constexpr int kVectorsOfIntegers = 4;
#else
constexpr int kVectorsOfIntegers = 2;
#endif
constexpr int kRowsOfIntegers = kRegisters < 32 ? 4 : 6;

// The same as `tile` of gemm.h, for all K at once. `vector` and `panel_row` are the distances in
// lanes of the panel from a vector to the next, and from a group to the next.
template <int kVectors, int kRows>
void tile_of_integers(int64_t vector, int64_t K, const I8* const* a, const float* panel,
                      int64_t panel_row, float* acc, int64_t acc_row) {
  if constexpr (kVectors > kVectorsOfIntegers) {
    constexpr int kFirst = kVectorsOfIntegers;
    tile_of_integers<kFirst, kRows>(vector, K, a, panel, panel_row, acc, acc_row);
    tile_of_integers<kVectors - kFirst, kRows>(vector, K, a, panel + kFirst * vector, panel_row,
                                               acc + kFirst * kLanes<float>, acc_row);
  } else {
    const auto ints = [](const float* p) { return *reinterpret_cast<const UnalignedInts*>(p); };
    Ints c[kRows][kVectors];
    const char* row[kRows];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      row[m] = reinterpret_cast<const char*>(a[m]) + kScaleBytes;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) c[m][v] = ints(panel + panel_row + v * vector);
    }
    const float* group = panel + kHeadOfIntegers * panel_row;
    for (int64_t k = 0; k < K; k += kIntegersOfGroup, group += panel_row) {
      Ints b[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) b[v] = ints(group + v * vector);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const LeftGroup left = left_group_at(row[m] + k * kLeftBytes);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) c[m][v] = add_products_of_group(left, b[v], c[m][v]);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        add_scaled(c[m][v], load(panel + v * vector), scale_of(a[m]),
                   acc + m * acc_row + v * kLanes<float>);
      }
    }
  }
}

// Packs `count` <= width columns of a panel, with zeros in the other columns and from K to `end`.
// row_of(column)[k] is a whole number.
template <typename RowOf>
void pack_integers(int64_t K, int64_t end, RowOf row_of, const float* scales, int64_t count,
                   float* panel, int64_t panel_row, int64_t width) {
  const auto put = [&](int64_t group, int64_t column, int32_t bits) {
    std::memcpy(panel + group * panel_row + column, &bits, sizeof(bits));
  };
  for (int64_t i = 0; i < width; ++i) {
    const float scale = i < count ? scales[i] : 0.0f;
    int32_t sum = 0;
    for (int64_t k = 0; k < end; k += kIntegersOfGroup) {
      uint32_t group = 0;
      for (int j = 0; i < count && j < min_of(kIntegersOfGroup, K - k); ++j) {
        const auto q = int32_t(value(row_of(i)[k + j]));
        sum += q;
        group |= uint32_t(uint8_t(q)) << (8 * j);
      }
      put(kHeadOfIntegers + k / kIntegersOfGroup, i, int32_t(group));
    }
    put(0, i, bit_cast<int32_t>(scale));
    put(1, i, -kLeftOffset * sum);
  }
}

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
