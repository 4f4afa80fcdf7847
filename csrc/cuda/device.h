// The devices of this machine.
#pragma once

#include <cstddef>

#include "cuda/plan.h"

namespace rnnkern::cuda {

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

// Queues the writing of zeros.
void clear(char* memory, size_t bytes, void* stream);

}  // namespace rnnkern::cuda
