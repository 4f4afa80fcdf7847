// Finds out whether this build has code for a GPU, with a kernel for the same architectures as all
// others.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/probe.h"

namespace rnnkern::cuda {
namespace {

__global__ void nothing() {}

}  // namespace

const char* why_no_code() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, nothing);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // clears the error, so that later calls do not report it
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidPtx:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled:
      return cudaGetErrorString(error);
    default:  // the reason may be a temporary one
      throw std::runtime_error(std::string("loading a kernel: ") + cudaGetErrorString(error));
  }
}

}  // namespace rnnkern::cuda
