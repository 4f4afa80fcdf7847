// Takes the place of csrc/cpu/scan.cpp in a build for tests: every scan runs on the CUDA kernels,
// on the stand-in of simt.h. The operands are those of the CPU; so the package's own tests test the
// CUDA kernels.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/threads.h"
#include "cuda/kernels.h"
#include "device.h"

namespace rnnkern {

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> sets = {
      {"simt", [] { return true; }, [] { return AllKernels{}; }}};
  return sets;
}
const InstructionSet& instruction_set() { return instruction_sets().front(); }
void check_environment() {}
void load_library(const std::string& path, const std::string&, const std::string&) {
  throw std::runtime_error(path + ": the stand-in has no kernels for the CPU");
}
const AllKernels& kernels_in_use() {
  static const AllKernels none = {};
  return none;
}

template <typename T>
Machine machine_for(int) {
  return {};
}

template <typename Scan>
void run_on_stand_in(const Scan& scan, bool deterministic) {
  const cuda::Call call = {0, nullptr, std::getenv("RNNKERN_SIMT_TF32") != nullptr, deterministic};
  constexpr size_t kAlignment = 256;
  using Memory = std::unique_ptr<char, decltype(&std::free)>;
  std::vector<Memory> all;               // what is queued may use the first one still
  const portable::FlushDenormals flush;  // as the kernels are compiled to do
  // RNNKERN_SIMT_MEMORY=BYTES: there is no more.
  const char* const most = std::getenv("RNNKERN_SIMT_MEMORY");
  const auto allocate = [&](size_t bytes) {
    if (most && bytes > std::strtoull(most, nullptr, 10)) {
      throw std::runtime_error("simt: no memory of " + std::to_string(bytes) + " bytes");
    }
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    all.emplace_back(static_cast<char*>(std::aligned_alloc(kAlignment, bytes)), &std::free);
    std::memset(all.back().get(), 0xff, bytes);  // NaN
    return all.back().get();
  };
  try {
    cuda::run(scan, call, allocate);
  } catch (...) {
    simt::streams().forget();
    throw;
  }
  simt::streams().finish();
}

template <typename T>
void run(const Forward<T>& scan, int, bool deterministic) {
  run_on_stand_in(scan, deterministic);
}
template <typename T>
void run(const Backward<T>& scan, int, bool deterministic) {
  run_on_stand_in(scan, deterministic);
}

template <typename T>
void run(const SecondOrder<T>& scan, int, bool deterministic) {
  run_on_stand_in(scan, deterministic);
}
template void run<float>(const SecondOrder<float>&, int, bool);
template void run<double>(const SecondOrder<double>&, int, bool);
// The stand-in has no kernels for these types, and they are never asked for.
template <>
void run(const Forward<F32ByBf16>&, int, bool) {}
template <>
void run(const Backward<F32ByBf16>&, int, bool) {}
template <>
void run(const Forward<F32By3Bf16>&, int, bool) {}
template <>
void run(const Backward<F32By3Bf16>&, int, bool) {}
template <>
void run(const Forward<F32ByI8>&, int, bool) {}

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
template Machine machine_for<F32By3Bf16>(int);

}  // namespace rnnkern
