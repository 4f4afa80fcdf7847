// Kernels that move or multiply as fast as a multiprocessor can: one block on each multiprocessor,
// whose clock is read before and after the loop. Operands are never zero, because multiplying zeros
// takes less power and may run at a higher clock.
#pragma once

#include "harness.cuh"
#include "ptx.cuh"

namespace gpubench {

// Ticks between construction and stop(), the same for all threads of the block.
class Stopwatch {
 public:
  GPUBENCH_DEVICE Stopwatch() {
    __syncthreads();
    start_ = clock64();
  }
  GPUBENCH_DEVICE void stop(long long* cycles) const {
    __syncthreads();
    if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - start_;
  }

 private:
  long long start_;
};

// Never true, which the compiler cannot know. So it does not remove what makes the results.
GPUBENCH_DEVICE void use(float value, int* status) {
  if (value == 1.2345678e33f) report_once(status, kWrongResult);
}
GPUBENCH_DEVICE void use(uint4 v, int* status) {
  if (v.x == 0x9e3779b9u && v.y == 0x7f4a7c15u && v.z == 0xf39cc060u && v.w == 0x5cedc834u) {
    report_once(status, kWrongResult);
  }
}

GPUBENCH_DEVICE unsigned scrambled(unsigned x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}
// +-[1, 2) as a float, and as two bfloat16.
GPUBENCH_DEVICE uint32_t random_float(unsigned x) {
  return (scrambled(x) & 0x807fffffu) | 0x3f800000u;
}
GPUBENCH_DEVICE uint32_t random_bfloat16s(unsigned x) {
  return (scrambled(x) & 0x807f807fu) | 0x3f803f80u;
}

struct ReadArguments {
  const uint4* data;
  size_t count;
  int passes;
  bool whole;  // each block reads all of it, else its share
  int* status;
};

constexpr int kReadThreads = 256;
constexpr int kReadBlocks = 8;  // on a multiprocessor

GPUBENCH_DEVICE void read_range(const uint4* data, size_t begin, size_t end, uint4& sum) {
  constexpr int kBatch = 4;
  for (size_t first = begin + threadIdx.x; first < end; first += kBatch * kReadThreads) {
    uint4 read[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      read[i] = {};
      if (first + i * kReadThreads < end) read[i] = ptx::load_cg(data + first + i * kReadThreads);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      sum.x ^= read[i].x, sum.y ^= read[i].y, sum.z ^= read[i].z, sum.w ^= read[i].w;
    }
  }
}

// Loads bypass the first-level cache (ld.global.cg), so each pass reads from L2, or from memory if
// the buffer is larger than L2.
__global__ void __launch_bounds__(kReadThreads, kReadBlocks) read_global(ReadArguments a) {
  const size_t begin = a.count * blockIdx.x / gridDim.x;
  const size_t end = a.count * (blockIdx.x + 1) / gridDim.x;
  uint4 sum = {};
  for (int pass = 0; pass < a.passes; ++pass) {
    read_range(a.data, begin, a.whole ? a.count : end, sum);
    if (a.whole) read_range(a.data, 0, begin, sum);
  }
  use(sum, a.status);
}

struct ChaseArguments {
  const unsigned* next;  // [entries], `stride` words apart
  int hops;
  bool acquire;
  long long* cycles;
  int* status;
};

__global__ void chase(ChaseArguments a) {
  unsigned at = 0;
  // Once without timing, so that all of it is in L2.
  for (int i = 0; i < a.hops; ++i) at = ptx::load_relaxed(a.next + at);
  const Stopwatch watch;
  if (a.acquire) {
    for (int i = 0; i < a.hops; ++i) at = ptx::load_acquire(a.next + at);
  } else {
    for (int i = 0; i < a.hops; ++i) at = ptx::load_relaxed(a.next + at);
  }
  watch.stop(a.cycles);
  if (at == ~0u) report_once(a.status, kWrongResult);
}

struct RateArguments {
  int iterations;
  long long* cycles;
  int* status;
};

constexpr int kSharedBytesRead = 64 * 1024;

__global__ void __launch_bounds__(1024) read_shared(RateArguments a) {
  extern __shared__ __align__(1024) uint4 memory[];
  constexpr unsigned kChunks = kSharedBytesRead / sizeof(uint4), kBatch = 8;
  const unsigned thread = threadIdx.x, threads = blockDim.x;
  for (unsigned i = thread; i < kChunks; i += threads) {
    const unsigned x = scrambled(i);
    memory[i] = {x, x + 1, x + 2, x + 3};
  }
  const uint32_t base = ptx::shared_address(memory);
  uint4 sum = {};
  const Stopwatch watch;
#pragma unroll 1
  for (int it = 0; it < a.iterations; ++it) {
#pragma unroll
    for (unsigned i = 0; i < kBatch; ++i) {
      // Moved by 32 in each iteration, so that the compiler does not hoist the loads.
      const unsigned c = (thread + i * threads + unsigned(it) * 32) % kChunks;
      const uint4 read = ptx::load_shared(base + c * uint32_t(sizeof(uint4)));
      sum.x ^= read.x, sum.y ^= read.y, sum.z ^= read.z, sum.w ^= read.w;
    }
  }
  watch.stop(a.cycles);
  use(sum, a.status);
}

constexpr int kFmaChains = 16;

__global__ void __launch_bounds__(1024) multiply_adds(RateArguments a) {
  // x -> x / 2 + b stays near 2 b.
  const float half = 0.5f, b = __uint_as_float(random_float(threadIdx.x));
  float sums[kFmaChains];
#pragma unroll
  for (int i = 0; i < kFmaChains; ++i) sums[i] = float(i);
  const Stopwatch watch;
#pragma unroll 1
  for (int it = 0; it < a.iterations; ++it) {
#pragma unroll
    for (int i = 0; i < kFmaChains; ++i) ptx::multiply_add(sums[i], half, b);
  }
  watch.stop(a.cycles);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kFmaChains; ++i) sum += sums[i];
  use(sum, a.status);
}

