// The CUDA runtime, apart from launches: which devices there are, and whether their driver can run
// this build.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "cuda/driver.h"
#include "cuda/kernels.h"
#include "cuda/probe.h"

namespace rnnkern::cuda {
namespace {

constexpr int kOldest = 8;  // major compute capability

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, so that later calls do not report it
  throw std::runtime_error(with_who_gave_up(std::string(what) + ": " + cudaGetErrorString(error)));
}

// The CUDA version of the driver; 0 without a driver.
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
  check(cudaGetDeviceProperties(&properties, id), "the properties of a CUDA device");
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
  int cooperative = 0;
  check(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, id),
        "whether a CUDA device has cooperative launches");
  found.device.blocks_at_once = cooperative ? blocks_of(properties.multiProcessorCount) : 0;
  found.device.shared_bytes = int64_t(properties.sharedMemPerBlockOptin);
  found.device.l2_mb = double(properties.l2CacheSize) / 1e6;
  return found;
}

const Found& found(int id) {
  static std::mutex mutex;
  static auto& all = *new std::map<int, Found>();  // outlives the interpreter
  const std::lock_guard lock(mutex);
  const auto place = all.find(id);
  if (place != all.end()) return place->second;
  // An exception leaves no entry behind, so the next call asks again.
  return all.emplace(id, find(id)).first->second;
}

// While this lives, what is created does not belong to a CUDA graph that is being captured.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

cudaError_t try_order(void* from, void* to, void* event) {
  const auto recorded = static_cast<cudaEvent_t>(event);
  const cudaError_t error = cudaEventRecord(recorded, static_cast<cudaStream_t>(from));
  if (error != cudaSuccess) return error;
  return cudaStreamWaitEvent(static_cast<cudaStream_t>(to), recorded, 0);
}

// One number for each name of a kernel, in memory that every device can write to. It is never
// freed, because kernels may still run when the process ends.
class Distress {
 public:
  Distress() {
    const RelaxedCapture relaxed;
    void* memory = nullptr;
    if (cudaHostAlloc(&memory, kCount * sizeof(int), cudaHostAllocPortable) == cudaSuccess) {
      gave_up_ = static_cast<int*>(memory);
      std::fill_n(gave_up_, kCount, 0);
    }
    cudaGetLastError();
  }

  int* place_of(const std::string& kernel) {
    const std::lock_guard lock(mutex_);
    if (!gave_up_) return nullptr;
    const size_t place = std::find(names_.begin(), names_.end(), kernel) - names_.begin();
    if (place == names_.size()) {
      if (place == kCount) return nullptr;
      names_.push_back(kernel);
    }
    return gave_up_ + place;
  }

  std::optional<std::string> who() {
    const std::lock_guard lock(mutex_);
    for (size_t i = 0; i < names_.size(); ++i) {
      if (const volatile int& gave_up = gave_up_[i]; gave_up) return names_[i];
    }
    return std::nullopt;
  }

 private:
  static constexpr size_t kCount = 1024;
  std::mutex mutex_;
  int* gave_up_ = nullptr;
  std::vector<std::string> names_;
};
Distress& distress() {
  static auto& only = *new Distress();
  return only;
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

int* place_to_give_up(const std::string& kernel) { return distress().place_of(kernel); }

std::string with_who_gave_up(const std::string& message) {
  const std::optional<std::string> who = distress().who();
  if (!who) return message;
  return message + " (" + *who +
         " has given up: a block has waited too long for another one. Does something else occupy "
         "the device? RNNKERN_CUDA_LEAVE_FREE=N leaves it N multiprocessors)";
}

namespace {

// Streams that no call has, by device. A stream that a CUDA graph is still captured from is not
// handed out before the capture has ended. Streams are never destroyed, because the driver may be
// gone by then.
struct Pool {
  std::mutex mutex;
  std::map<int, std::vector<Lane>> free;

  std::optional<Lane> take(int device) {
    const std::lock_guard lock(mutex);
    std::vector<Lane>& lanes = free[device];
    for (auto lane = lanes.begin(); lane != lanes.end(); ++lane) {
      cudaStreamCaptureStatus status = cudaStreamCaptureStatusActive;
      check(cudaStreamIsCapturing(static_cast<cudaStream_t>(lane->stream), &status),
            "whether a stream is captured");
      if (status != cudaStreamCaptureStatusNone) continue;
      const Lane taken = *lane;
      lanes.erase(lane);
      return taken;
    }
    return std::nullopt;
  }
};
Pool& pool() {
  static auto& only = *new Pool();
  return only;
}

}  // namespace

Lane take_lane(int device) {
  if (const auto taken = pool().take(device)) return *taken;
  const RelaxedCapture relaxed;
  cudaStream_t stream = nullptr;
  cudaEvent_t event = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a second stream");
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "an event");
  return {stream, event};
}
void give_back_lane(int device, Lane lane, void* main) {
  if (try_order(lane.stream, main, lane.event) != cudaSuccess) {
    cudaGetLastError();  // the device has failed, and the next call will say so
  }
  const std::lock_guard lock(pool().mutex);
  pool().free[device].push_back(lane);
}
void order(void* from, void* to, void* event) {
  check(try_order(from, to, event), "a stream that waits");
}

void clear(char* memory, size_t bytes, void* stream) {
  check(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)), "clearing memory");
}

}  // namespace rnnkern::cuda
