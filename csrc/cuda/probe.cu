// Whether this build has code for a GPU: a kernel of the same architectures as all others.
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
  cudaGetLastError();  // so that nobody else finds it
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidPtx:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled:
      return cudaGetErrorString(error);
    default:  // it may pass
      throw std::runtime_error(std::string("loading a kernel: ") + cudaGetErrorString(error));
  }
}

}  // namespace rnnkern::cuda
