// Picks the instruction set once, and runs one scan on it.
#include <pthread.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>

#include "cpu/kernels.h"

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

// Scratch memory: a call of a few microseconds does not go to the allocator.
class Workspace {
 public:
  static constexpr size_t kAlignment = 64, kInside = 16 * 1024;

  explicit Workspace(size_t bytes) {
    if (bytes > kInside)
      outside_.reset(static_cast<char*>(::operator new(bytes, std::align_val_t(kAlignment))));
  }
  char* data() { return outside_ ? outside_.get() : inside_; }

 private:
  struct Delete {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(kAlignment)); }
  };
  alignas(kAlignment) char inside_[kInside];
  std::unique_ptr<char, Delete> outside_;
};

// A forked child has none of the threads of OpenMP's pool, and waits forever for them: it runs on
// its own.
bool forked = false;
[[maybe_unused]] const int fork_watch = pthread_atfork(nullptr, nullptr, [] { forked = true; });

int usable_threads(int threads) { return forked ? 1 : threads; }

template <typename T>
const Kernels<T>& kernels() {
  if constexpr (sizeof(T) == 4) {
    return instruction_set().f32;
  } else {
    return instruction_set().f64;
  }
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

Machine machine_for(int threads, int element_bytes) {
  Machine machine;
  machine.threads = threads;
  machine.lanes = instruction_set().vector_bytes / element_bytes;
  machine.tile_rows = instruction_set().tile_rows;
  return machine;
}

template <typename T>
void forward(const Forward<T>& scan, int threads, bool deterministic) {
  const Problem problem = {scan.sizes, scan.steps.T, scan.steps.N, scan.steps.total, deterministic};
  const Plan plan = plan_forward(problem, machine_for(usable_threads(threads), sizeof(T)));
  Workspace workspace(kernels<T>().forward(scan, plan, nullptr));
  kernels<T>().forward(scan, plan, workspace.data());
}

template <typename T>
void backward(const Backward<T>& scan, int threads, bool deterministic) {
  const Problem problem = {scan.sizes, scan.steps.T, scan.steps.N, scan.steps.total, deterministic};
  const Plan plan = plan_backward(problem, machine_for(usable_threads(threads), sizeof(T)));
  Workspace workspace(kernels<T>().backward(scan, plan, nullptr));
  kernels<T>().backward(scan, plan, workspace.data());
}

template void forward<float>(const Forward<float>&, int, bool);
template void forward<double>(const Forward<double>&, int, bool);
template void backward<float>(const Backward<float>&, int, bool);
template void backward<double>(const Backward<double>&, int, bool);

}  // namespace rnnkern
