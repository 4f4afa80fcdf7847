// Memory for results: new torch tensors, uninitialised.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <new>

#include "huge_pages.h"
#include "python/torch.h"

namespace rnnkern {

constexpr int kMaxAxes = 3;

struct Shape {
  int axes;
  int64_t sizes[kMaxAxes], strides[kMaxAxes];

  // In double, which no size overflows.
  double elements() const {
    double count = 1;
    for (int i = 0; i < axes; ++i) count *= double(sizes[i]);
    return count;
  }
};

inline Shape dense(std::initializer_list<int64_t> sizes) {
  Shape shape = {};
  for (int64_t size : sizes) shape.sizes[shape.axes++] = size;
  int64_t stride = 1;
  for (int i = shape.axes - 1; i >= 0; --i) {
    shape.strides[i] = stride;
    stride *= std::max<int64_t>(1, shape.sizes[i]);
  }
  return shape;
}

// A small tensor is handed to torch together with its memory, header and data in one block. That
// takes half the time of asking torch for one, which counts if a call takes a few microseconds.
struct SmallTensor {
  struct {
    uint32_t major = 1, minor = 0;
  } version;
  void* context = nullptr;
  void (*release)(SmallTensor*) = [](SmallTensor* self) { Delete()(self); };
  uint64_t flags = 0;
  dlpack::Tensor tensor;
  Shape shape;

  // Data begins at a cache line, as torch's does. The block itself need not, because malloc would
  // be slower.
  static constexpr size_t kAlignment = 64, kMaxBytes = 16 * 1024;

  struct Delete {
    void operator()(SmallTensor* self) const {
      self->~SmallTensor();
      ::operator delete(self);
    }
  };
  static std::unique_ptr<SmallTensor, Delete> make(const Shape& shape, dlpack::DataType dtype,
                                                   size_t bytes) {
    void* block = ::operator new(sizeof(SmallTensor) + kAlignment + bytes);
    return std::unique_ptr<SmallTensor, Delete>(new (block) SmallTensor(shape, dtype));
  }

 private:
  SmallTensor(const Shape& given, dlpack::DataType dtype) : shape(given) {
    const auto end = reinterpret_cast<uintptr_t>(this + 1);
    tensor = {reinterpret_cast<void*>((end + kAlignment - 1) / kAlignment * kAlignment),
              {dlpack::kCpu, 0},
              shape.axes,
              dtype,
              shape.sizes,
              shape.strides,
              0};
  }
};

struct NewTensor {
  py::object object;
  void* data;
};

inline NewTensor new_small_tensor(const Shape& shape, dlpack::DataType dtype, size_t bytes) {
  auto small = SmallTensor::make(shape, dtype, bytes);
  void* result = nullptr;
  if (api.exchange->managed_to_object(small.get(), &result) != 0) throw py::error_already_set();
  void* data = small.release()->tensor.data;  // torch's now
  return {py::reinterpret_steal<py::object>(static_cast<PyObject*>(result)), data};
}

// Whether a tensor of that size is made as a SmallTensor.
inline bool is_small(dlpack::Device device, const Shape& shape, dlpack::DataType dtype,
                     bool deterministic) {
  return device.type == dlpack::kCpu && !deterministic &&
         shape.elements() * (dtype.bits / 8) <= double(SmallTensor::kMaxBytes);
}

// A new tensor of the dtype and device of `like`, which are given once more. torch's own allocator
// makes a large one, any one on a GPU, and any one under deterministic algorithms. In that mode
// torch fills it first, so that what is left unwritten shows.
inline NewTensor new_tensor(py::handle like, dlpack::Device device, const Shape& shape,
                            dlpack::DataType dtype, bool deterministic) {
  const double bytes = shape.elements() * (dtype.bits / 8);
  if (is_small(device, shape, dtype, deterministic)) {
    return new_small_tensor(shape, dtype, size_t(bytes));
  }
  py::tuple sizes(shape.axes), strides(shape.axes);
  for (int i = 0; i < shape.axes; ++i) {
    sizes[size_t(i)] = shape.sizes[i];
    strides[size_t(i)] = shape.strides[i];
  }
  PyObject* arguments[] = {like.ptr(), sizes.ptr(), strides.ptr()};
  PyObject* result = PyObject_Vectorcall(api.new_empty_strided, arguments, 3, nullptr);
  if (!result) throw py::error_already_set();
  NewTensor made = {py::reinterpret_steal<py::object>(result), nullptr};
  dlpack::Tensor view;
  if (api.exchange->view_of_object(result, &view) != 0) throw py::error_already_set();
  made.data = static_cast<char*>(view.data) + view.byte_offset;
  if (device.type == dlpack::kCpu) advise_huge_pages(made.data, size_t(bytes));
  return made;
}

}  // namespace rnnkern
