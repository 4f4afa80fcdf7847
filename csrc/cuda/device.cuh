// What kernels ask of the GPU. Under nvcc these are its instructions. With RNNKERN_SIMT they are
// plain C++ of the same meaning, on the fibers of tests/simt/simt.h. Only this file has inline PTX.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cells/math.h"
#include "cells/narrow.h"

#ifdef RNNKERN_SIMT
#include <source_location>

#include "simt.h"
#define RNNKERN_DEVICE inline
// The place where the caller waits. Tests leave out one wait at a time.
#define RNNKERN_HERE simt::Where where = std::source_location::current()
#else
#define RNNKERN_DEVICE __device__ __forceinline__
#define RNNKERN_HERE
#endif

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

constexpr int kWarp = 32;

// 16 bytes, the most that a lane moves at once.
struct alignas(16) Quad {
  uint32_t words[4];
};

// An unsigned number of so many bytes.
template <size_t kBytes>
using Unsigned =
    std::conditional_t<kBytes == 8, uint64_t, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>;

// float32 that is multiplied as TF32: its last 13 bits are zero.
struct Tf32 {
  float number;
};

// 1 / x within one unit in the last place; zero if the result is no normal number.
RNNKERN_INLINE float approximate_reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  // The stand-in is off by one unit, up or down.
  const float exact = 1 / x;
  const auto bits = bit_cast<uint32_t>(exact);
  return exact > 0x1p-126f && exact < 1 ? bit_cast<float>(bits + (bits % 3 - 1)) : exact;
#endif
}

// Division has a branch to a slow path, which keeps the compiler from computing several gates at
// once. One correction of an approximate quotient is within 0.51 ulp.
template <>
struct Quotient<float> {
  static RNNKERN_INLINE float of(float a, float b) {
    const float reciprocal = approximate_reciprocal(b);
    const float quotient = a * reciprocal;
    return __builtin_fmaf(__builtin_fmaf(-quotient, b, a), reciprocal, quotient);
  }
};

#ifdef RNNKERN_SIMT

RNNKERN_DEVICE int thread_index() { return int(simt::thread_in_block()); }
RNNKERN_DEVICE int block_index() { return int(simt::launch().fiber().block->index.x); }
RNNKERN_DEVICE int threads_per_block() { return int(simt::launch().block.x); }
RNNKERN_DEVICE int blocks_in_grid() { return int(simt::launch().grid.x); }

// Waits until all threads of the block are here. Each then sees what the others have written.
RNNKERN_DEVICE void sync_block(RNNKERN_HERE) {
  if (!simt::left_out(where)) simt::launch().meet(simt::launch().fiber().block->barrier);
}

RNNKERN_DEVICE char* shared_memory() { return simt::launch().fiber().block->shared.data(); }

// Sets a flag in global memory, whose value grows. A thread that sees the value also sees what was
// written before it was set. The stand-in itself notices a flag that is never set.
RNNKERN_DEVICE void wait_until(const int* flag, int least, int*, RNNKERN_HERE) {
  while (*flag < least && !simt::left_out(where)) simt::launch().park();
}
RNNKERN_DEVICE void set_flag(int* flag, int value, RNNKERN_HERE) {
  if (simt::left_out(where)) return;
  *flag = value;
  simt::launch().progress();
}

// Waits until all lanes of the warp are here. Each then sees what the others have written.
RNNKERN_DEVICE void sync_warp(RNNKERN_HERE) {
  if (!simt::left_out(where)) simt::launch().meet(simt::warp().meeting);
}

RNNKERN_DEVICE void hold_loads() {}
template <typename... Value>
RNNKERN_DEVICE void compute_here(Value&...) {}
RNNKERN_DEVICE int computed_once(int value) { return value; }

// Reads what other blocks have written, past this multiprocessor's cache.
RNNKERN_DEVICE Quad load_from_l2(const Quad* from) { return *from; }

// Reads it while they write it. Each number is the old one or the new one.
template <typename E>
RNNKERN_DEVICE Quad load_relaxed(const Quad* from) {
  return *from;
}
template <typename V>
RNNKERN_DEVICE void store_relaxed(V* to, const V& value) {
  *to = value;
  simt::launch().progress_later();
}
// A thread that sees a value which this one stores from now on, and then orders its own memory too,
// sees what this one has stored until now.
RNNKERN_DEVICE void order_memory() {}
// Comes before another look at what others are about to write. The first look may be an old one.
RNNKERN_DEVICE void look_again(int looks, int*) {
  if (looks > 0) simt::launch().park();
}

// Calls f(lanes) with a pointer to the `own` of each lane of the warp.
template <typename Value, typename F>
auto with_all_lanes(const Value& own, F f) {
  simt::Warp& warp = simt::warp();
  warp.values[thread_index() % kWarp] = reinterpret_cast<uintptr_t>(&own);
  simt::launch().meet(warp.meeting);
  const auto result = f(
      [&](int lane) -> const Value& { return *reinterpret_cast<const Value*>(warp.values[lane]); });
  simt::launch().meet(warp.meeting);
  return result;
}

