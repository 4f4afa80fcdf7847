// A GPU as plan and launches see it.
#pragma once

#include <cstdint>

namespace rnnkern::cuda {

struct Device {
  int multiprocessors = 1;
  int64_t shared_bytes = 48 << 10;  // that a block may have
};

// That device of this machine. Throws std::runtime_error where it does not answer.
const Device& device(int id);

// Makes a device the current one for a while.
class Current {
 public:
  explicit Current(int device);
  ~Current();
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  int before_, device_;
};

}  // namespace rnnkern::cuda