struct Bf16Product {
  static constexpr int kDepth = 16;
  GPUBENCH_DEVICE static uint32_t operand(unsigned x) { return random_bfloat16s(x); }
  GPUBENCH_DEVICE static void run(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ptx::mma_bf16(d, a, b);
  }
};
struct Tf32Product {
  static constexpr int kDepth = 8;
  GPUBENCH_DEVICE static uint32_t operand(unsigned x) { return random_float(x); }
  GPUBENCH_DEVICE static void run(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ptx::mma_tf32(d, a, b);
  }
};

// kChains products of 16 x 8 that do not wait for each other, operands in registers.
template <typename Product, int kChains>
__global__ void __launch_bounds__(512) products(RateArguments arguments) {
  uint32_t a[4], b[2];
  float d[kChains][4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = Product::operand(threadIdx.x * 8 + unsigned(i));
#pragma unroll
  for (int i = 0; i < 2; ++i) b[i] = Product::operand(threadIdx.x * 8 + 4 + unsigned(i));
  const Stopwatch watch;
#pragma unroll 1
  for (int it = 0; it < arguments.iterations; ++it) {
#pragma unroll
    for (int i = 0; i < kChains; ++i) Product::run(d[i], a, b);
  }
  watch.stop(arguments.cycles);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kChains; ++i) sum += d[i][0] + d[i][1] + d[i][2] + d[i][3];
  use(sum, arguments.status);
}

constexpr int kFragmentBytes = 512;    // of A, 16 x 16 bfloat16
constexpr int kFragmentsOfWarp = 16;   // in shared memory
constexpr int kFragmentsInFlight = 4;  // rows of W that do not wait for each other

// A from shared memory, as if W_hh were resident there. Each fragment is multiplied by kColumns / 8
// fragments of B in registers, which are a batch of kColumns.
template <int kColumns>
__global__ void __launch_bounds__(512) products_from_shared(RateArguments arguments) {
  extern __shared__ __align__(1024) uint4 memory[];
  constexpr int kTiles = kColumns / 8;
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  const int words = threads / 32 * kFragmentsOfWarp * kFragmentBytes / 4;
  for (int i = thread; i < words; i += threads) {
    reinterpret_cast<uint32_t*>(memory)[i] = random_bfloat16s(unsigned(i));
  }
  uint32_t b[kTiles][2];
  float d[kFragmentsInFlight][kTiles][4] = {};
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    b[n][0] = random_bfloat16s(unsigned(thread * 64 + n * 2));
    b[n][1] = random_bfloat16s(unsigned(thread * 64 + n * 2 + 1));
  }
  // A row of 8 is 16 bytes, and a fragment 32 contiguous rows: no bank conflicts.
  const uint32_t mine = ptx::shared_address(memory) + uint32_t(thread % 32) * 16 +
                        uint32_t(thread / 32 * kFragmentsOfWarp * kFragmentBytes);
  const Stopwatch watch;
#pragma unroll 1
  for (int it = 0; it < arguments.iterations; ++it) {
#pragma unroll
    for (int i = 0; i < kFragmentsOfWarp; ++i) {
      uint32_t a[4];
      // Moved by one in each iteration, so that the compiler does not hoist the loads.
      ptx::load_matrices(a, mine + uint32_t((i + it) % kFragmentsOfWarp * kFragmentBytes));
#pragma unroll
      for (int n = 0; n < kTiles; ++n) ptx::mma_bf16(d[i % kFragmentsInFlight][n], a, b[n]);
    }
  }
  watch.stop(arguments.cycles);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kFragmentsInFlight; ++i) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) sum += d[i][n][0] + d[i][n][1] + d[i][n][2] + d[i][n][3];
  }
  use(sum, arguments.status);
}

// ---- wgmma ----

constexpr int kDepth = 256;  // of the product: 16 instructions
constexpr int kWgmmaRows = 64;
constexpr int wgmma_bytes(int warpgroups, int columns) {
  return (warpgroups * kWgmmaRows + columns) * kDepth * 2;
}