RNNKERN_DEVICE bool any_lane(bool own) {
  return with_all_lanes(own, [](auto lane) {
    bool any = false;
    for (int i = 0; i < kWarp; ++i) any |= lane(i);
    return any;
  });
}

template <typename A>
RNNKERN_DEVICE A from_lane_xor(A value, int mask) {
  return with_all_lanes(value, [&](auto lane) { return lane((thread_index() % kWarp) ^ mask); });
}

// Rounded to 16 bits as by narrow(), but one NaN may become another one; and back.
template <typename E>
RNNKERN_DEVICE E narrowed(float x) {
  return {uint16_t(narrow(E{}, x))};
}
template <typename E>
RNNKERN_DEVICE float widened(E x) {
  return value(x);
}

RNNKERN_DEVICE Tf32 to_tf32(float x) {
  const auto bits = bit_cast<uint32_t>(x);
  if (x != x) return {x};
  return {bit_cast<float>((bits + 0x1000u) & ~0x1fffu)};  // to the nearest, ties away from zero
}

// The numbers in a word of operands, in order.
RNNKERN_DEVICE void numbers_of(Tf32, uint32_t word, float* out) { out[0] = bit_cast<float>(word); }
template <typename E>
RNNKERN_DEVICE void numbers_of(E, uint32_t word, float* out) {
  out[0] = value(E{uint16_t(word)});
  out[1] = value(E{uint16_t(word >> 16)});
}

// sums += a b on the tensor cores, of operands E: a is 16 rows, b 8 columns, of 32 bytes along k.
// Lane 4 g + q has rows g (words 0, 2) and g + 8 (1, 3) of a, column g of b, and of the sums rows g
// (0, 1) and g + 8 (2, 3) at columns 2 q and 2 q + 1. Words of a and b at the same q and place
// belong together, whatever k they are.
template <typename E>
RNNKERN_DEVICE void multiply_tiles(const Quad& a, uint32_t b0, uint32_t b1, float (&sums)[4]) {
  constexpr int kPerWord = 4 / int(sizeof(E));
  struct Own {
    Quad a;
    uint32_t b[2];
  } own = {a, {b0, b1}};
  const int g = thread_index() % kWarp / 4, q = thread_index() % 4;
  with_all_lanes(own, [&](auto lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = i / 2, column = 2 * q + i % 2;
      double sum = 0;
      for (int p = 0; p < 4; ++p) {
        for (int half = 0; half < 2; ++half) {
          float left[2], right[2];
          numbers_of(E{}, lane(4 * g + p).a.words[row + 2 * half], left);
          numbers_of(E{}, lane(4 * column + p).b[half], right);
          for (int j = 0; j < kPerWord; ++j) sum += double(left[j]) * right[j];
        }
      }
      sums[i] += float(sum);
    }
    return 0;
  });
}

#else

RNNKERN_DEVICE int thread_index() { return int(threadIdx.x); }
RNNKERN_DEVICE int block_index() { return int(blockIdx.x); }
RNNKERN_DEVICE int threads_per_block() { return int(blockDim.x); }
RNNKERN_DEVICE int blocks_in_grid() { return int(gridDim.x); }

RNNKERN_DEVICE void sync_block() { __syncthreads(); }

RNNKERN_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// About ten seconds of reading the flag, each time with a trip to the L2.
constexpr int kMostLooks = 1 << 26;

// Ends the launch with an error, after which the process cannot use the device. A number in the
// host's memory says which kernel has given up.
[[noreturn]] RNNKERN_DEVICE void give_up(int* gave_up) {
  if (gave_up) *gave_up = 1;
  __threadfence_system();
  __trap();
  __builtin_unreachable();
}

