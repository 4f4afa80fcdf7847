// Measures the constants that a plan of GPU kernels needs: what a launch costs, how fast blocks
// hand a state to each other, how fast memory of each kind is read and how fast products run.
//
//   nvcc -std=c++20 -O3 -gencode arch=compute_90a,code=sm_90a -o constants constants.cu
//   ./constants constants.json [group ...]
//
// Every time is the median of 5 runs after 2 warm-ups. If blocks hand on a state, the result of
// each run is checked, and a wrong one is a failure and not a time.
#include <cstring>
#include <numeric>
#include <random>

#include "measure_handoff.cuh"
#include "rates.cuh"

namespace gpubench {
namespace {

const char* const kEvents = "CUDA events";
const char* const kClock = "clock64 around the loop, median block, one block a multiprocessor";

// ---- Launches ----

__global__ void tick(unsigned* counter) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *counter += 1;
}
__global__ void cooperative_tick(unsigned* counter) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *counter += 1;
}

constexpr int kChain = 100;

// A captured chain of launches, ready to be started.
class Graph {
 public:
  Graph(cudaStream_t stream, const std::function<void()>& launches) {
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    try {
      launches();
    } catch (...) {
      cudaGraph_t broken = nullptr;
      report_error(cudaStreamEndCapture(stream, &broken), "cudaStreamEndCapture");
      if (broken) report_error(cudaGraphDestroy(broken), "cudaGraphDestroy");
      throw;
    }
    check(cudaStreamEndCapture(stream, &graph_));
    check(cudaGraphInstantiate(&runnable_, graph_, 0));
    check(cudaGraphUpload(runnable_, stream));
    check(cudaStreamSynchronize(stream));
  }
  ~Graph() {
    if (runnable_) report_error(cudaGraphExecDestroy(runnable_), "cudaGraphExecDestroy");
    if (graph_) report_error(cudaGraphDestroy(graph_), "cudaGraphDestroy");
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void launch(cudaStream_t stream) const { check(cudaGraphLaunch(runnable_, stream)); }

 private:
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t runnable_ = nullptr;
};

// Median time on the host of a call and of waiting for its end.
double median_wall_us(cudaStream_t stream, const std::function<void()>& work) {
  std::vector<double> samples;
  for (int i = 0; i < 220; ++i) {
    const auto start = std::chrono::steady_clock::now();
    work();
    check(cudaStreamSynchronize(stream));
    const std::chrono::duration<double, std::micro> taken =
        std::chrono::steady_clock::now() - start;
    if (i >= 20) samples.push_back(taken.count());
  }
  return median(samples);
}

void measure_launches(Bench& bench) {
  const Buffer<unsigned> counter(1);
  check(cudaMemset(counter.get(), 0, counter.bytes()));
  const cudaStream_t stream = bench.stream;
  for (const int blocks : {1, bench.multiprocessors()}) {
    const std::string shape = suffix_of(blocks, "_blocks");
    const auto plain = [&] {
      tick<<<unsigned(blocks), kHandoffThreads, 0, stream>>>(counter.get());
      check(cudaGetLastError());
    };
    const auto cooperative = [&] {
      bench.launch_cooperative(cooperative_tick, blocks, kHandoffThreads, 0, counter.get());
    };
    for (const bool together : {false, true}) {
      const std::function<void()> one = together ? std::function<void()>(cooperative) : plain;
      const std::string kind = together ? "cooperative" : "kernel";
      const auto chain = [&] {
        for (int i = 0; i < kChain; ++i) one();
      };
      bench.measure("launch_" + kind + shape, "us", "a chain of 100 in a stream, events, each",
                    [&] { return bench.median_us(chain) / kChain; });
      bench.measure("graph_" + kind + shape, "us", "a graph of a chain of 100, events, each", [&] {
        const Graph graph(stream, chain);
        return bench.median_us([&] { graph.launch(stream); }) / kChain;
      });
      bench.measure("launch_and_wait_" + kind + shape, "us",
                    "host time of a launch and cudaStreamSynchronize, median of 200",
                    [&] { return median_wall_us(stream, one); });
    }
    bench.measure("graph_and_wait_kernel" + shape, "us",
                  "host time of a graph of one kernel and cudaStreamSynchronize, median of 200",
                  [&] {
                    const Graph graph(stream, plain);
                    return median_wall_us(stream, [&] { graph.launch(stream); });
                  });
  }
}

// ---- Memory ----

void measure_memory(Bench& bench) {
  constexpr size_t kMega = size_t(1) << 20, kLarge = 2048 * kMega;
  const Buffer<uint4> from(kLarge / sizeof(uint4)), to(kLarge / sizeof(uint4));
  check(cudaMemset(from.get(), 0x5a, from.bytes()));
  bench.measure("memory_copy", "GB/s", "cudaMemcpyAsync of 2 GiB, bytes read and written", [&] {
    const double us = bench.median_us([&] {
      check(cudaMemcpyAsync(to.get(), from.get(), kLarge, cudaMemcpyDeviceToDevice, bench.stream));
    });
    return 2e-3 * double(kLarge) / us;
  });
  const int blocks = bench.multiprocessors() * kReadBlocks;
  const auto read = [&](size_t bytes, int passes, bool whole) {
    const ReadArguments arguments = {from.get(), bytes / sizeof(uint4), passes, whole,
                                     bench.status()};
    const double us = bench.median_us(
        [&] { read_global<<<unsigned(blocks), kReadThreads, 0, bench.stream>>>(arguments); });
    return 1e-3 * double(bytes) * passes * (whole ? blocks : 1) / us;
  };
  bench.measure("memory_read", "GB/s", "2 GiB once, 16 bytes a load",
                [&] { return read(kLarge, 1, false); });
  for (const size_t megabytes : {4, 16, 32}) {
    const std::string size = suffix_of(megabytes, "_mib");
    bench.measure("l2_read_own_share" + size, "GB/s",
                  "each block reads its own share again and again, ld.global.cg",
                  [&] { return read(megabytes * kMega, int(8192 / megabytes), false); });
    bench.measure("l2_read_by_all" + size, "GB/s",
                  "each of 8 blocks a multiprocessor reads all of it, ld.global.cg",
                  [&] { return read(megabytes * kMega, int(32 / megabytes), true); });
  }

  // One cycle through all entries, in random order (Sattolo), 128 bytes apart.
  constexpr unsigned kEntries = 16384, kStride = 32;
  std::vector<unsigned> order(kEntries), next(size_t(kEntries) * kStride);
  std::iota(order.begin(), order.end(), 0u);
  std::mt19937 random(1);
  for (unsigned i = kEntries - 1; i > 0; --i) std::swap(order[i], order[random() % i]);
  for (unsigned i = 0; i < kEntries; ++i) next[i * kStride] = order[i] * kStride;
  const Buffer<unsigned> chain(next.size());
  check(cudaMemcpy(chain.get(), next.data(), chain.bytes(), cudaMemcpyHostToDevice));
  for (const bool acquire : {false, true}) {
    const std::string name = acquire ? "l2_latency_acquire" : "l2_latency_relaxed";
    const ChaseArguments arguments = {chain.get(), int(kEntries), acquire, bench.cycles(),
                                      bench.status()};
    bench.measure(name, "clk", "one thread follows a random chain through 2 MiB, gpu scope", [&] {
      bench.median_us([&] { chase<<<1, 1, 0, bench.stream>>>(arguments); });
      return bench.median_cycles(1) / kEntries;
    });
  }
}

// ---- Shared memory and arithmetic ----

// Runs a kernel with one block on each multiprocessor. Reports `work` of a block by its clock, and
// of all blocks by time, in tera.
template <typename Arguments>
void measure_rate(Bench& bench, const std::string& name, const std::string& what,
                  void (*kernel)(Arguments), int threads, size_t shared, Arguments arguments,
                  double work) {
  const int blocks = bench.multiprocessors();
  double us = 0;
  bench.measure(name, what + "/clk/SM", kClock, [&] {
    bench.allow_shared(kernel, shared);
    us = bench.median_us(
        [&] { kernel<<<unsigned(blocks), unsigned(threads), shared, bench.stream>>>(arguments); });
    return work / bench.median_cycles(blocks);
  });
  if (us > 0) bench.add(name + "_total", 1e-6 * work * blocks / us, "T" + what + "/s", kEvents);
}

template <typename Product, int kChains>
void measure_products(Bench& bench, const std::string& name, int warps) {
  constexpr int kIterations = 4096;
  measure_rate(bench, name + suffix_of(warps, "_warps"), "FLOP", products<Product, kChains>,
               warps * 32, bench.whole_multiprocessor(0),
               {kIterations, bench.cycles(), bench.status()},
               2.0 * 16 * 8 * Product::kDepth * kChains * kIterations * warps);
}

template <typename Product>
void measure_latency_of_product(Bench& bench, const std::string& name) {
  constexpr int kIterations = 4096;
  bench.measure(name, "clk", "one warp, each mma.sync waits for the one before", [&] {
    bench.median_us([&] {
      products<Product, 1>
          <<<1, 32, 0, bench.stream>>>({kIterations, bench.cycles(), bench.status()});
    });
    return bench.median_cycles(1) / kIterations;
  });
}

template <int kColumns>
void measure_products_from_shared(Bench& bench, int warps) {
  constexpr int kIterations = 1024;
  const std::string name = "mma_bf16_a_from_shared_n" + std::to_string(kColumns) + "_" +
                           std::to_string(warps) + "_warps";
  const double fragments = double(kFragmentsOfWarp) * kIterations * warps;
  const RateArguments arguments = {kIterations, bench.cycles(), bench.status()};
  const size_t shared =
      bench.whole_multiprocessor(size_t(warps) * kFragmentsOfWarp * kFragmentBytes);
  measure_rate(bench, name, "FLOP", products_from_shared<kColumns>, warps * 32, shared, arguments,
               fragments * 2 * 16 * 16 * kColumns);
  measure_rate(bench, name + "_bytes_of_a", "byte", products_from_shared<kColumns>, warps * 32,
               shared, arguments, fragments * kFragmentBytes);
}

void measure_arithmetic(Bench& bench) {
  constexpr int kIterations = 4096;
  const RateArguments arguments = {kIterations, bench.cycles(), bench.status()};
  const size_t alone = bench.whole_multiprocessor(kSharedBytesRead);
  for (const int warps : {4, 8, 16, 32}) {
    const std::string suffix = suffix_of(warps, "_warps");
    measure_rate(bench, "shared_read" + suffix, "byte", read_shared, warps * 32, alone, arguments,
                 16.0 * 8 * kIterations * warps * 32);
    measure_rate(bench, "ffma" + suffix, "FLOP", multiply_adds, warps * 32, alone, arguments,
                 2.0 * kFmaChains * kIterations * warps * 32);
  }
  for (const int warps : {4, 8, 16}) {
    measure_products<Bf16Product, 8>(bench, "mma_bf16", warps);
    measure_products<Tf32Product, 8>(bench, "mma_tf32", warps);
    measure_products_from_shared<8>(bench, warps);
    measure_products_from_shared<16>(bench, warps);
    measure_products_from_shared<32>(bench, warps);
  }
  measure_latency_of_product<Bf16Product>(bench, "mma_bf16_latency");
  measure_latency_of_product<Tf32Product>(bench, "mma_tf32_latency");
}

// ---- wgmma ----

template <int kColumns, bool kSwizzled>
void measure_wgmma(Bench& bench) {
  const std::string name =
      "wgmma_bf16_n" + std::to_string(kColumns) + (kSwizzled ? "_swizzled" : "_plain");
  const WgmmaArguments checked = {1, true, bench.cycles(), bench.status()};
  WgmmaArguments timed = {512, false, bench.cycles(), bench.status()};
  const auto flop = [&](int warpgroups) {
    return 2.0 * kWgmmaRows * kColumns * kDepth * timed.iterations * warpgroups;
  };
  // 1 if the result is right, and so the descriptors are as documented.
  bench.measure(name + "_checked", "", "one product of depth 256 against integers", [&] {
    const size_t shared = bench.whole_multiprocessor(wgmma_bytes(4, kColumns));
    bench.allow_shared(warpgroup_products<kColumns, kSwizzled, 0>, shared);
    warpgroup_products<kColumns, kSwizzled, 0><<<1, 512, shared, bench.stream>>>(checked);
    check(cudaGetLastError());
    bench.verify();
    return 1.0;
  });
  for (const int warpgroups : {1, 2, 4}) {
    measure_rate(bench, name + suffix_of(warpgroups, "_warpgroups"), "FLOP",
                 warpgroup_products<kColumns, kSwizzled, 1>, warpgroups * 128,
                 bench.whole_multiprocessor(wgmma_bytes(warpgroups, kColumns)), timed,
                 flop(warpgroups));
  }
  bench.measure(name + "_latency_k256", "clk",
                "one warpgroup, 16 wgmma from the first to the end of wait_group 0", [&] {
                  const size_t shared = bench.whole_multiprocessor(wgmma_bytes(1, kColumns));
                  bench.median_us([&] {
                    warpgroup_products<kColumns, kSwizzled, 0>
                        <<<1, 128, shared, bench.stream>>>(timed);
                  });
                  return bench.median_cycles(1) / timed.iterations;
                });
}

void measure_wgmma_rates(Bench& bench) {
  if (bench.properties.major != 9) return bench.fail("wgmma", "this device has none");
  measure_wgmma<8, false>(bench);
  measure_wgmma<16, false>(bench);
  measure_wgmma<32, false>(bench);
  measure_wgmma<64, false>(bench);
  measure_wgmma<8, true>(bench);
  measure_wgmma<16, true>(bench);
  measure_wgmma<32, true>(bench);
  measure_wgmma<64, true>(bench);
}

void describe_device(Bench& bench) {
  const cudaDeviceProp& p = bench.properties;
  int driver = 0, runtime = 0, clock_khz = 0, memory_khz = 0;
  check(cudaDriverGetVersion(&driver));
  check(cudaRuntimeGetVersion(&runtime));
  check(cudaDeviceGetAttribute(&clock_khz, cudaDevAttrClockRate, 0));
  check(cudaDeviceGetAttribute(&memory_khz, cudaDevAttrMemoryClockRate, 0));
  const auto entry = [](const char* name, double value) {
    return ", " + quoted(name) + ": " + std::to_string((long long)(value));
  };
  bench.send(
      '=', "{\"name\": " + quoted(p.name) + entry("major", p.major) + entry("minor", p.minor) +
               entry("multiprocessors", p.multiProcessorCount) + entry("l2_bytes", p.l2CacheSize) +
               entry("shared_bytes_of_block", double(p.sharedMemPerBlockOptin)) +
               entry("shared_bytes_of_multiprocessor", double(p.sharedMemPerMultiprocessor)) +
               entry("memory_bytes", double(p.totalGlobalMem)) + entry("clock_khz", clock_khz) +
               entry("memory_clock_khz", memory_khz) + entry("driver", driver) +
               entry("runtime", runtime) + "}");
  std::printf("%s, %d multiprocessors\n", p.name, p.multiProcessorCount);
}

// What is least likely to fail comes first.
constexpr GroupOfMeasurements kGroups[] = {
    {"device", describe_device},    {"launches", measure_launches},
    {"memory", measure_memory},     {"arithmetic", measure_arithmetic},
    {"grid", measure_grid},         {"clusters", measure_clusters},
    {"wgmma", measure_wgmma_rates},
};

int run(int count, char** arguments) {
  if (count < 2) {
    std::fprintf(stderr, "usage: %s FILE.json [group ...]; groups:", arguments[0]);
    for (const GroupOfMeasurements& group : kGroups) std::fprintf(stderr, " %s", group.name);
    std::fprintf(stderr, "\n");
    return 2;
  }
  Collector collector(arguments[1]);
  for (const GroupOfMeasurements& group : kGroups) {
    bool wanted = count == 2;
    for (int i = 2; i < count; ++i) wanted |= std::strcmp(arguments[i], group.name) == 0;
    if (wanted) collector.run(group);
  }
  return collector.failed() ? 1 : 0;
}

}  // namespace
}  // namespace gpubench

int main(int count, char** arguments) {
  try {
    return gpubench::run(count, arguments);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
