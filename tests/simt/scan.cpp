// Takes the place of csrc/cpu/scan.cpp in a build for tests: every scan runs on the CUDA kernels,
// on the stand-in of simt.h. The operands are those of the CPU; so the package's own tests test the
// CUDA kernels.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "cpu/kernels.h"
#include "cpu/threads.h"
#include "cuda/device.h"
#include "cuda/kernels.h"

namespace rnnkern {

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> sets = {
      {"simt", [] { return true; }, [] { return AllKernels{}; }}};
  return sets;
}
const InstructionSet& instruction_set() { return instruction_sets().front(); }
void check_environment() {}
const AllKernels& kernels_in_use() {
  static const AllKernels none = {};
  return none;
}

template <typename T>
Machine machine_for(int) {
  return {};
}

namespace cuda {

// RNNKERN_SIMT_DEVICE=MULTIPROCESSORS,BYTES names another one. Few multiprocessors, of an odd
// number, and little shared memory, so that small layers are split in every way.
const Device& device(int) {
  static Device stand_in;
  stand_in = {};
  const char* const named = std::getenv("RNNKERN_SIMT_DEVICE");
  long long bytes = 20 << 10;
  stand_in.multiprocessors = 13;
  if (named) std::sscanf(named, "%d,%lld", &stand_in.multiprocessors, &bytes);
  stand_in.blocks_at_once = stand_in.multiprocessors;
  stand_in.shared_bytes = bytes;
  return stand_in;
}
Current::Current(int device) : before_(device), device_(device) {}
Current::~Current() = default;
void clear(char* memory, size_t bytes, void*) { std::memset(memory, 0, bytes); }

}  // namespace cuda

template <typename Scan>
void run_on_stand_in(const Scan& scan, bool deterministic) {
  const cuda::Call call = {0, nullptr, std::getenv("RNNKERN_SIMT_TF32") != nullptr, deterministic};
  constexpr size_t kAlignment = 256;
  std::unique_ptr<char, decltype(&std::free)> memory(nullptr, &std::free);
  const portable::FlushDenormals flush;  // as the kernels are compiled to do
  cuda::run(scan, call, [&](size_t bytes) {
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    memory.reset(static_cast<char*>(std::aligned_alloc(kAlignment, bytes)));
    std::memset(memory.get(), 0xff, bytes);  // NaN
    return memory.get();
  });
}

template <typename T>
void run(const Forward<T>& scan, int, bool deterministic) {
  run_on_stand_in(scan, deterministic);
}
template <typename T>
void run(const Backward<T>& scan, int, bool deterministic) {
  run_on_stand_in(scan, deterministic);
}

// The stand-in has no kernels for these, and nobody asks (`has_kernels`, `kIsStandIn`).
template <typename T>
void run(const SecondOrder<T>&, int, bool) {}
template void run<float>(const SecondOrder<float>&, int, bool);
template void run<double>(const SecondOrder<double>&, int, bool);
template <>
void run(const Forward<F32ByBf16>&, int, bool) {}
template <>
void run(const Backward<F32ByBf16>&, int, bool) {}

#define RNNKERN_INSTANTIATE(T)                        \
  template Machine machine_for<T>(int);               \
  template void run<T>(const Forward<T>&, int, bool); \
  template void run<T>(const Backward<T>&, int, bool);
RNNKERN_INSTANTIATE(float)
RNNKERN_INSTANTIATE(double)
RNNKERN_INSTANTIATE(Bf16)
RNNKERN_INSTANTIATE(F16)
#undef RNNKERN_INSTANTIATE
template Machine machine_for<F32ByBf16>(int);

}  // namespace rnnkern