// The flag is read with relaxed loads, because each load that acquires empties the multiprocessor's
// cache. The acquire follows the load that has seen the value. It makes no second trip: both forms
// are compiled to CCTL.IVALL alone, because the result of the load is not used.
RNNKERN_DEVICE void wait_until(const int* flag, int least, int* gave_up) {
  int value;
#pragma unroll 1
  for (int looks = 0;; ++looks) {
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    if (value >= least) break;
    if (looks == kMostLooks) give_up(gave_up);
  }
#if __CUDA_ARCH__ >= 900 && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1208
  asm volatile("fence.acquire.gpu;" ::: "memory");
#else
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
#endif
}
RNNKERN_DEVICE void set_flag(int* flag, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

RNNKERN_DEVICE void sync_warp() { __syncwarp(); }

// No load below moves above this. Otherwise the compiler would move so many loads ahead that the
// registers do not suffice.
RNNKERN_DEVICE void hold_loads() { __syncwarp(); }

// Makes the compiler compute the values here, and not after the caller's next wait.
template <typename Pointee>
RNNKERN_DEVICE void compute_one_here(Pointee*& value) {
  asm volatile("" : "+l"(value));
}
RNNKERN_DEVICE void compute_one_here(int& value) { asm volatile("" : "+r"(value)); }
RNNKERN_DEVICE void compute_one_here(float& value) { asm volatile("" : "+f"(value)); }
RNNKERN_DEVICE void compute_one_here(double& value) { asm volatile("" : "+d"(value)); }
template <typename... Value>
RNNKERN_DEVICE void compute_here(Value&... values) {
  (compute_one_here(values), ...);
}

// Keeps the value in a register for good. If registers are few, ptxas would otherwise recompute it
// in every step, behind a barrier. It cannot do so with a value that comes from another lane. All
// lanes of a warp call this.
RNNKERN_DEVICE int computed_once(int value) {
  return __shfl_sync(~0u, value, int(threadIdx.x % kWarp));
}

RNNKERN_DEVICE Quad load_from_l2(const Quad* from) {
  Quad quad;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(quad.words[0]), "=r"(quad.words[1]), "=r"(quad.words[2]), "=r"(quad.words[3])
               : "l"(from)
               : "memory");
  return quad;
}

template <typename E>
RNNKERN_DEVICE Quad load_relaxed(const Quad* from) {
  Quad quad;
  if constexpr (sizeof(E) == 8) {
    uint64_t numbers[2];
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
                 : "=l"(numbers[0]), "=l"(numbers[1])
                 : "l"(from)
                 : "memory");
#pragma unroll
    for (int i = 0; i < 4; ++i) quad.words[i] = uint32_t(numbers[i / 2] >> (i % 2 * 32));
  } else {
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(quad.words[0]), "=r"(quad.words[1]), "=r"(quad.words[2]),
                   "=r"(quad.words[3])
                 : "l"(from)
                 : "memory");
  }
  return quad;
}
RNNKERN_DEVICE void store_relaxed(uint16_t* to, uint16_t value) {
  asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(to), "h"(value) : "memory");
}
RNNKERN_DEVICE void store_relaxed(uint32_t* to, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
RNNKERN_DEVICE void store_relaxed(uint64_t* to, uint64_t value) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}
// Stores a value in pieces of its alignment, at most 8 bytes each.
template <typename V>
RNNKERN_DEVICE void store_relaxed(V* to, const V& value) {
  using Piece = Unsigned<alignof(V) < 8 ? alignof(V) : 8>;
  struct Pieces {
    Piece of[sizeof(V) / sizeof(Piece)];
  };
  const auto pieces = bit_cast<Pieces>(value);
#pragma unroll
  for (size_t i = 0; i < sizeof(V) / sizeof(Piece); ++i) {
    store_relaxed(reinterpret_cast<Piece*>(to) + i, pieces.of[i]);
  }
}
RNNKERN_DEVICE void order_memory() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
RNNKERN_DEVICE void look_again(int looks, int* gave_up) {
  if (looks == kMostLooks) give_up(gave_up);
}

RNNKERN_DEVICE bool any_lane(bool own) { return __any_sync(~0u, own); }

template <typename A>
RNNKERN_DEVICE A from_lane_xor(A value, int mask) {
  return __shfl_xor_sync(~0u, value, mask);
}

template <typename E>
RNNKERN_DEVICE E narrowed(float x) {
  E to;
  if constexpr (std::is_same_v<E, Bf16>) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
  } else {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
  }
  return to;
}
RNNKERN_DEVICE float widened(Bf16 x) { return value(x); }
RNNKERN_DEVICE float widened(F16 x) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
}

RNNKERN_DEVICE Tf32 to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return {__uint_as_float(bits)};
}

#define RNNKERN_MULTIPLY_TILES(E, TILE)                                                         \
  RNNKERN_DEVICE void multiply_tiles_of(E, const Quad& a, uint32_t b0, uint32_t b1,             \
                                        float (&sums)[4]) {                                     \
    asm volatile("mma.sync.aligned." TILE                                                       \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"             \
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                   \
                 : "r"(a.words[0]), "r"(a.words[1]), "r"(a.words[2]), "r"(a.words[3]), "r"(b0), \
                   "r"(b1));                                                                    \
  }
RNNKERN_MULTIPLY_TILES(Bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
RNNKERN_MULTIPLY_TILES(F16, "m16n8k16.row.col.f32.f16.f16.f32")
RNNKERN_MULTIPLY_TILES(Tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef RNNKERN_MULTIPLY_TILES

template <typename E>
RNNKERN_DEVICE void multiply_tiles(const Quad& a, uint32_t b0, uint32_t b1, float (&sums)[4]) {
  multiply_tiles_of(E{}, a, b0, b1, sums);
}

#endif

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
