// cuBLAS is not linked. It is found in the process, into which torch has loaded it, so that one
// binary serves every torch. The part of its binary interface that is used is declared here (cuBLAS
// 12 and 13).
#include "cuda/library.h"

#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>

#include "cuda/plan.h"

namespace rnnkern::cuda {
namespace {

using Handle = void*;
using Status = int;

enum Operation : int { kAsItIs = 0, kTransposed = 1 };
enum DataType : int { kR32F = 0, kR64F = 1, kR16F = 2, kR16BF = 14 };
enum ComputeType : int { kCompute32F = 68, kCompute64F = 70, kCompute32FFastTf32 = 77 };
constexpr int kDefaultAlgorithm = -1;
constexpr int kNoReducedPrecisionReduction = 16;  // math mode: 16-bit products are summed in float

struct Library {
  Status (*create)(Handle*);
  Status (*set_stream)(Handle, void*);
  Status (*set_workspace)(Handle, void*, size_t);
  Status (*set_math_mode)(Handle, int);
  Status (*multiply)(Handle, int, int, int64_t, int64_t, int64_t, const void*, const void*, int,
                     int64_t, const void*, int, int64_t, const void*, void*, int, int64_t, int,
                     int);
  bool complete = false;
};

Library load() {
  Library library = {};
  for (const char* name : {"libcublas.so.13", "libcublas.so.12"}) {
    void* const loaded = dlopen(name, RTLD_NOW | RTLD_NOLOAD);
    if (!loaded) continue;
    const auto find = [&](const char* symbol, auto* function) {
      *function =
          reinterpret_cast<std::remove_pointer_t<decltype(function)>>(dlsym(loaded, symbol));
      return *function != nullptr;
    };
    library.complete = find("cublasCreate_v2", &library.create) &&
                       find("cublasSetStream_v2", &library.set_stream) &&
                       find("cublasSetWorkspace_v2", &library.set_workspace) &&
                       find("cublasSetMathMode", &library.set_math_mode) &&
                       find("cublasGemmEx_64", &library.multiply);
    if (library.complete) break;
  }
  return library;
}

const Library& library() {
  static const Library loaded = load();
  return loaded;
}

void check(Status status, const char* what) {
  if (status != 0) {
    throw std::runtime_error(std::string("cuBLAS, ") + what + ": status " + std::to_string(status));
  }
}

// There is one for each device, which is never destroyed.
struct OfDevice {
  std::mutex mutex;
  Handle handle = nullptr;
};
OfDevice& of_device(int device) {
  static std::mutex mutex;
  static auto& all = *new std::map<int, OfDevice>();
  const std::lock_guard lock(mutex);
  return all[device];
}

int data_type(Number number) {
  switch (number) {
    case Number::kDouble:
      return kR64F;
    case Number::kBf16:
      return kR16BF;
    case Number::kF16:
      return kR16F;
    case Number::kFloat:
      break;
  }
  return kR32F;
}

}  // namespace

bool has_library() {
  const char* const wanted = std::getenv("RNNKERN_CUBLAS");
  return library().complete && !(wanted && std::string_view(wanted) == "0");
}
size_t library_bytes() { return size_t(kLibraryBytes); }

void* begin_products(int device, void* stream, char* workspace) {
  OfDevice& own = of_device(device);
  std::unique_lock lock(own.mutex);
  if (!own.handle) {
    Handle created = nullptr;
    check(library().create(&created), "create");
    check(library().set_math_mode(created, kNoReducedPrecisionReduction), "math mode");
    own.handle = created;
  }
  // The stream is set first, because that resets the workspace.
  check(library().set_stream(own.handle, stream), "stream");
  check(library().set_workspace(own.handle, workspace, library_bytes()), "workspace");
  lock.release();  // until end_products
  return &own;
}

void end_products(void* products) { static_cast<OfDevice*>(products)->mutex.unlock(); }

void multiply(void* products, const Product& p, bool tf32) {
  const bool is_double = p.operands == Number::kDouble;
  const int compute = is_double                              ? kCompute64F
                      : p.operands == Number::kFloat && tf32 ? kCompute32FFastTf32
                                                             : kCompute32F;
  const float one = 1, beta = p.adds;
  const double double_one = 1, double_beta = p.adds;
  const void* const factors[] = {is_double ? static_cast<const void*>(&double_one) : &one,
                                 is_double ? static_cast<const void*>(&double_beta) : &beta};
  const int operands = data_type(p.operands);
  // cuBLAS stores matrices column by column. Our rows are its columns, so it computes b^T a^T.
  const Handle handle = static_cast<OfDevice*>(products)->handle;
  check(library().multiply(handle, p.b.transposed ? kTransposed : kAsItIs,
                           p.a.transposed ? kTransposed : kAsItIs, p.n, p.m, p.k, factors[0],
                           p.b.data, operands, p.b.row, p.a.data, operands, p.a.row, factors[1],
                           p.to, data_type(p.results), p.row, compute, kDefaultAlgorithm),
        "product");
}

}  // namespace rnnkern::cuda
