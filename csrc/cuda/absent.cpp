// Takes the place of the CUDA kernels in a build without them. What throws here is never called,
// because refusal() is asked first.
#include <stdexcept>

#include "cuda/kernels.h"

namespace rnnkern::cuda {
namespace {

constexpr char kReason[] = "CUDA tensors, and this build of rnnkern has no CUDA kernels";

}  // namespace

const char* version() { return nullptr; }
const char* architectures() { return nullptr; }
const char* driver() { return nullptr; }
const char* driver_refusal() { return nullptr; }
const char* refusal(int) { return kReason; }

#ifndef RNNKERN_SIMT
#define RNNKERN_INSTANTIATE(T)                                                 \
  template <>                                                                  \
  std::string describe<T>(const Sizes&, int64_t, int64_t, bool, const Call&) { \
    throw std::logic_error(kReason);                                           \
  }                                                                            \
  template <>                                                                  \
  void run(const Forward<T>&, const Call&, const Allocate&) {                  \
    throw std::logic_error(kReason);                                           \
  }                                                                            \
  template <>                                                                  \
  void run(const Backward<T>&, const Call&, const Allocate&) {                 \
    throw std::logic_error(kReason);                                           \
  }
template <typename T>
void run(const SecondOrder<T>&, const Call&, const Allocate&) {
  throw std::logic_error(kReason);
}
void load_library(const std::string&, const std::string&, const std::string&, const std::string&,
                  int) {
  throw std::runtime_error(kReason);
}
template void run(const SecondOrder<float>&, const Call&, const Allocate&);
template void run(const SecondOrder<double>&, const Call&, const Allocate&);
RNNKERN_INSTANTIATE(float)
RNNKERN_INSTANTIATE(double)
RNNKERN_INSTANTIATE(Bf16)
RNNKERN_INSTANTIATE(F16)
#undef RNNKERN_INSTANTIATE
#endif

}  // namespace rnnkern::cuda
