// Kernels that hand a state from block to block, step by step: through flags in global memory,
// through data that carries the number of its step, and within clusters.
//
// The state is `chunks` pieces of 16 bytes. In a step each block makes its own pieces from pieces
// of the step before, which are rotated so that they come mostly from other blocks:
// h(t)[c] = h(t - 1)[(c + kRotation) % chunks] + 1. So the result of the last step is known, and it
// is wrong if any block has read too early.
#pragma once

#include <cooperative_groups.h>

#include "harness.cuh"
#include "ptx.cuh"

namespace gpubench {

constexpr int kHandoffThreads = 256;
constexpr int kRotation = 769;
// After so many polls a wait times out. A poll of a flag in L2 takes about 0.7 us. A poll of a
// barrier in shared memory may take longer than a microsecond, because the instruction blocks for a
// while before it returns false.
constexpr int kMostPolls = 1 << 20;
constexpr int kMostPollsOfBarrier = 1 << 16;

// Waits with a limit. After one has timed out, this thread does not wait again.
class BoundedWait {
 public:
  GPUBENCH_DEVICE explicit BoundedWait(int* status) : status_(status) {}
  template <typename Ready>
  GPUBENCH_DEVICE void until(Ready ready, int most = kMostPolls) {
    if (timed_out_) return;
    for (int polls = 0; !ready(); ++polls) {
      if (polls == most) {
        timed_out_ = true;
        report_once(status_, kTimedOut);
        return;
      }
    }
  }

