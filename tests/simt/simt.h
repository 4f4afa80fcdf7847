// A stand-in for the GPU: runs CUDA kernels as plain C++ on the host, so that their logic is tested
// without a GPU.
//
// Every CUDA thread is a fiber with a stack of its own; one thread of the host runs them all, and
// which one goes on is drawn, more or less by chance, wherever one waits (a barrier, a collective
// of a warp, a flag in memory). So what is missing between two threads, a barrier or a wait, shows
// as a wrong result sooner or later: here sooner, because a fiber runs on alone until it waits.
// What this cannot show is the order in which a GPU's memory lets others see what was written;
// tests/ptx can.
//
// Shared memory is filled with NaN before each block, and ends where it ends: the address sanitizer
// sees what reaches beyond. A barrier that not all threads reach, or a flag that nobody sets, ends
// the launch with an error instead of a hang.
#pragma once

#include <dlfcn.h>
#include <fenv.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <source_location>
#include <sstream>
#include <stdexcept>
#include <string>
#include <typeinfo>
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
  std::shared_ptr<void> memory;  // what the block sees of global memory, where it is weak
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
  ucontext_t start;
  jmp_buf place;  // where it goes on
  bool started = false;
  Stacks::Stack stack = Stacks::take();
  ~Fiber() { Stacks::give_back(std::move(stack)); }
  Block* block;
  Dim3 thread;
  uint32_t rank;  // of its warp
  bool done = false;
  std::vector<uint64_t> seen;  // addresses that it has looked at since it last waited

  // Counts a look at an address. After several of them it must be waiting for what others store
  // there.
  bool waits_at(uint64_t address) {
    constexpr int kLooks = 8;
    seen.push_back(address);
    return std::count(seen.begin(), seen.end(), address) > kLooks;
  }
};

class Launch {
 public:
  Launch(Dim3 grid, Dim3 block, size_t shared_bytes, std::function<void()> kernel, uint32_t seed)
      : grid(grid),
        block(block),
        kernel_(std::move(kernel)),
        random_(seed),
        draws_(1 << random_() % 3 * 3) {
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
    fenv_t rounding;  // a replacement may set another one
    fegetenv(&rounding);
    size_t done = 0;
    while (done < fibers_.size() && !error_) {
      // All are woken a few times although nothing was set. Lanes that wait together may have
      // looked at different times, and a fiber that looks at one flag often may not wait for it
      // (waits_at).
      if (ready_.empty() && (something_is_set_ || futile_++ < 30)) wake();
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
    fesetenv(&rounding);
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
    fiber().seen.clear();
    parked_.push_back(fiber_);
    switch_to_scheduler();
  }
  // A flag was set.
  void progress() {
    something_is_set_ = true;
    wake();
  }
  // One of many values was set. Whoever waits looks when all others wait, too: a look after each
  // value would take most of the time.
  void progress_later() { something_is_set_ = true; }

  const Dim3 grid, block;
  static inline thread_local Launch* current = nullptr;

 private:
  void wake() {
    ready_.insert(ready_.end(), parked_.begin(), parked_.end());
    parked_.clear();
    if (something_is_set_) futile_ = 0;
    something_is_set_ = false;
  }

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
      getcontext(&f.start);
      f.start.uc_stack.ss_sp = f.stack.get();
      f.start.uc_stack.ss_size = Stacks::kBytes;
      f.start.uc_link = nullptr;
      makecontext(&f.start, &Launch::enter, 0);
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
    // Only the first switch to a fiber needs a context, and with it calls of the system.
    if (!_setjmp(host_)) {
      if (f.started) _longjmp(f.place, 1);
      f.started = true;
      setcontext(&f.start);
    }
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
    if (!_setjmp(f.place)) _longjmp(host_, 1);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, &host_stack_, &host_stack_bytes_);
#endif
  }
  [[noreturn]] void leave() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(nullptr, host_stack_, host_stack_bytes_);
#endif
    _longjmp(host_, 1);
  }

  std::function<void()> kernel_;
  std::mt19937 random_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<int> ready_, parked_;
  bool something_is_set_ = false;
  int futile_ = 0;  // how often all have looked in vain since something was set
  const int draws_;
  int fiber_ = 0;
  std::exception_ptr error_;
  jmp_buf host_;
  const void* host_stack_ = nullptr;
  size_t host_stack_bytes_ = 0;
};

inline Launch& launch() { return *Launch::current; }

