// Picks the instruction set once, and runs one scan on it.
#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <utility>

#include "cpu/kernels.h"
#include "huge_pages.h"

namespace rnnkern {

#define RNNKERN_DECLARE(NAME)           \
  namespace NAME {                      \
  extern const Kernels<float> kFloat;   \
  extern const Kernels<double> kDouble; \
  extern const int kBytes, kRows;       \
  }
RNNKERN_DECLARE(baseline)
#ifdef RNNKERN_X86_64
RNNKERN_DECLARE(x86_64_v3)
RNNKERN_DECLARE(x86_64_v4)
#endif
#undef RNNKERN_DECLARE

namespace {

bool always() { return true; }

#ifdef RNNKERN_X86_64
bool has_v3() { return __builtin_cpu_supports("x86-64-v3"); }
bool has_v4() { return __builtin_cpu_supports("x86-64-v4"); }
#endif

const InstructionSet& choose() {
  const char* wanted = std::getenv("RNNKERN_ISA");
  std::string known;
  for (const InstructionSet& set : instruction_sets()) {
    if (!set.supported()) continue;
    if (!wanted || !*wanted || set.name == std::string(wanted)) return set;
    known += known.empty() ? set.name : std::string(", ") + set.name;
  }
  throw std::runtime_error("RNNKERN_ISA is '" + std::string(wanted) +
                           "'; this CPU and this build have: " + known);
}

// A forked child has none of the threads of OpenMP's pool, and waits forever for them: it runs on
// its own.
bool forked = false;
[[maybe_unused]] const int fork_watch = pthread_atfork(nullptr, nullptr, [] { forked = true; });

int64_t l2_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const long found = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (found > 0) return found;
#endif
  return Machine().l2_bytes;
}

template <typename T>
const Kernels<T>& kernels(const InstructionSet& set) {
  if constexpr (sizeof(T) == 4) {
    return set.f32;
  } else {
    return set.f64;
  }
}

// Scratch memory of a call, in huge pages where it is large and the system has them (packed weights
// are read in every step). One block is kept for the next call: the page faults of fresh memory
// take longer than many a call.
class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    if (bytes <= kMostKept) block_.reset(kept.exchange(nullptr));
    if (!block_ || block_->bytes < bytes) {
      block_.reset();  // first, or both are there at once
      block_ = std::make_unique<Block>(bytes);
    }
  }
  // The larger of this block and the one that another thread has left stays.
  ~Scratch() {
    while (block_ && block_->bytes <= kMostKept) {
      const size_t bytes = block_->bytes;
      std::unique_ptr<Block> other(kept.exchange(block_.release()));
      if (other && other->bytes > bytes) block_ = std::move(other);
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  Workspace workspace() const { return {block_->data, block_->bytes}; }

  static constexpr size_t kLine = 64;

 private:
  static constexpr size_t kMostKept = 48 << 20;
  struct Block {
    explicit Block(size_t size)
        : bytes(size),
          alignment{worth_huge_pages(size) ? kHugePage : kLine},
          data(static_cast<char*>(::operator new(size, alignment))) {
      advise_huge_pages(data, size);
    }
    ~Block() { ::operator delete(data, alignment); }
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;

    size_t bytes;
    std::align_val_t alignment;
    char* data;
  };
  static inline std::atomic<Block*> kept{nullptr};

  std::unique_ptr<Block> block_;
};

// Calls run(workspace): a call of a few microseconds stays on the stack.
template <typename Run>
void with_workspace(Run run) {
  constexpr size_t kInside = 16 * 1024;
  alignas(Scratch::kLine) char inside[kInside];
  if (const size_t needed = run(Workspace{inside, kInside})) run(Scratch(needed).workspace());
}

}  // namespace

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> sets = {
#ifdef RNNKERN_X86_64
      {"x86-64-v4", x86_64_v4::kBytes, x86_64_v4::kRows, has_v4, x86_64_v4::kFloat,
       x86_64_v4::kDouble},
      {"x86-64-v3", x86_64_v3::kBytes, x86_64_v3::kRows, has_v3, x86_64_v3::kFloat,
       x86_64_v3::kDouble},
#endif
      {"baseline", baseline::kBytes, baseline::kRows, always, baseline::kFloat, baseline::kDouble},
  };
  return sets;
}

const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = choose();
  return chosen;
}

Machine machine_for(const InstructionSet& set, int threads, int element_bytes) {
  Machine machine;
  machine.threads = forked ? 1 : threads;
  machine.lanes = set.vector_bytes / element_bytes;
  machine.tile_rows = set.tile_rows;
  machine.element_bytes = element_bytes;
  machine.l2_bytes = l2_bytes();
  return machine;
}

template <typename T>
void forward(const Forward<T>& scan, int threads, bool deterministic) {
  const InstructionSet& set = instruction_set();
  const Problem problem = {scan.sizes, scan.steps.T, scan.steps.N, scan.steps.total, deterministic};
  const Plan plan = plan_forward(problem, machine_for(set, threads, sizeof(T)));
  with_workspace([&](Workspace w) { return kernels<T>(set).forward(scan, plan, w); });
}

template <typename T>
void backward(const Backward<T>& scan, int threads, bool deterministic) {
  const InstructionSet& set = instruction_set();
  const Problem problem = {scan.sizes, scan.steps.T, scan.steps.N, scan.steps.total, deterministic};
  const Plan plan = plan_backward(problem, machine_for(set, threads, sizeof(T)));
  with_workspace([&](Workspace w) { return kernels<T>(set).backward(scan, plan, w); });
}

template void forward<float>(const Forward<float>&, int, bool);
template void forward<double>(const Forward<double>&, int, bool);
template void backward<float>(const Backward<float>&, int, bool);
template void backward<double>(const Backward<double>&, int, bool);

}  // namespace rnnkern
