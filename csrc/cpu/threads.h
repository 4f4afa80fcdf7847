// Threads of one scan: OpenMP's pool (torch's own) with denormals flushed, teams that share rows,
// and the barrier between their steps.
#pragma once

#ifndef RNNKERN_CELL_LIBRARY
#include <omp.h>
#endif
#include <sched.h>

#include <cstdint>

#include "cells/math.h"
#ifdef RNNKERN_AMX
#include "cpu/amx.h"
#endif
#include "cpu/library.h"
#include "steps.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

RNNKERN_INLINE void spin_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A barrier that spins briefly and then yields: on a machine with other work no one waits for a
// thread that cannot run.
class Barrier {
 public:
  void wait(int members) {
    if (members == 1) return;
    const int generation = __atomic_load_n(&generation_, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == members) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&generation_, generation + 1, __ATOMIC_RELEASE);
      return;
    }
    constexpr int kSpins = 4096;
    for (int spins = 0; __atomic_load_n(&generation_, __ATOMIC_ACQUIRE) == generation; ++spins) {
      if (spins < kSpins) {
        spin_pause();
      } else {
        sched_yield();
      }
    }
  }

 private:
  alignas(64) int arrived_ = 0;
  alignas(64) int generation_ = 0;
};

// While it lives, this thread reads and writes denormal numbers as zero: a forgotten state decays
// through them, and each would cost over a hundred cycles.
class FlushDenormals {
 public:
  FlushDenormals() : before_(get()) { set(before_ | kFlush); }
  ~FlushDenormals() { set(before_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
#if defined(__x86_64__)
  using State = unsigned;
  static constexpr State kFlush = 0x8040;  // results, operands
  static State get() { return __builtin_ia32_stmxcsr(); }
  static void set(State state) { __builtin_ia32_ldmxcsr(state); }
#elif defined(__aarch64__)
  using State = uint64_t;
  static constexpr State kFlush = State(1) << 24;
  static State get() {
    State state;
    asm volatile("mrs %0, fpcr" : "=r"(state));
    return state;
  }
  static void set(State state) { asm volatile("msr fpcr, %0" ::"r"(state)); }
#else
  using State = int;
  static constexpr State kFlush = 0;
  static State get() { return 0; }
  static void set(State) {}
#endif

  const State before_;
};

// What a thread needs while it runs a pass.
struct ThreadInPass {
  FlushDenormals flush;
#ifdef RNNKERN_AMX
  TilesOfThread tiles;
#endif
};

// Calls f(thread, threads) on at most `threads` threads; fewer may be granted.
template <typename F>
void parallel(int threads, const F& f) {
  if (threads <= 1) {
    const ThreadInPass in_pass;
    f(0, 1);
    return;
  }
  const auto part = [](const void* f, int thread, int granted) {
    const ThreadInPass in_pass;
    (*static_cast<const F*>(f))(thread, granted);
  };
#ifdef RNNKERN_CELL_LIBRARY
  run_on_threads(threads, part, &f);
#else
#pragma omp parallel num_threads(threads)
  part(&f, omp_get_thread_num(), omp_get_num_threads());
#endif
}

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
