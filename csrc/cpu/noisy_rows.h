// What recurrent dropout and zoneout (noise.h) do to rows of states on the CPU.
#pragma once

#include "cpu/pass.h"
#include "noise.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

typedef uint64_t Bits64 __attribute__((vector_size(kVectorBytes)));

template <>
struct WideProduct<Bits32> {
  Bits32 low, high;

  static RNNKERN_INLINE WideProduct of(uint32_t factor, Bits32 words) {
    constexpr uint64_t kLow = 0xffffffffu;
    const Bits64 factors = Bits64{} + factor, pairs = (Bits64)words;
    const Bits64 even = of_lower(factors, pairs), odd = of_lower(factors, pairs >> 32);
    return {(Bits32)((even & kLow) | (odd << 32)), (Bits32)((even >> 32) | (odd & ~kLow))};
  }

 private:
  // The products of the lower halves of each pair.
  static RNNKERN_INLINE Bits64 of_lower(Bits64 a, Bits64 b) {
#if defined(__AVX512F__)
    return (Bits64)_mm512_maskz_mul_epu32(__mmask8(kAll), (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Bits64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
    return (Bits64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    constexpr uint64_t kLow = 0xffffffffu;
    return (a & kLow) * (b & kLow);
#endif
  }
};

// Sets to[u] for the units [begin, end) of one row: to `hit` with that probability, else to `miss`.
template <typename A>
void draw_row(const Noise& noise, Purpose purpose, int direction, int64_t t, int64_t row,
              double probability, A hit, A miss, int64_t begin, int64_t end, A* to) {
  constexpr int kCounters = kVectorBytes / int(sizeof(uint32_t));
  const auto limit = uint32_t(probability * 0x1p32);
  const auto last = uint32_t(purpose) | uint32_t(direction) << 2 | uint32_t(noise.layer) << 3;
  const Bits32 zero{};
  Bits32 places;
  for (int i = 0; i < kCounters; ++i) places[i] = uint32_t(i);
  for (int64_t group = begin / kUnitsAtOnce; group * kUnitsAtOnce < end; ++group) {
    for (int b = 0; b < kCountersAtOnce; b += kCounters) {
      const int64_t first = group * kUnitsAtOnce + b;  // unit of the vector's first word
      if (first >= end) break;
      Bits32 words[4] = {places + uint32_t(group * kCountersAtOnce + b), zero + uint32_t(row),
                         zero + uint32_t(t), zero + last};
      philox(noise.seed, words);
      for (int k = 0; k < 4; ++k) {
        uint32_t drawn[kCounters];
        for (int i = 0; i < kCounters; ++i) drawn[i] = words[k][i];
        const int64_t unit = first + k * kCountersAtOnce;
        const int64_t from = max_of(begin - unit, 0), count = min_of(end - unit, kCounters);
        for (int64_t i = from; i < count; ++i) to[unit + i] = drawn[i] < limit ? hit : miss;
      }
    }
  }
}

// The factors of recurrent dropout, [D, N, O], which all steps share. Null data: there is none.
template <typename T>
class DropoutMasks {
  using A = Compute<T>;

 public:
  static DropoutMasks take(const Noise& noise, const Sizes& sizes, const Steps& steps,
                           Carver& carver) {
    DropoutMasks made;
    if (noise.recurrent_dropout > 0)
      made.rows_ = CarriedRows<A>::take(sizes, steps, sizes.O, carver);
    return made;
  }

  explicit operator bool() const { return rows_.data; }

  // Draws the thread's part of the rows.
  void draw(const Noise& noise, const Sizes& sizes, const Steps& steps, int thread,
            int threads) const {
    if (!rows_.data) return;
    const double p = noise.recurrent_dropout;
    for_share(sizes.D * steps.N, thread, threads, [&](int64_t i) {
      const int d = int(i / steps.N);
      const int64_t rank = i % steps.N;
      A* const row = rows_.at(d, rank);
      draw_row(noise, Purpose::kDropout, d, 0, batch_row(steps, rank), p, A(0), A(1 / (1 - p)), 0,
               sizes.O, row);
      zero_row(row, sizes.O, rows_.stride);
    });
  }

  const A* at(int direction, int64_t rank) const { return rows_.at(direction, rank); }

  // Writes what the recurrent product reads of h.
  void apply(int direction, int64_t rank, const T* h, Range own, T* to) const {
    const A* const mask = at(direction, rank);
    for (int64_t i = own.begin; i < own.end; i += kLanes<T>) {
      const int64_t n = own.end - i;
      store_up_to(to + i, load_up_to(h + i, n) * load_up_to(mask + i, n), n);
    }
  }

 private:
  CarriedRows<A> rows_;
};

// Draws how much of its earlier state each unit keeps in a step: all or nothing, or the
// expectation.
template <typename A>
void draw_kept(const Noise& noise, Purpose purpose, int direction, int64_t t, int64_t row,
               Range units, A* to) {
  if (noise.draws) {
    draw_row(noise, purpose, direction, t, row, noise.zoneout, A(1), A(0), units.begin, units.end,
             to);
  } else {
    for (int64_t u = units.begin; u < units.end; ++u) to[u] = A(noise.zoneout);
  }
}

// kept x before + (1 - kept) x made. What is not kept at all may be NaN.
template <typename V>
RNNKERN_INLINE V mixed(const V& kept, const V& before, const V& made) {
  using Element = typename ValueTraits<V>::Element;
  const V rest = Element(1) - kept;
  return where_above_zero(kept, kept * before) + where_above_zero(rest, rest * made);
}

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
