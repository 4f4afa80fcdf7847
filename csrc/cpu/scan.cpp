// Picks the instruction set once, and runs passes on it.
#include <omp.h>
#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <utility>

#include "cpu/kernels.h"
#if defined(RNNKERN_HAS_X86_64_V4_AMX) && defined(__linux__)
#include "cpu/tile_permission.h"
#endif
#include "huge_pages.h"
#include "known_cells.h"
#include "library_file.h"

namespace rnnkern {

// The kernels of each instruction set. RNNKERN_HAS_... says which sets this build has. A namespace
// has only the element types for which it differs from the one below it.
namespace baseline {
template <typename T>
Kernels<T> kernels();
}
namespace x86_64_v3 {
template <typename T>
Kernels<T> kernels();
}
namespace x86_64_v4 {
template <typename T>
Kernels<T> kernels();
}
namespace x86_64_v4_vnni {
template <typename T>
Kernels<T> kernels();
}
namespace x86_64_v4_bf16 {
template <typename T>
Kernels<T> kernels();
}
namespace x86_64_v4_amx {
template <typename T>
Kernels<T> kernels();
template <typename T>
bool tiles_multiply();
}  // namespace x86_64_v4_amx
#ifdef RNNKERN_AMX_STAND_IN
constexpr const char* kAmx = "x86-64-v4-amx-stand-in";
#else
constexpr const char* kAmx = "x86-64-v4-amx";
#endif

namespace {

[[maybe_unused]] bool always() { return true; }

#ifdef __x86_64__
[[maybe_unused]] bool has_v3() { return __builtin_cpu_supports("x86-64-v3"); }
[[maybe_unused]] bool has_v4() { return __builtin_cpu_supports("x86-64-v4"); }
[[maybe_unused]] bool has_v4_vnni() { return has_v4() && __builtin_cpu_supports("avx512vnni"); }
[[maybe_unused]] bool has_v4_bf16() {
  return has_v4_vnni() && __builtin_cpu_supports("avx512bf16");
}
#endif

#ifdef RNNKERN_HAS_X86_64_V4_AMX
bool has_v4_amx() {
#if defined(RNNKERN_AMX_STAND_IN)
  return has_v4_bf16() && x86_64_v4_amx::tiles_multiply<Bf16>();
#elif defined(__linux__)
  return has_v4_bf16() && __builtin_cpu_supports("amx-tile") &&
         __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8") &&
         system_gives_tiles() && x86_64_v4_amx::tiles_multiply<Bf16>();
#else
  return false;
#endif
}
#endif

const InstructionSet& choose() {
  const char* wanted = std::getenv("RNNKERN_ISA");
  const bool named = wanted && *wanted;
  for (const InstructionSet& set : instruction_sets()) {
    // Asks only if the name fits, because for AMX the question has an effect.
    if ((!named || set.name == std::string(wanted)) && set.supported()) return set;
  }
  std::string known, compiled;
  for (const InstructionSet& set : instruction_sets()) {
    compiled += std::string(compiled.empty() ? "" : ", ") + set.name;
    if (set.supported()) known += std::string(known.empty() ? "" : ", ") + set.name;
  }
  if (!named) {
    throw std::runtime_error(
        "this build has kernels for " + compiled +
        " alone, which this CPU lacks or the system refuses; RNNKERN_INSTRUCTION_SETS=all builds "
        "those for every CPU");
  }
  throw std::runtime_error("RNNKERN_ISA is '" + std::string(wanted) +
                           "'; this CPU and this build have: " + known);
}

// A forked child has none of the threads of OpenMP's pool and would wait for them forever. So it
// runs on one thread.
bool forked = false;
[[maybe_unused]] const int fork_watch = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// The second-level cache of one core. RNNKERN_L2_BYTES describes another machine, for tests.
int64_t find_l2_bytes() {
  if (const char* const described = std::getenv("RNNKERN_L2_BYTES")) {
    char* end = nullptr;
    const long long bytes = std::strtoll(described, &end, 10);
    if (bytes > 0 && !*end) return bytes;
    throw std::runtime_error("RNNKERN_L2_BYTES is '" + std::string(described) +
                             "', wanted a number of bytes above 0");
  }
#ifdef _SC_LEVEL2_CACHE_SIZE
  if (const long found = sysconf(_SC_LEVEL2_CACHE_SIZE); found > 0) return found;
#endif
  return Machine().l2_bytes;
}

int64_t l2_bytes() {
  static const int64_t bytes = find_l2_bytes();
  return bytes;
}

// The workspace of a call. A large one is in huge pages if the system has them, because packed
// weights are read in every step. One block is kept for the next call, because the page faults of
// new memory take longer than many calls.
class WorkspaceMemory {
 public:
  explicit WorkspaceMemory(size_t bytes) {
    if (bytes <= kMostKept) block_.reset(kept.exchange(nullptr));
    if (!block_ || block_->bytes < bytes) {
      block_.reset();  // first, so that both never exist at once
      block_ = std::make_unique<Block>(bytes);
    }
  }
  // Keeps the larger of this block and the one that another thread has left.
  ~WorkspaceMemory() {
    while (block_ && block_->bytes <= kMostKept) {
      const size_t bytes = block_->bytes;
      std::unique_ptr<Block> other(kept.exchange(block_.release()));
      if (other && other->bytes > bytes) block_ = std::move(other);
    }
  }
  WorkspaceMemory(const WorkspaceMemory&) = delete;
  WorkspaceMemory& operator=(const WorkspaceMemory&) = delete;

