// Times the kernels of handoff.cuh: groups of blocks through L2, and clusters.
#pragma once

#include "handoff.cuh"

namespace gpubench {
namespace {

// ---- From block to block through L2 ----

constexpr int kSteps = 2000;
constexpr int kBatchRows = 16;  // of the state that is handed on
constexpr int kHiddenSizes[] = {256, 768};

std::vector<int> group_sizes(const Bench& bench) {
  std::vector<int> sizes = {8, 16, 32, 64, bench.multiprocessors()};
  std::erase_if(sizes, [&](int size) { return size > bench.multiprocessors(); });
  return sizes;
}

// All groups of this size that fit, one block on each multiprocessor; flags in their own lines.
class Groups {
 public:
  Groups(const Bench& bench, int members, Signal signal, int padding_bytes)
      : count_(bench.multiprocessors() / members),
        flags_{nullptr, padding_bytes / 4, (members * padding_bytes / 4 + 31) / 32 * 32, members,
               signal},
        words_(size_t(count_) * size_t(flags_.words_of_group)) {
    if (members > kMostMembers) throw std::runtime_error("too many multiprocessors");
    flags_.words = words_.get();
  }
  int count() const { return count_; }
  int blocks() const { return count_ * flags_.members; }
  const Flags& flags() const { return flags_; }
  void clear(cudaStream_t stream) const {
    check(cudaMemsetAsync(words_.get(), 0, words_.bytes(), stream));
  }

 private:
  int count_;
  Flags flags_;
  Buffer<unsigned> words_;
};

double flags_alone_us(Bench& bench, void (*kernel)(BarrierArguments), const Groups& groups) {
  const size_t shared = bench.whole_multiprocessor(0);
  bench.allow_shared(kernel, shared);
  const BarrierArguments arguments = {groups.flags(), kSteps, bench.status()};
  return bench.median_us(
             [&] {
               bench.launch_cooperative(kernel, groups.blocks(), kHandoffThreads, shared,
                                        arguments);
             },
             [&] { groups.clear(bench.stream); }) /
         kSteps;
}

double gather_us(Bench& bench, void (*kernel)(GatherArguments), const Groups& groups, int chunks) {
  const size_t shared = bench.whole_multiprocessor(size_t(chunks) * sizeof(uint4));
  bench.allow_shared(kernel, shared);
  const Buffer<uint4> state(size_t(groups.count()) * 2 * size_t(chunks));
  const GatherArguments arguments = {groups.flags(), state.get(), chunks, kSteps, bench.status()};
  return bench.median_us(
             [&] {
               bench.launch_cooperative(kernel, groups.blocks(), kHandoffThreads, shared,
                                        arguments);
             },
             [&] {
               groups.clear(bench.stream);
               check(cudaMemsetAsync(state.get(), 0, state.bytes(), bench.stream));
             }) /
         kSteps;
}

void measure_grid(Bench& bench) {
  struct Way {
    const char* name;
    Signal signal;
    const char* how;
  };
  const Way ways[] = {
      {"threads", Signal::kThreads, "st.release by each block, ld.acquire by a thread a flag"},
      {"warp", Signal::kWarp, "st.release by each block, ld.acquire by one warp"},
      {"relaxed", Signal::kRelaxed, "st.release by each block, ld.relaxed by one warp, then fence"},
  };
  const Way counter = {"counter", Signal::kCounter, "red.release to one counter, ld.acquire"};
  const std::string steps = ", " + std::to_string(kSteps) + " steps, events";
  const auto alone = [&](const Way& way, int members, int padding) {
    const std::string suffix =
        way.signal == Signal::kCounter ? "" : suffix_of(padding, "_bytes_apart");
    bench.measure(
        "flags_" + std::string(way.name) + suffix_of(members) + suffix, "us", way.how + steps, [&] {
          return flags_alone_us(bench, flags_alone, Groups(bench, members, way.signal, padding));
        });
  };
  for (const int members : group_sizes(bench)) {
    for (const int padding : {4, 32, 128}) {
      for (const Way& way : ways) alone(way, members, padding);
    }
    alone(counter, members, 128);
  }
  const int all = bench.multiprocessors();
  bench.measure(
      "flags_cooperative_groups_" + std::to_string(all), "us", "grid.sync()" + steps, [&] {
        return flags_alone_us(bench, grid_barrier, Groups(bench, all, Signal::kCounter, 128));
      });

  for (const int hidden : kHiddenSizes) {
    const int bytes = kBatchRows * hidden * 2;
    const std::string state = "_n16_h" + std::to_string(hidden) + "_";
    for (const int members : group_sizes(bench)) {
      const std::string suffix = state + std::to_string(members);
      const auto by_flags = [&](const Way& way) {
        bench.measure(
            "gather_flags_" + std::string(way.name) + suffix, "us",
            std::string(way.how) + ", 32 bytes apart; state in bf16, ld.global.cg" + steps, [&] {
              const Groups groups(bench, members, way.signal, 32);
              return gather_us(bench, gather_by_flags, groups, bytes / 16);
            });
      };
      for (const Way& way : ways) by_flags(way);
      by_flags(counter);
      const Groups groups(bench, members, Signal::kCounter, 128);
      bench.measure("gather_words_of_8" + suffix, "us",
                    "4 bytes of the state and the number of the step in a word, polled" + steps,
                    [&] {
                      return gather_us(bench, gather_by_words<TwoWords>, groups,
                                       (bytes + TwoWords::kPayload - 1) / TwoWords::kPayload);
                    });
      bench.measure("gather_words_of_16" + suffix, "us",
                    "12 bytes of the state and the number of the step in a word, polled" + steps,
                    [&] {
                      return gather_us(bench, gather_by_words<WideWord>, groups,
                                       (bytes + WideWord::kPayload - 1) / WideWord::kPayload);
                    });
    }
  }
}

// ---- Within clusters ----

struct ClusterLaunch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};

