// One call on its way: the scratch memory it carves, and the kernels it queues. Laying out and
// running are the same code: without memory it only counts.
#pragma once

#include <optional>
#include <string>
#include <utility>

#include "cuda/device.h"
#include "cuda/library.h"
#include "workspace.h"

namespace rnnkern {
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

  const cuda::Device& device;
  const bool has_library;  // for products, through the whole call

  bool runs() const { return memory_; }
  void* stream() const { return call_.stream; }
  // A kernel's name in errors.
  std::string name_of(const char* kernel) const { return std::string(kernel) + " of " + what_; }
  bool tf32() const { return call_.tf32; }
  bool deterministic() const { return call_.deterministic; }
  size_t bytes() const { return carver_.used(); }

  template <typename U>
  U* take(int64_t count) {
    return carver_.take<U>(count);
  }

  // What has been taken up to now is zero when the next kernel starts.
  void clear_taken() {
    if (runs()) cuda::clear(memory_, carver_.used(), call_.stream);
  }

  void multiply(const cuda::Product& product) {
    if (!multiplies_) {
      multiplies_ = true;
      char* const memory = take<char>(int64_t(cuda::library_bytes() + cuda::kLibraryAlignment));
      const size_t beyond = reinterpret_cast<uintptr_t>(memory) % cuda::kLibraryAlignment;
      if (runs()) products_.emplace(call_, memory + (cuda::kLibraryAlignment - beyond));
    }
    if (runs()) products_->multiply(product);
  }

 private:
  const cuda::Call& call_;
  char* const memory_;
  Carver carver_;
  const std::string what_;
  bool multiplies_ = false;
  std::optional<cuda::Products> products_;
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