// The offset of element (row, k) of an operand, in bytes. Plain: contiguous core matrices of 8 rows
// by 16 bytes, those of one k one after the other. Swizzled: rows of 128 bytes, whose eight pieces
// of 16 bytes are permuted by the number of the row; an atom has eight rows.
template <bool kSwizzled>
GPUBENCH_DEVICE int place_of(int row, int k, int rows) {
  if (kSwizzled) {
    return k / 64 * rows * 128 + row / 8 * 1024 + row % 8 * 128 + ((k % 64 / 8) ^ (row % 8)) * 16 +
           k % 8 * 2;
  }
  return (k / 8 * (rows / 8) + row / 8) * 128 + row % 8 * 16 + k % 8 * 2;
}
// The descriptor of an operand for k from 16 i to 16 i + 15. Plain: the leading offset is that of
// the next core matrix along k, the stride offset that of the next 8 rows. Swizzled: the leading
// offset is not used, and the stride offset is that of the next atom.
template <bool kSwizzled>
GPUBENCH_DEVICE uint64_t descriptor(uint32_t operand, int rows, int i) {
  const int start = kSwizzled ? i / 4 * rows * 128 + i % 4 * 32 : i * 2 * rows * 16;
  const uint64_t address = (operand + uint32_t(start)) & 0x3ffff;
  const uint64_t leading = kSwizzled ? 16 : uint64_t(rows) * 16, stride = kSwizzled ? 1024 : 128;
  return address >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 |
         (kSwizzled ? uint64_t(1) << 62 : 0);
}
// Small integers, so that the product is exact.
GPUBENCH_DEVICE int wgmma_a(int row, int k) { return int(scrambled(row * 1024 + k) % 5) - 2; }
GPUBENCH_DEVICE int wgmma_b(int column, int k) {
  return int(scrambled(0x10000 + column * 1024 + k) % 5) - 2;
}
GPUBENCH_DEVICE uint16_t to_bfloat16(int value) {
  return uint16_t(__float_as_uint(float(value)) >> 16);
}

struct WgmmaArguments {
  int iterations;
  bool checked;  // compare the sums of one iteration
  long long* cycles;
  int* status;
};

// Each warpgroup has 64 rows of its own and shares the columns: D[64, N] += A[64, 256] B[256, N] in
// each iteration. kPending 0 waits for each product of depth 256 before the next one begins.
template <int kColumns, bool kSwizzled, int kPending>
__global__ void __launch_bounds__(512) warpgroup_products(WgmmaArguments arguments) {
#ifdef GPUBENCH_WGMMA
  extern __shared__ __align__(1024) char operands[];
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  // Uniform over the warp, which the compiler has to see: descriptors are in uniform registers.
  const int warpgroups = threads / 128, warpgroup = __shfl_sync(~0u, thread / 128, 0);
  constexpr int kBytesOfA = kWgmmaRows * kDepth * 2;
  char* b = operands + warpgroups * kBytesOfA;
  for (int i = thread; i < warpgroups * kWgmmaRows * kDepth; i += threads) {
    const int row = i / kDepth, k = i % kDepth;
    char* to = operands + row / kWgmmaRows * kBytesOfA +
               place_of<kSwizzled>(row % kWgmmaRows, k, kWgmmaRows);
    *reinterpret_cast<uint16_t*>(to) = to_bfloat16(wgmma_a(row, k));
  }
  for (int i = thread; i < kColumns * kDepth; i += threads) {
    const int column = i / kDepth, k = i % kDepth;
    char* to = b + place_of<kSwizzled>(column, k, kColumns);
    *reinterpret_cast<uint16_t*>(to) = to_bfloat16(wgmma_b(column, k));
  }
  ptx::fence_async_proxy();  // wgmma reads what ordinary stores have written
  __syncthreads();
  const uint32_t mine = ptx::shared_address(operands + warpgroup * kBytesOfA);
  const uint32_t shared_b = ptx::shared_address(b);
  float d[kColumns / 2] = {};
  const Stopwatch watch;
  ptx::wgmma_fence_sums(d);
#pragma unroll 1
  for (int it = 0; it < arguments.iterations; ++it) {
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kDepth / 16; ++i) {
      ptx::wgmma(d, descriptor<kSwizzled>(mine, kWgmmaRows, i),
                 descriptor<kSwizzled>(shared_b, kColumns, i));
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<kPending>();
  }
  ptx::wgmma_wait<0>();
  ptx::wgmma_fence_sums(d);
  watch.stop(arguments.cycles);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) sum += d[i];
  use(sum, arguments.status);
  if (!arguments.checked) return;
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) {
    const int row =
        warpgroup * kWgmmaRows + thread % 128 / 32 * 16 + i / 2 % 2 * 8 + thread % 32 / 4;
    const int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
    int wanted = 0;
    for (int k = 0; k < kDepth; ++k) wanted += wgmma_a(row, k) * wgmma_b(column, k);
    if (d[i] != float(wanted)) report_once(arguments.status, kWrongResult);
  }
#else
  report_once(arguments.status, kNotBuilt);
#endif
}

}  // namespace gpubench