  ClusterLaunch(Bench& bench, void (*kernel)(ClusterArguments), int size, size_t shared) {
    bench.allow_shared(kernel, shared);
    // A cluster of more than 8 blocks needs this attribute, which changes nothing for a smaller
    // one.
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(size);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(unsigned(size));
    config.blockDim = dim3(kHandoffThreads);
    config.dynamicSmemBytes = shared;
    config.stream = bench.stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;
  ClusterLaunch& operator=(const ClusterLaunch&) = delete;
};

int clusters_that_fit(const ClusterLaunch& launch, void (*kernel)(ClusterArguments)) {
  int count = 0;
  check(cudaOccupancyMaxActiveClusters(&count, reinterpret_cast<const void*>(kernel),
                                       &launch.config));
  return count;
}

// As many clusters as fit at once.
double cluster_us(Bench& bench, void (*kernel)(ClusterArguments), int size, size_t shared,
                  ClusterArguments arguments) {
  ClusterLaunch launch(bench, kernel, size, bench.whole_multiprocessor(shared));
  const int count = clusters_that_fit(launch, kernel);
  if (count < 1) throw std::runtime_error("no cluster of this size fits");
  launch.config.gridDim = dim3(unsigned(count * size));
  return bench.median_us([&] { check(cudaLaunchKernelEx(&launch.config, kernel, arguments)); }) /
         arguments.steps;
}

template <bool kClusterScope>
void measure_sends(Bench& bench, const std::string& scope) {
  bench.measure("st_async_round_trip" + scope, "us",
                "16 bytes to the peer and back, mbarriers, events", [&] {
                  const ClusterArguments arguments = {0, kSteps, bench.status()};
                  return cluster_us(bench, ping_pong<kClusterScope>, 2, 0, arguments);
                });
  for (const int size : {8, 16}) {
    const std::string suffix = "_n16_h256_" + std::to_string(size) + scope;
    const int chunks = kBatchRows * 256 * 2 / int(sizeof(uint4));
    static_assert(kBatchRows * 256 * 2 / sizeof(uint4) <= kMostSends * kHandoffThreads);
    const size_t shared = size_t(2 * chunks + 2 * chunks / size) * sizeof(uint4);
    const ClusterArguments arguments = {chunks, kSteps, bench.status()};
    const std::string how = "each block sends its part of the state in bf16 to all, ";
    bench.measure("gather_cluster_st_async" + suffix, "us", how + "16 bytes a store, events", [&] {
      return cluster_us(bench, gather_in_cluster<false, kClusterScope>, size, shared, arguments);
    });
    bench.measure("gather_cluster_bulk" + suffix, "us", how + "one bulk copy a peer, events", [&] {
      return cluster_us(bench, gather_in_cluster<true, kClusterScope>, size, shared, arguments);
    });
  }
}

void measure_clusters(Bench& bench) {
  if (bench.properties.major < 9) return bench.fail("clusters", "this device has none");
  for (const int size : {2, 4, 8, 16}) {
    const std::string suffix = suffix_of(size);
    bench.measure("clusters_that_fit" + suffix, "clusters",
                  "cudaOccupancyMaxActiveClusters, 200 KiB of shared memory a block", [&] {
                    const ClusterLaunch launch(bench, cluster_barrier<true>, size, 200 * 1024);
                    return double(clusters_that_fit(launch, cluster_barrier<true>));
                  });
    const ClusterArguments arguments = {0, 10 * kSteps, bench.status()};
    bench.measure("cluster_barrier" + suffix, "us",
                  "barrier.cluster.arrive.release and wait.acquire, 20000, events",
                  [&] { return cluster_us(bench, cluster_barrier<true>, size, 0, arguments); });
    bench.measure("cluster_barrier_relaxed" + suffix, "us",
                  "barrier.cluster.arrive.relaxed and wait, 20000, events",
                  [&] { return cluster_us(bench, cluster_barrier<false>, size, 0, arguments); });
  }
  measure_sends<true>(bench, "_acquire_cluster");
  measure_sends<false>(bench, "_acquire_cta");
}

}  // namespace
}  // namespace gpubench