// RNNKERN_SIMT_WITHOUT=NAME leaves out what calls itself so: results must then go wrong.
inline bool left_out(const std::string& name) {
  static const char* const named = std::getenv("RNNKERN_SIMT_WITHOUT");
  return named && name == named;
}

// What is queued in the streams of a GPU, done when somebody waits for it. Within a stream one
// thing follows the other. Of several streams one goes far ahead of the others, which is drawn, or
// they take turns: unless it has been said that one waits for the other.
class Streams {
 public:
  void add(const void* stream, std::function<void()> work) {
    streams_[stream].items.push_back({std::move(work), nullptr, 0});
  }
  // What is added to `later` from now on waits for what has been added to `earlier` up to now.
  void order(const void* earlier, const void* later) {
    Stream& before = streams_[earlier];
    streams_[later].items.push_back({{}, &before, before.done + before.items.size()});
  }
  // Throws what the first work to fail has thrown; then the rest is forgotten.
  void finish() {
    auto streams = std::move(streams_);  // the streams stay where they are
    streams_.clear();
    std::vector<Stream*> all;
    for (auto& [_, stream] : streams) all.push_back(&stream);
    std::shuffle(all.begin(), all.end(), random_);
    const bool in_turns = random_() % 3 == 0;
    while (true) {
      if (in_turns) std::shuffle(all.begin(), all.end(), random_);
      const auto next = std::find_if(all.begin(), all.end(), [](const Stream* s) {
        return !s->items.empty() &&
               (!s->items.front().after || s->items.front().after->done >= s->items.front().count);
      });
      if (next == all.end()) return;
      const Item item = std::move((*next)->items.front());
      (*next)->items.pop_front();
      if (item.work) item.work();
      ++(*next)->done;
    }
  }
  void forget() { streams_.clear(); }

 private:
  struct Stream;
  struct Item {
    std::function<void()> work;
    const Stream* after;  // waits until so many items of that stream are done
    size_t count;
  };
  struct Stream {
    std::deque<Item> items;
    size_t done = 0;
  };
  std::map<const void*, Stream> streams_;
  std::mt19937 random_{1};
};
// In a library of a cell: where the extension's are, which it uses.
inline Streams& (*streams_of_host)() = nullptr;
inline Streams& streams() {
  if (streams_of_host) return streams_of_host();
  static thread_local Streams of_thread;
  return of_thread;
}

// RNNKERN_SIMT_BLOCKS blocks run at once, as if the process had only a share of the device.
inline int most_blocks() {
  const char* const named = std::getenv("RNNKERN_SIMT_BLOCKS");
  return named ? std::atoi(named) : 1 << 30;
}

// RNNKERN_SIMT_FAILS=NAME: launches of the kernel of that name fail.
inline bool fails(const std::string& kernel) {
  const char* const named = std::getenv("RNNKERN_SIMT_FAILS");
  return named && kernel == named;
}

// What a thread of a kernel runs in place of the kernel's own C++, given its arguments.
using Body = void (*)(const void* arguments, Launch& launch);

// RNNKERN_SIMT_KERNELS=FILE:FILE... names libraries of such bodies (tests/ptx makes them). The
// first one that knows a kernel is taken; it is an error if none does.
inline Body replacement(const char* type, size_t argument_bytes) {
  const char* const named = std::getenv("RNNKERN_SIMT_KERNELS");
  if (!named || !*named) return nullptr;
  std::stringstream files(named);
  for (std::string file; std::getline(files, file, ':');) {
    void* const library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);  // loaded once, and stays
    if (!library) throw std::runtime_error(dlerror());
    using Find = Body (*)(const char* type, size_t argument_bytes);
    const auto find = reinterpret_cast<Find>(dlsym(library, "find_kernel"));
    if (const Body body = find(type, argument_bytes)) return body;
  }
  throw std::runtime_error(std::string("simt: no library has the kernel ") + type);
}

template <typename Kernel>
std::function<void()> body_of(const typename Kernel::Arguments& arguments) {
  if (const Body body = replacement(typeid(Kernel).name(), sizeof arguments)) {
    return [&arguments, body] { body(&arguments, launch()); };
  }
  return [&arguments] { Kernel::run(arguments); };
}

// A place in a kernel where threads wait. RNNKERN_SIMT_WITHOUT=FILE:LINE leaves that one out:
// results must then go wrong, or the wait is not needed.
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
