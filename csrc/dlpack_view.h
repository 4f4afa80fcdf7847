// A torch tensor as plain C data, through the DLPack exchange table (a C function table that torch
// >= 2.10 publishes as torch.Tensor.__dlpack_c_exchange_api__). No copy, no ownership, no Python
// work: a view lives as long as the call.
//
// The structures below state the binary interface of DLPack 1.x, as far as it is used here.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "elements.h"

namespace rnnkern {
namespace dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Device {
  int32_t type, id;

  bool operator==(const Device&) const = default;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;

  bool operator==(const DataType&) const = default;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct Header {
  uint32_t major, minor;
  Header* previous;
};
struct ExchangeTable {
  Header header;
  int (*allocate)(Tensor*, void**, void*, void (*)(void*, const char*, const char*));
  int (*managed_from_object)(void*, void**);
  int (*managed_to_object)(void*, void**);
  int (*view_of_object)(void* object, Tensor* view);  // 0, or -1 with a Python exception set
  int (*current_stream)(int32_t device_type, int32_t device_id, void** stream);
};

// The dtype that DLPack names for a tensor of elements T.
template <typename T>
constexpr DataType kDataType = {std::is_same_v<T, Bf16> ? kBfloat : kFloat, 8 * sizeof(T), 1};

}  // namespace dlpack

// The kernels cannot take this call, or its operands do not fit each other. Thrown before anything
// is written.
struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline std::string shape_text(const int64_t* sizes, int64_t count) {
  std::string text = "[";
  for (int64_t i = 0; i < count; ++i) {
    if (i) text += ", ";
    text += std::to_string(sizes[i]);
  }
  return text + "]";
}

// A view with the name that errors call it by.
struct TensorView {
  dlpack::Tensor tensor;
  const char* name;

  int64_t size(int i) const { return tensor.shape[i]; }
  // The stride of an axis with at most one element is never used; torch leaves anything there.
  int64_t stride(int i) const { return tensor.strides ? tensor.strides[i] : dense_stride(i); }

  template <typename T>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(tensor.data) + tensor.byte_offset);
  }

  void expect_device(dlpack::Device device) const {
    if (tensor.device != device) fail("is on another device than the input");
  }

  void expect_dtype(dlpack::DataType dtype, const char* wanted) const {
    if (tensor.dtype != dtype) {
      fail(std::string("has another dtype than ") + wanted);
    }
  }

  void expect_shape(std::initializer_list<int64_t> sizes) const {
    bool equal = tensor.ndim == int32_t(sizes.size());
    int i = 0;
    for (int64_t wanted : sizes) equal = equal && size(i++) == wanted;
    if (!equal) {
      fail("has shape " + shape_text(tensor.shape, tensor.ndim) + ", expected " +
           shape_text(sizes.begin(), int64_t(sizes.size())));
    }
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw Refused(std::string(name) + " " + what);
  }

 private:
  int64_t dense_stride(int axis) const {
    int64_t stride = 1;
    for (int i = axis + 1; i < tensor.ndim; ++i) stride *= tensor.shape[i];
    return stride;
  }
};

}  // namespace rnnkern
