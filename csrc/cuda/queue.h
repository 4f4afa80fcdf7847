// One call: the scratch memory that it takes, and the kernels that it queues. The same code lays
// out and runs a call. Without memory it only counts.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/device.h"
#include "cuda/library.h"
#include "workspace.h"

namespace rnnkern {
namespace cuda {

// From what a queue is made, as plain data. `what` names the layer in errors.
struct Attempt {
  const Call* call;
  const Device* device;
  char* memory;
  const char* what;
};

}  // namespace cuda

namespace RNNKERN_NAMESPACE {

class Queue {
 public:
  // `what` names the layer in errors.
  Queue(const cuda::Call& call, const cuda::Device& device, char* memory, std::string what)
      : device(device),
        has_library(cuda::has_library()),
        call_(call),
        memory_(memory),
        carver_(memory),
        what_(std::move(what)) {}
  explicit Queue(const cuda::Attempt& a) : Queue(*a.call, *a.device, a.memory, a.what) {}

  const cuda::Device& device;
  const bool has_library;  // for products; the same for the whole call

  const cuda::Call& call() const { return call_; }
  char* memory() const { return memory_; }
  const char* what() const { return what_.c_str(); }
  bool runs() const { return memory_; }
  void* stream() const { return is_beside_ ? side_->stream() : call_.stream; }
  // The name of a kernel in errors.
  std::string name_of(const char* kernel) const { return std::string(kernel) + " of " + what_; }
  bool tf32() const { return call_.tf32; }
  bool deterministic() const { return call_.deterministic; }
  size_t bytes() const { return carver_.used(); }

  template <typename U>
  U* take(int64_t count) {
    return carver_.take<U>(count);
  }

  // The memory that has been taken so far is zero when the next kernel starts.
  void clear_taken() {
    if (runs()) cuda::clear(memory_, carver_.used(), call_.stream);
  }

  // Runs what f queues beside everything that is queued later. It waits only for what was queued
  // before.
  template <typename F>
  void beside(F f) {
    if (!runs()) return f();
    if (!side_) side_.emplace(call_.device, call_.stream);
    side_->wait_for_main();
    is_beside_ = true;
    f();
    is_beside_ = false;
  }
  // What is queued from now on waits for what was queued beside it.
  void join() {
    if (side_) side_->main_waits();
  }

  // Either all products of a call are queued beside the rest, or none.
  void multiply(const cuda::Product& product) {
    if (!multiplies_) {
      multiplies_ = true;
      char* const memory = take<char>(int64_t(cuda::library_bytes() + cuda::kLibraryAlignment));
      const size_t beyond = reinterpret_cast<uintptr_t>(memory) % cuda::kLibraryAlignment;
      if (runs()) {
        products_.emplace(call_, stream(), memory + (cuda::kLibraryAlignment - beyond));
        multiply_beside_ = is_beside_;
      }
    }
    if (!runs()) return;
    if (multiply_beside_ != is_beside_) throw std::logic_error("products in two streams");
    products_->multiply(product);
  }

 private:
  const cuda::Call& call_;
  char* const memory_;
  Carver carver_;
  const std::string what_;
  bool multiplies_ = false, multiply_beside_ = false, is_beside_ = false;
  std::optional<cuda::SideStream> side_;
  std::optional<cuda::Products> products_;
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