 private:
  int* status_;
  bool timed_out_ = false;
};

// How a block signals that it has finished a step, and how the other blocks of its group see that.
enum class Signal {
  kThreads,  // one flag for each block, each acquired by a thread of its own
  kWarp,     // one flag for each block, acquired by one warp, in turn if there are more than lanes
  kRelaxed,  // one flag for each block, all read relaxed by one warp at once, then one fence
  kCounter,  // one counter, to which each block adds
};

struct Flags {
  unsigned* words;     // zero before the launch
  int stride;          // words from flag to flag
  int words_of_group;  // whole lines
  int members;         // blocks of a group
  Signal signal;
};

struct Team {
  int group, member;
  unsigned* flags;
};
GPUBENCH_DEVICE Team team_of(const Flags& f) {
  const int group = int(blockIdx.x) / f.members;
  return {group, int(blockIdx.x) % f.members, f.words + size_t(group) * size_t(f.words_of_group)};
}

// What the block wrote before is published with the step.
GPUBENCH_DEVICE void publish(const Flags& f, const Team& team, unsigned step) {
  __syncthreads();
  if (threadIdx.x == 0) {
    if (f.signal == Signal::kCounter) {
      ptx::add_release(team.flags, 1);
    } else {
      ptx::store_release(team.flags + team.member * f.stride, step);
    }
  }
}

// Whether the flags of a lane have reached the step. All loads are in flight together.
template <int kFlags>
GPUBENCH_DEVICE bool lane_has(const Flags& f, const Team& team, unsigned step) {
  unsigned seen[kFlags];
#pragma unroll
  for (int i = 0; i < kFlags; ++i) {
    // A lane without a flag reads the last one, because a branch would serialize the loads.
    const int m = min(int(threadIdx.x) + i * 32, f.members - 1);
    seen[i] = ptx::load_relaxed(team.flags + m * f.stride);
  }
  bool all = true;
#pragma unroll
  for (int i = 0; i < kFlags; ++i) all &= seen[i] >= step;
  return all;
}
constexpr int kMostMembers = 6 * 32;  // 188 of an RTX PRO 6000

// Waits until all blocks of the group have published the step.
GPUBENCH_DEVICE void wait_for(const Flags& f, const Team& team, unsigned step, BoundedWait& wait) {
  const int thread = int(threadIdx.x);
  if (f.signal == Signal::kCounter) {
    if (thread == 0) {
      wait.until([&] { return ptx::load_acquire(team.flags) >= step * unsigned(f.members); });
    }
  } else if (f.signal == Signal::kRelaxed) {
    if (thread < 32) {
      if (f.members <= 32) {
        wait.until([&] { return lane_has<1>(f, team, step); });
      } else if (f.members <= 64) {
        wait.until([&] { return lane_has<2>(f, team, step); });
      } else {
        wait.until([&] { return lane_has<kMostMembers / 32>(f, team, step); });
      }
      ptx::fence_gpu();
    }
  } else {
    const int pollers = f.signal == Signal::kWarp ? 32 : int(blockDim.x);
    for (int m = thread; thread < pollers && m < f.members; m += pollers) {
      wait.until([&] { return ptx::load_acquire(team.flags + m * f.stride) >= step; });
    }
  }
  __syncthreads();
}

struct BarrierArguments {
  Flags flags;
  int steps;
  int* status;
};

// The hand-off of flags alone, without a state.
__global__ void __launch_bounds__(kHandoffThreads) flags_alone(BarrierArguments a) {
  const Team team = team_of(a.flags);
  BoundedWait wait(a.status);
  for (int step = 1; step <= a.steps; ++step) {
    publish(a.flags, team, unsigned(step));
    wait_for(a.flags, team, unsigned(step), wait);
  }
}

// The same with the barrier of cooperative groups, over all blocks.
__global__ void __launch_bounds__(kHandoffThreads) grid_barrier(BarrierArguments a) {
  const auto grid = cooperative_groups::this_grid();
  for (int step = 0; step < a.steps; ++step) grid.sync();
}

struct GatherArguments {
  Flags flags;
  uint4* state;  // [groups, 2, chunks], zero before the launch
  int chunks;
  int steps;
  int* status;
};

GPUBENCH_DEVICE uint4 first_value(int c) {
  return {unsigned(c), unsigned(c) + 1000003u, unsigned(c) ^ 0x5555u, unsigned(c) * 7u};
}
GPUBENCH_DEVICE uint4 plus(uint4 v, unsigned n) { return {v.x + n, v.y + n, v.z + n, v.w + n}; }
// The value of piece c after all steps.
GPUBENCH_DEVICE uint4 last_value(int c, int chunks, int steps) {
  const long long from = (c + (long long)(kRotation)*steps) % chunks;
  return plus(first_value(int(from)), unsigned(steps));
}
GPUBENCH_DEVICE bool same(uint4 a, uint4 b) {
  return a.x == b.x && a.y == b.y && a.z == b.z && a.w == b.w;
}
// The piece of the step before from which piece c is made. It avoids a division in each step.
GPUBENCH_DEVICE int source_of(int c, int chunks, int rotation) {
  const int from = c + rotation;
  return from < chunks ? from : from - chunks;
}
GPUBENCH_DEVICE int share_begin(int count, int parts, int part) {
  return int((long long)(count)*part / parts);
}

// Each block writes its pieces and its flag, waits for all flags and reads all pieces through L2
// into shared memory.
__global__ void __launch_bounds__(kHandoffThreads) gather_by_flags(GatherArguments a) {
  extern __shared__ __align__(1024) uint4 staged[];  // [chunks]
  constexpr int kBatch = 6;
  const Team team = team_of(a.flags);
  const int begin = share_begin(a.chunks, a.flags.members, team.member);
  const int end = share_begin(a.chunks, a.flags.members, team.member + 1);
  const int thread = int(threadIdx.x), rotation = kRotation % a.chunks;
  BoundedWait wait(a.status);
  for (int c = thread; c < a.chunks; c += kHandoffThreads) staged[c] = first_value(c);
  __syncthreads();
  for (int step = 1; step <= a.steps; ++step) {
    // Double buffering: a block that reaches step t knows that all blocks have read step t - 2.
    uint4* state = a.state + (size_t(team.group) * 2 + step % 2) * size_t(a.chunks);
    for (int c = begin + thread; c < end; c += kHandoffThreads) {
      state[c] = plus(staged[source_of(c, a.chunks, rotation)], 1);
    }
    publish(a.flags, team, unsigned(step));
    wait_for(a.flags, team, unsigned(step), wait);
    for (int first = thread; first < a.chunks; first += kBatch * kHandoffThreads) {
      uint4 read[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int c = first + i * kHandoffThreads;
        if (c < a.chunks) read[i] = ptx::load_cg(state + c);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int c = first + i * kHandoffThreads;
        if (c < a.chunks) staged[c] = read[i];
      }
    }
    __syncthreads();
  }
  for (int c = thread; c < a.chunks; c += kHandoffThreads) {
    if (!same(staged[c], last_value(c, a.chunks, a.steps))) report_once(a.status, kWrongResult);
  }
}

// Pieces that carry the number of their step: two words with 4 bytes of data and 4 bytes of number
// each, or one word with 12 and 4.
struct TwoWords {
  static constexpr int kPayload = 8;
  GPUBENCH_DEVICE static uint4 load(const uint4* from) { return ptx::load_two_words(from); }
  GPUBENCH_DEVICE static void store(uint4* to, uint4 v) { ptx::store_two_words(to, v); }
  GPUBENCH_DEVICE static uint4 marked(uint4 v, unsigned step) { return {v.x, step, v.z, step}; }
  GPUBENCH_DEVICE static bool is_of(uint4 v, unsigned step) { return v.y == step && v.w == step; }
};
struct WideWord {
  static constexpr int kPayload = 12;
  GPUBENCH_DEVICE static uint4 load(const uint4* from) { return ptx::load_wide_word(from); }
  GPUBENCH_DEVICE static void store(uint4* to, uint4 v) { ptx::store_wide_word(to, v); }
  GPUBENCH_DEVICE static uint4 marked(uint4 v, unsigned step) { return {v.x, v.y, v.z, step}; }
  GPUBENCH_DEVICE static bool is_of(uint4 v, unsigned step) { return v.w == step; }
};

// No flags and no fences: a thread that reads a piece with the number of this step has its data.
// A block overwrites step t-2 only after it has all of step t-1, whose writers had read step t-2.
template <typename Word>
__global__ void __launch_bounds__(kHandoffThreads) gather_by_words(GatherArguments a) {
  extern __shared__ __align__(1024) uint4 staged[];  // [chunks]
  constexpr int kBatch = 6;
  const Team team = team_of(a.flags);
  const int begin = share_begin(a.chunks, a.flags.members, team.member);
  const int end = share_begin(a.chunks, a.flags.members, team.member + 1);
  const int thread = int(threadIdx.x), rotation = kRotation % a.chunks;
  BoundedWait wait(a.status);
  for (int c = thread; c < a.chunks; c += kHandoffThreads) staged[c] = first_value(c);
  __syncthreads();
  for (int step = 1; step <= a.steps; ++step) {
    const unsigned number = unsigned(step);
    uint4* state = a.state + (size_t(team.group) * 2 + step % 2) * size_t(a.chunks);
    for (int c = begin + thread; c < end; c += kHandoffThreads) {
      Word::store(state + c,
                  Word::marked(plus(staged[source_of(c, a.chunks, rotation)], 1), number));
    }
    __syncthreads();  // all threads have read what the next lines overwrite
    for (int first = thread; first < a.chunks; first += kBatch * kHandoffThreads) {
      uint4 read[kBatch] = {};  // of step 0, which nobody waits for
      wait.until([&] {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int c = first + i * kHandoffThreads;
          if (c < a.chunks && !Word::is_of(read[i], number)) read[i] = Word::load(state + c);
        }
        bool all = true;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          all &= first + i * kHandoffThreads >= a.chunks || Word::is_of(read[i], number);
        }
        return all;
      });
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int c = first + i * kHandoffThreads;
        if (c < a.chunks) staged[c] = read[i];
      }
    }
    __syncthreads();
  }
  for (int c = thread; c < a.chunks; c += kHandoffThreads) {
    const uint4 wanted = Word::marked(last_value(c, a.chunks, a.steps), unsigned(a.steps));
    if (!same(staged[c], wanted)) report_once(a.status, kWrongResult);
  }
}

