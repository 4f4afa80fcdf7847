// A stand-in for the GPU: runs CUDA kernels as plain C++ on the host, so that their logic is tested
// where there is none.
//
// Every CUDA thread is a fiber with a stack of its own; one thread of the host runs them all, and
// which one goes on is drawn, more or less by chance, wherever one waits (a barrier, a collective
// of a warp, a flag in memory). So what is missing between two threads, a barrier or a wait, shows
// as a wrong result sooner or later: here sooner, because a fiber runs on alone until it waits.
// What this cannot show is the order in which a GPU's memory lets others see what was written.
//
// Shared memory is filled with NaN before each block, and ends where it ends: the address sanitizer
// sees what reaches beyond. A barrier that not all threads reach, or a flag that nobody sets, ends
// the launch with an error instead of a hang.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

constexpr int kWarp = 32;

// Where fibers wait for each other; the last one to come lets all go on.
struct Meeting {
  int members = 0;
  std::vector<int> waiting;
};

// What the lanes of a warp hand each other in a collective.
struct Warp {
  Meeting meeting;
  uint64_t values[kWarp];
};

struct Block {
  Dim3 index;
  Meeting barrier;
  std::vector<Warp> warps;
  std::vector<char> shared;
};

// Stacks are kept for the next launch: fresh memory costs more than what runs on it.
class Stacks {
 public:
  static constexpr size_t kBytes = 64 << 10;
  using Stack = std::unique_ptr<char[]>;

  static Stack take() {
    if (kept().empty()) return Stack(new char[kBytes]);
    Stack stack = std::move(kept().back());
    kept().pop_back();
    return stack;
  }
  static void give_back(Stack stack) { kept().push_back(std::move(stack)); }

 private:
  static std::vector<Stack>& kept() {
    static thread_local std::vector<Stack> stacks;
    return stacks;
  }
};

struct Fiber {
  ucontext_t context;
  Stacks::Stack stack = Stacks::take();
  ~Fiber() { Stacks::give_back(std::move(stack)); }
  Block* block;
  Dim3 thread;
  uint32_t rank;  // of its warp
  bool done = false;
};

class Launch {
 public:
  Launch(Dim3 grid, Dim3 block, size_t shared_bytes, std::function<void()> kernel, uint32_t seed)
      : grid(grid),
        block(block),
        kernel_(std::move(kernel)),
        random_(seed),
        draws_(1 << seed % 3 * 3) {
    const int threads = int(block.x * block.y * block.z);
    if (threads % kWarp) throw std::invalid_argument("simt: a block is whole warps");
    for (unsigned z = 0; z < grid.z; ++z) {
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) add_block({x, y, z}, threads, shared_bytes);
      }
    }
  }

  void run() {
    Launch* const before = current;
    current = this;
    size_t done = 0;
    while (done < fibers_.size() && !error_) {
      if (ready_.empty()) {
        error_ = std::make_exception_ptr(
            std::runtime_error("simt: " + std::to_string(parked_.size()) +
                               " threads wait for flags that nobody sets, " +
                               std::to_string(fibers_.size() - done - parked_.size()) +
                               " at barriers that the others have passed by"));
        break;
      }
      const size_t drawn = draw();
      fiber_ = ready_[drawn];
      ready_[drawn] = ready_.back();
      ready_.pop_back();
      switch_to_fiber();
      done += fibers_[size_t(fiber_)]->done;
    }
    current = before;
    if (error_) std::rethrow_exception(error_);
  }

  Fiber& fiber() { return *fibers_[size_t(fiber_)]; }

  // All members of the meeting are there when this returns.
  void meet(Meeting& meeting) {
    meeting.waiting.push_back(fiber_);
    if (int(meeting.waiting.size()) == meeting.members) {
      ready_.insert(ready_.end(), meeting.waiting.begin(), meeting.waiting.end());
      meeting.waiting.clear();
    }
    switch_to_scheduler();
  }

  // Others may go on: this one waits for a flag, until any is set.
  void park() {
    parked_.push_back(fiber_);
    switch_to_scheduler();
  }
  // A flag was set.
  void progress() {
    ready_.insert(ready_.end(), parked_.begin(), parked_.end());
    parked_.clear();
  }

  const Dim3 grid, block;
  static inline thread_local Launch* current = nullptr;

 private:
  // Which of the ready ones goes on: the first in rank of as many as were drawn for this launch. So
  // in some launches all take turns, and in others some warps are far ahead of the rest.
  size_t draw() {
    size_t best = random_() % ready_.size();
    for (int i = 1; i < draws_; ++i) {
      const size_t other = random_() % ready_.size();
      if (rank(other) < rank(best)) best = other;
    }
    return best;
  }
  uint32_t rank(size_t place) const { return fibers_[size_t(ready_[place])]->rank; }

  void add_block(Dim3 index, int threads, size_t shared_bytes) {
    blocks_.push_back(std::make_unique<Block>());
    Block& b = *blocks_.back();
    b.index = index;
    b.barrier.members = threads;
    b.warps.resize(size_t(threads / kWarp));
    for (Warp& warp : b.warps) warp.meeting.members = kWarp;
    uint32_t warp_rank = 0;
    b.shared.assign(shared_bytes, char(0xff));  // NaN, in every floating-point type
    for (int t = 0; t < threads; ++t) {
      if (t % kWarp == 0) warp_rank = uint32_t(random_());
      fibers_.push_back(std::make_unique<Fiber>());
      Fiber& f = *fibers_.back();
      f.block = &b;
      f.rank = warp_rank;
      f.thread = {unsigned(t) % block.x, unsigned(t) / block.x % block.y,
                  unsigned(t) / (block.x * block.y)};
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.get();
      f.context.uc_stack.ss_size = Stacks::kBytes;
      f.context.uc_link = nullptr;
      makecontext(&f.context, &Launch::enter, 0);
      ready_.push_back(int(fibers_.size()) - 1);
    }
  }

  static void enter() {
    Launch& launch = *current;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &launch.host_stack_, &launch.host_stack_bytes_);
