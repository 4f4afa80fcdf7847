// Random numbers of recurrent_dropout and zoneout (Noise of scan.h), from a counter: Philox 4x32-10
// (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
//
// A number depends on the seed and on what it is for: layer, direction, step, row of the batch,
// unit and purpose. So it is the same on every device and number of threads, for a row in any
// layout, and backward draws it again instead of reading it. rnnkern/noise.py draws the same
// numbers.
//
// A counter makes four numbers. Sixteen neighbouring counters are those of 64 units: word k of
// counter b is the number of unit 16 k + b. So each word of a vector of counters is that of
// neighbouring units. The four words of a counter are: its place, the row, the step, and the
// purpose with direction and layer.
#pragma once

#include "steps.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

constexpr int kCountersAtOnce = 16;
constexpr int kUnitsAtOnce = 4 * kCountersAtOnce;

// What numbers are drawn for.
enum class Purpose : uint32_t { kDropout, kHidden, kCell };

// The 64-bit product of two words, for one counter or a vector of them.
template <typename Word>
struct WideProduct {
  Word low, high;

  static RNNKERN_INLINE WideProduct of(uint32_t factor, Word word) {
    const uint64_t product = uint64_t(factor) * word;
    return {Word(product), Word(product >> 32)};
  }
};

template <typename Word>
RNNKERN_INLINE void philox(uint64_t key, Word (&words)[4]) {
  constexpr int kRounds = 10;
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < kRounds; ++round) {
    const auto a = WideProduct<Word>::of(0xD2511F53u, words[0]);
    const auto b = WideProduct<Word>::of(0xCD9E8D57u, words[2]);
    words[0] = b.high ^ words[1] ^ k0;
    words[2] = a.high ^ words[3] ^ k1;
    words[1] = b.low;
    words[3] = a.low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
