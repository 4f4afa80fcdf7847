#pragma once

namespace rnnkern::cuda {

// Why no kernel of this build runs on the current device, or null.
const char* why_no_code();

}  // namespace rnnkern::cuda