  Workspace workspace() const { return {block_->data, block_->bytes}; }

 private:
  static constexpr size_t kMostKept = 48 << 20;
  static inline std::atomic<Block*> kept{nullptr};

  std::unique_ptr<Block> block_;
};

// Calls kernel(workspace). The workspace of a call of a few microseconds is on the stack.
template <typename Kernel>
void with_workspace(Kernel kernel) {
  constexpr size_t kInside = 16 * 1024;
  alignas(kCacheLine) char inside[kInside];
  if (const size_t needed = kernel(Workspace{inside, kInside})) {
    kernel(WorkspaceMemory(needed).workspace());
  }
}

constexpr Kernels<F32By3Bf16> kNoSplit = {};

}  // namespace

// Each function here is called only on a CPU that has the instructions, because even these few
// lines are compiled for them.
const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> sets = {
#ifdef RNNKERN_HAS_X86_64_V4_AMX
      {kAmx, has_v4_amx,
       [] {
         return AllKernels{
             x86_64_v4::kernels<float>(),         x86_64_v4::kernels<double>(),
             x86_64_v4_amx::kernels<Bf16>(),      x86_64_v4::kernels<F16>(),
             x86_64_v4_amx::kernels<F32ByBf16>(), x86_64_v4_amx::kernels<F32By3Bf16>(),
             x86_64_v4_amx::kernels<F32ByI8>()};
       }},
#endif
#ifdef RNNKERN_HAS_X86_64_V4_BF16
      {"x86-64-v4-bf16", has_v4_bf16,
       [] {
         return AllKernels{x86_64_v4::kernels<float>(),          x86_64_v4::kernels<double>(),
                           x86_64_v4_bf16::kernels<Bf16>(),      x86_64_v4::kernels<F16>(),
                           x86_64_v4_bf16::kernels<F32ByBf16>(), kNoSplit,
                           x86_64_v4_vnni::kernels<F32ByI8>()};
       }},
#endif
#ifdef RNNKERN_HAS_X86_64_V4_VNNI
      {"x86-64-v4-vnni", has_v4_vnni,
       [] {
         return AllKernels{x86_64_v4::kernels<float>(),       x86_64_v4::kernels<double>(),
                           x86_64_v4::kernels<Bf16>(),        x86_64_v4::kernels<F16>(),
                           x86_64_v4::kernels<F32ByBf16>(),   kNoSplit,
                           x86_64_v4_vnni::kernels<F32ByI8>()};
       }},
#endif
#ifdef RNNKERN_HAS_X86_64_V4
      {"x86-64-v4", has_v4,
       [] {
         return AllKernels{x86_64_v4::kernels<float>(),     x86_64_v4::kernels<double>(),
                           x86_64_v4::kernels<Bf16>(),      x86_64_v4::kernels<F16>(),
                           x86_64_v4::kernels<F32ByBf16>(), kNoSplit,
                           x86_64_v4::kernels<F32ByI8>()};
       }},
#endif
#ifdef RNNKERN_HAS_X86_64_V3
      {"x86-64-v3", has_v3,
       [] {
         return AllKernels{x86_64_v3::kernels<float>(),     x86_64_v3::kernels<double>(),
                           x86_64_v3::kernels<Bf16>(),      x86_64_v3::kernels<F16>(),
                           x86_64_v3::kernels<F32ByBf16>(), kNoSplit,
                           x86_64_v3::kernels<F32ByI8>()};
       }},
#endif
#ifdef RNNKERN_HAS_BASELINE
      {"baseline", always,
       [] {
         return AllKernels{baseline::kernels<float>(),     baseline::kernels<double>(),
                           baseline::kernels<Bf16>(),      baseline::kernels<F16>(),
                           baseline::kernels<F32ByBf16>(), kNoSplit,
                           baseline::kernels<F32ByI8>()};
       }},
#endif
  };
  return sets;
}