constexpr int kMostSends = 2;  // of 16 bytes by a thread in a step

struct ClusterArguments {
  int chunks;  // a multiple of the blocks in a cluster, at most kMostSends * kHandoffThreads
  int steps;
  int* status;
};

template <bool kOrdersMemory>
__global__ void __launch_bounds__(kHandoffThreads) cluster_barrier(ClusterArguments a) {
#ifdef GPUBENCH_CLUSTERS
  for (int step = 0; step < a.steps; ++step) {
    if constexpr (kOrdersMemory) {
      ptx::sync_cluster();
    } else {
      ptx::meet_cluster();
    }
  }
#else
  report_once(a.status, kNotBuilt);
#endif
}

// Two blocks, one thread each: 16 bytes to the other block, 16 bytes back.
template <bool kClusterScope>
__global__ void __launch_bounds__(kHandoffThreads) ping_pong(ClusterArguments a) {
#ifdef GPUBENCH_CLUSTERS
  __shared__ uint4 box;
  __shared__ uint64_t barrier_words;
  const uint32_t barrier = ptx::shared_address(&barrier_words);
  const unsigned rank = ptx::rank_in_cluster();
  if (threadIdx.x == 0) {
    ptx::init_barrier(barrier, 1);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  ptx::sync_cluster();
  if (threadIdx.x == 0) {
    const uint32_t mine = ptx::shared_address(&box);
    const uint32_t to = ptx::address_at_peer(mine, rank ^ 1);
    const uint32_t their_barrier = ptx::address_at_peer(barrier, rank ^ 1);
    BoundedWait wait(a.status);
    uint4 value = {0, 0, 0, 0};
    for (int step = 0; step < a.steps; ++step) {
      // One message arrives at this block in each step: phase `step` of its barrier. The previous
      // phase is over by then, because the peer only answers.
      ptx::arrive_expecting(barrier, sizeof box);
      if (rank == 0) ptx::store_async(to, plus(value, 1), their_barrier);
      wait.until([&] { return ptx::phase_is_over<kClusterScope>(barrier, unsigned(step) & 1); },
                 kMostPollsOfBarrier);
      value = ptx::load_shared(mine);
      if (rank == 1) ptx::store_async(to, plus(value, 1), their_barrier);
    }
    const unsigned wanted = unsigned(2 * a.steps) - (rank == 1);
    if (!same(value, {wanted, wanted, wanted, wanted})) report_once(a.status, kWrongResult);
  }
  __syncthreads();
  ptx::sync_cluster();  // no block exits while a message to it may be in flight
#else
  report_once(a.status, kNotBuilt);
#endif
}

// Each block of a cluster sends its pieces to all blocks: with st.async, to itself too, or with one
// bulk copy for each peer and ordinary stores for itself. The barrier of a step counts the bytes.
template <bool kBulk, bool kClusterScope>
__global__ void __launch_bounds__(kHandoffThreads) gather_in_cluster(ClusterArguments a) {
#ifdef GPUBENCH_CLUSTERS
  extern __shared__ __align__(1024) uint4 memory[];  // inbox[2][chunks], outbox[2][own]
  constexpr int kWarps = kHandoffThreads / 32;
  static_assert(kMostSends * kWarps >= 16, "bulk copies reach all blocks of a cluster");
  __shared__ uint64_t barrier_words[2];
  const int thread = int(threadIdx.x), rotation = kRotation % a.chunks;
  const int blocks = int(ptx::blocks_in_cluster()), own = a.chunks / blocks;
  const int rank = int(ptx::rank_in_cluster()), begin = rank * own;
  uint4* const outbox = memory + 2 * a.chunks;
  const uint32_t inbox = ptx::shared_address(memory), barriers = ptx::shared_address(barrier_words);
  const uint32_t bytes = uint32_t(a.chunks) * uint32_t(sizeof(uint4));
  const uint32_t own_bytes = uint32_t(own) * uint32_t(sizeof(uint4));
  if (thread == 0) {
    ptx::init_barrier(barriers, 1);
    ptx::init_barrier(barriers + sizeof(uint64_t), 1);
    ptx::fence_barrier_init();
  }
  for (int c = thread; c < a.chunks; c += kHandoffThreads) memory[c] = first_value(c);
  // Sources and destinations of this thread's pieces, computed before the loop. With st.async a
  // thread sends each piece to one peer. Bulk copies of one warp start one after the other, so each
  // warp has its own peers, and one thread starts them.
  int from[kMostSends];
  uint32_t to[kMostSends], their_barriers[kMostSends];
#pragma unroll
  for (int i = 0; i < kMostSends; ++i) {
    const int item = thread + i * kHandoffThreads, c = item % own;
    const unsigned peer = unsigned(kBulk ? thread / 32 + i * kWarps : item / own);
    const bool sends = kBulk ? int(peer) < blocks : item < a.chunks;
    from[i] = source_of(begin + c, a.chunks, rotation);
    const uint32_t mine = inbox + uint32_t(begin + (kBulk ? 0 : c)) * uint32_t(sizeof(uint4));
    to[i] = ptx::address_at_peer(mine, sends ? peer : 0);
    their_barriers[i] = ptx::address_at_peer(barriers, sends ? peer : 0);
  }
  __syncthreads();
  ptx::sync_cluster();
  BoundedWait wait(a.status);
  // Step t uses buffer t % 2, and is phase t / 2 - 1 (even t) or t / 2 (odd t) of its barrier. A
  // block that sends step t has all of step t-1. Its threads synchronize between reading step t-2
  // and sending, so all of them have read what is overwritten, and none still waits for t-2.
  for (int step = 1; step <= a.steps; ++step) {
    const int place = step % 2;
    const uint4* before = memory + (1 - place) * a.chunks;
    const uint32_t barrier_offset = uint32_t(place) * uint32_t(sizeof(uint64_t));
    const uint32_t inbox_offset = uint32_t(place) * bytes;
    if (thread == 0) {
      ptx::arrive_expecting(barriers + barrier_offset, kBulk ? bytes - own_bytes : bytes);
    }
    if constexpr (kBulk) {
      uint4* out = outbox + place * own;
      if (thread < own) {
        out[thread] = plus(before[from[0]], 1);
        memory[place * a.chunks + begin + thread] = out[thread];
      }
      ptx::fence_async_proxy();
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kMostSends; ++i) {
        const int peer = thread / 32 + i * kWarps;
        if (thread % 32 == 0 && peer < blocks && peer != rank) {
          ptx::copy_to_peer(to[i] + inbox_offset, ptx::shared_address(out), own_bytes,
                            their_barriers[i] + barrier_offset);
        }
      }
    } else {
      uint4 values[kMostSends];
#pragma unroll
      for (int i = 0; i < kMostSends; ++i) values[i] = plus(before[from[i]], 1);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kMostSends; ++i) {
        if (thread + i * kHandoffThreads < a.chunks) {
          ptx::store_async(to[i] + inbox_offset, values[i], their_barriers[i] + barrier_offset);
        }
      }
    }
    const unsigned phase = unsigned(place ? step / 2 : step / 2 - 1);
    wait.until(
        [&] { return ptx::phase_is_over<kClusterScope>(barriers + barrier_offset, phase & 1); },
        kMostPollsOfBarrier);
  }
  __syncthreads();
  for (int c = thread; c < a.chunks; c += kHandoffThreads) {
    if (!same(memory[a.steps % 2 * a.chunks + c], last_value(c, a.chunks, a.steps))) {
      report_once(a.status, kWrongResult);
    }
  }
  __syncthreads();
  ptx::sync_cluster();  // no block exits while a copy may read from it or write to it
#else
  report_once(a.status, kNotBuilt);
#endif
}

}  // namespace gpubench
