// Whether an NVIDIA driver can run a build. Versions are numbers as the CUDA runtime has them:
// 13020 is 13.2.
#pragma once

#include <optional>
#include <string>

namespace rnnkern::cuda {

inline std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Why a driver that knows CUDA up to `driver` cannot run what was built with `built`, or null.
// Within a major version any driver can.
inline std::optional<std::string> driver_refusal(int driver, int built) {
  const int major = built / 1000;
  if (driver / 1000 >= major) return std::nullopt;
  return "an NVIDIA driver for CUDA " + version_text(driver) +
         ", and this build of rnnkern, with CUDA " + version_text(built) + ", needs one for CUDA " +
         version_text(major * 1000) + " or later";
}

}  // namespace rnnkern::cuda