#endif
    try {
      launch.kernel_();
    } catch (...) {
      launch.error_ = std::current_exception();
    }
    launch.fiber().done = true;
    launch.leave();
  }

  void switch_to_fiber() {
    Fiber& f = fiber();
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, f.stack.get(), Stacks::kBytes);
#endif
    swapcontext(&host_, &f.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }
  void switch_to_scheduler() {
    Fiber& f = fiber();
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, host_stack_, host_stack_bytes_);
#endif
    swapcontext(&f.context, &host_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, &host_stack_, &host_stack_bytes_);
#endif
  }
  [[noreturn]] void leave() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(nullptr, host_stack_, host_stack_bytes_);
#endif
    setcontext(&host_);
    std::abort();
  }

  std::function<void()> kernel_;
  std::mt19937 random_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<int> ready_, parked_;
  const int draws_;
  int fiber_ = 0;
  std::exception_ptr error_;
  ucontext_t host_;
  const void* host_stack_ = nullptr;
  size_t host_stack_bytes_ = 0;
};

inline Launch& launch() { return *Launch::current; }

// As where a process has only a share of the device: RNNKERN_SIMT_BLOCKS run at once.
inline int most_blocks() {
  const char* const named = std::getenv("RNNKERN_SIMT_BLOCKS");
  return named ? std::atoi(named) : 1 << 30;
}

// RNNKERN_SIMT_FAILS=NAME: launches of the kernel of that name fail.
inline bool fails(const std::string& kernel) {
  const char* const named = std::getenv("RNNKERN_SIMT_FAILS");
  return named && kernel == named;
}

// A place in a kernel where threads wait. RNNKERN_SIMT_WITHOUT=FILE:LINE leaves that one out:
// results must then go wrong, or nobody needs it.
using Where = std::source_location;
inline bool left_out(const Where& where) {
  static const char* const named = std::getenv("RNNKERN_SIMT_WITHOUT");
  if (!named) return false;
  const char* file = std::strrchr(where.file_name(), '/');
  return std::string(file ? file + 1 : where.file_name()) + ":" + std::to_string(where.line()) ==
         named;
}

inline unsigned thread_in_block() {
  const Fiber& f = launch().fiber();
  return f.thread.x + launch().block.x * (f.thread.y + launch().block.y * f.thread.z);
}
inline Warp& warp() { return launch().fiber().block->warps[thread_in_block() / kWarp]; }

}  // namespace simt
