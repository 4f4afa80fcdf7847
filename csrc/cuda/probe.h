#pragma once

namespace rnnkern::cuda {

// Why no kernel of this build runs on the current device, or null. Throws std::runtime_error for
// temporary reasons, such as a lack of memory.
const char* why_no_code();

}  // namespace rnnkern::cuda
