// The CUDA runtime as far as it is not launches: which devices there are, and whether their driver
// will do.
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "cuda/device.h"
#include "cuda/driver.h"
#include "cuda/kernels.h"
#include "cuda/probe.h"

namespace rnnkern::cuda {
namespace {

constexpr int kOldest = 8;  // major compute capability

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

// 0 without a driver.
int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

struct Found {
  Device device;
  std::string refusal;
};

Found find(int id) {
  Found found;
  if (const auto reason = driver_refusal(driver_version(), CUDART_VERSION)) {
    found.refusal = *reason;
    return found;
  }
  cudaDeviceProp properties;
  const cudaError_t error = cudaGetDeviceProperties(&properties, id);
  if (error != cudaSuccess) {
    cudaGetLastError();  // so that nobody else finds it
    found.refusal = std::string("a CUDA device that does not answer: ") + cudaGetErrorString(error);
    return found;
  }
  if (properties.major < kOldest) {
    found.refusal = "a GPU of compute capability " + std::to_string(properties.major) + "." +
                    std::to_string(properties.minor) + ", older than " + std::to_string(kOldest) +
                    ".0";
  }
  if (found.refusal.empty()) {
    const Current current(id);
    if (const char* reason = why_no_code()) {
      found.refusal = "a GPU of compute capability " + std::to_string(properties.major) + "." +
                      std::to_string(properties.minor) + ", and this build of rnnkern, for " +
                      architectures() + ", has no code for it: " + reason;
    }
  }
  found.device = device_of_kind(properties.major, properties.minor);
  found.device.multiprocessors = properties.multiProcessorCount;
  found.device.blocks_at_once = properties.multiProcessorCount;
  found.device.shared_bytes = int64_t(properties.sharedMemPerBlockOptin);
  found.device.l2_mb = double(properties.l2CacheSize) / 1e6;
  return found;
}

const Found& found(int id) {
  static std::mutex mutex;
  static auto& all = *new std::map<int, Found>();  // outlives the interpreter
  const std::lock_guard lock(mutex);
  const auto [place, is_new] = all.try_emplace(id);
  if (is_new) place->second = find(id);
  return place->second;
}

}  // namespace

const char* version() {
  static const std::string text = version_text(CUDART_VERSION);
  return text.c_str();
}
const char* architectures() { return RNNKERN_CUDA_ARCHITECTURES; }

const char* driver() {
  static const int version = driver_version();
  static const std::string text = version_text(version);
  return version ? text.c_str() : nullptr;
}

const char* driver_refusal() {
  static const int version = driver_version();
  static const std::string text = driver_refusal(version, CUDART_VERSION).value_or("");
  return version && !text.empty() ? text.c_str() : nullptr;
}

const char* refusal(int device) {
  const std::string& reason = found(device).refusal;
  return reason.empty() ? nullptr : reason.c_str();
}

const Device& device(int id) { return found(id).device; }

Current::Current(int device) : before_(device), device_(device) {
  check(cudaGetDevice(&before_), "the current CUDA device");
  if (before_ != device_) check(cudaSetDevice(device_), "the tensors' CUDA device");
}
Current::~Current() {
  if (before_ != device_) cudaSetDevice(before_);
}

void clear(char* memory, size_t bytes, void* stream) {
  check(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)), "clearing memory");
}

}  // namespace rnnkern::cuda
