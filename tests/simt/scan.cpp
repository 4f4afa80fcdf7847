// Takes the place of csrc/cpu/scan.cpp in a build for tests: every scan runs on the CUDA kernels,
// on the stand-in of simt.h. The operands are those of the CPU; so the package's own tests test the
// CUDA kernels.
#include <cstdlib>
#include <cstring>
#include <memory>

#include "cpu/kernels.h"
#include "cpu/threads.h"
#include "cuda/kernels.h"

namespace rnnkern {

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> sets = {
      {"simt", [] { return true; }, [] { return AllKernels{}; }}};
  return sets;
}
const InstructionSet& instruction_set() { return instruction_sets().front(); }
const AllKernels& kernels_in_use() {
  static const AllKernels none = {};
  return none;
}

template <typename T>
Machine machine_for(int) {
  return {};
}

namespace {

// Few multiprocessors, of an odd number, so that small layers are split in every way: rows and
// units of both directions.
constexpr cuda::Device kDevice = {13, 1};

// run(memory), with the beginning of the memory zero and all else NaN.
template <typename Run>
void with_memory(const cuda::Workspace& size, Run run) {
  constexpr size_t kAlignment = 256;
  const size_t bytes = (size.bytes + kAlignment - 1) / kAlignment * kAlignment;
  const std::unique_ptr<char, decltype(&std::free)> memory(
      static_cast<char*>(std::aligned_alloc(kAlignment, bytes)), &std::free);
  std::memset(memory.get(), 0xff, bytes);
  std::memset(memory.get(), 0, size.zero_bytes);
  const portable::FlushDenormals flush;  // as the kernels are compiled to do
  run(memory.get());
}

}  // namespace

template <typename T>
void forward(const Forward<T>& scan, int, bool) {
  with_memory(cuda::forward_workspace(scan, kDevice),
              [&](char* memory) { cuda::forward(scan, kDevice, memory, nullptr); });
}
template <typename T>
void backward(const Backward<T>& scan, int, bool) {
  with_memory(cuda::backward_workspace(scan, kDevice),
              [&](char* memory) { cuda::backward(scan, kDevice, memory, nullptr); });
}

// The stand-in has no kernels for it, and nobody asks (`has_kernels`).
template <>
void forward(const Forward<F32ByBf16>&, int, bool) {}
template <>
void backward(const Backward<F32ByBf16>&, int, bool) {}

#define RNNKERN_INSTANTIATE(T)                            \
  template Machine machine_for<T>(int);                   \
  template void forward<T>(const Forward<T>&, int, bool); \
  template void backward<T>(const Backward<T>&, int, bool);
RNNKERN_INSTANTIATE(float)
RNNKERN_INSTANTIATE(double)
RNNKERN_INSTANTIATE(Bf16)
RNNKERN_INSTANTIATE(F16)
#undef RNNKERN_INSTANTIATE
template Machine machine_for<F32ByBf16>(int);

}  // namespace rnnkern