const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = choose();
  return chosen;
}

void check_environment() {
  instruction_set();
  l2_bytes();
}

const AllKernels& kernels_in_use() {
  static const AllKernels kernels = instruction_set().kernels();
  return kernels;
}

template <typename T>
Machine machine_for(int threads) {
  Machine machine = std::get<Kernels<T>>(kernels_in_use()).machine;
  machine.threads = forked ? 1 : threads;
  machine.l2_bytes = l2_bytes();
  return machine;
}

namespace {

template <typename T>
const Kernels<T>& kernels_of(CellId id) {
  const AddedCell* added = added_cells().at(id);
  if (!added) return std::get<Kernels<T>>(kernels_in_use());
  const void* loaded = added->kernels[place_of_element<T>()].load(std::memory_order_acquire);
  if (!loaded)
    throw std::runtime_error("the kernels of the cell " + added->mode + " are not loaded");
  return *static_cast<const Kernels<T>*>(loaded);
}

void run_on_threads_of_openmp(int threads, void (*part)(const void*, int, int), const void* f) {
#pragma omp parallel num_threads(threads)
  part(f, omp_get_thread_num(), omp_get_num_threads());
}

}  // namespace

void load_library(const std::string& path, const std::string& mode, const std::string& element) {
  const LibraryFile file(path);
  const CellLibrary& found = *file.entry<EntryOfLibrary>(kEntryOfLibrary)(run_on_threads_of_openmp);
  file.expect(found.mode, found.element, mode, element);
  file.with_cell(mode, element, [&](AddedCell& cell, size_t place) {
    cell.kernels[place].store(found.kernels, std::memory_order_release);
  });
}

template <typename Scan>
Problem problem_of(const Scan& scan, bool deterministic) {
  return {scan.sizes, scan.steps.T, scan.steps.N, scan.steps.total, deterministic};
}

template <typename T>
void run(const Forward<T>& scan, int threads, bool deterministic) {
  Problem problem = problem_of(scan, deterministic);
  problem.frozen = scan.packed;
  problem.from_zeros = problem.T == 1 && !scan.h0.data && !scan.reset_h.data && !scan.packed;
  Plan plan = plan_forward(problem, machine_for<T>(threads));
  if (scan.readout.w) plan.block_steps = 1;  // no input is known before its step
  const Kernels<T>& kernels = kernels_of<T>(scan.sizes.cell);
  const auto forward = scan.packed ? kernels.frozen : kernels.forward;
  with_workspace([&](Workspace w) { return forward(scan, plan, w); });
}

template <typename T>
void run(const Backward<T>& scan, int threads, bool deterministic) {
  const Plan plan = plan_backward(problem_of(scan, deterministic), machine_for<T>(threads));
  const Kernels<T>& kernels = kernels_of<T>(scan.sizes.cell);
  with_workspace([&](Workspace w) { return kernels.backward(scan, plan, w); });
}

template <typename T>
void run(const SecondOrder<T>& scan, int threads, bool deterministic) {
  const Problem problem = problem_of(scan, deterministic);
  const Machine machine = machine_for<T>(threads);
  constexpr double kWork = 6.5;
  const Plan up = plan_forward(problem, machine, false),
             down = plan_backward(problem, machine, kWork);
  const Kernels<T>& kernels = kernels_of<T>(scan.sizes.cell);
  with_workspace([&](Workspace w) { return kernels.second_order(scan, up, down, w); });
}
template void run<float>(const SecondOrder<float>&, int, bool);
template void run<double>(const SecondOrder<double>&, int, bool);

#define RNNKERN_INSTANTIATE(T)                        \
  template Machine machine_for<T>(int);               \
  template void run<T>(const Forward<T>&, int, bool); \
  template void run<T>(const Backward<T>&, int, bool);
RNNKERN_INSTANTIATE(float)
RNNKERN_INSTANTIATE(double)
RNNKERN_INSTANTIATE(Bf16)
RNNKERN_INSTANTIATE(F16)
RNNKERN_INSTANTIATE(F32ByBf16)
RNNKERN_INSTANTIATE(F32By3Bf16)
#undef RNNKERN_INSTANTIATE
template Machine machine_for<F32ByI8>(int);
template void run<F32ByI8>(const Forward<F32ByI8>&, int, bool);

}  // namespace rnnkern
