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

// A tensor that torch is handed with its memory, and gives back: DLPack's managed tensor.
struct ManagedTensor {
  using Release = void (*)(ManagedTensor*);

  struct {
    uint32_t major = 1, minor = 0;
  } version;
  void* context = nullptr;
  Release release;
  uint64_t flags = 0;
  dlpack::Tensor tensor;
  Shape shape;

  ManagedTensor(Release how, void* data, dlpack::Device device, dlpack::DataType dtype,
                const Shape& given)
      : release(how), shape(given) {
    tensor = {data, device, shape.axes, dtype, shape.sizes, shape.strides, 0};
  }
  ManagedTensor(const ManagedTensor&) = delete;
  ManagedTensor& operator=(const ManagedTensor&) = delete;

  struct Delete {
    void operator()(ManagedTensor* self) const { self->release(self); }
  };
};
using OwnedTensor = std::unique_ptr<ManagedTensor, ManagedTensor::Delete>;

inline py::object handed_to_torch(OwnedTensor owned) {
  void* result = nullptr;
  if (api.exchange->managed_to_object(owned.get(), &result) != 0) throw py::error_already_set();
  owned.release();  // torch's now
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(result));
}

// A small tensor is handed to torch together with its memory, header and data in one block. That
// takes half the time of asking torch for one, which counts if a call takes a few microseconds.
constexpr size_t kMostSmallBytes = 16 * 1024;

struct NewTensor {
  py::object object;
  void* data;
};

inline NewTensor new_small_tensor(const Shape& shape, dlpack::DataType dtype, size_t bytes) {
  // Data begins at a cache line, as torch's does. The block itself need not, because malloc would
  // be slower.
  constexpr size_t kAlignment = 64;
  void* const block = ::operator new(sizeof(ManagedTensor) + kAlignment + bytes);
  const uintptr_t end = reinterpret_cast<uintptr_t>(block) + sizeof(ManagedTensor);
  void* const data = reinterpret_cast<void*>((end + kAlignment - 1) / kAlignment * kAlignment);
  const auto release = [](ManagedTensor* self) {
    self->~ManagedTensor();
    ::operator delete(self);
  };
  OwnedTensor owned(new (block) ManagedTensor(release, data, {dlpack::kCpu, 0}, dtype, shape));
  return {handed_to_torch(std::move(owned)), data};
}

// A tensor over memory that `owner` keeps. Torch may give it back in any thread.
inline void release_owner(ManagedTensor* self) {
  if (Py_IsInitialized()) {
    const py::gil_scoped_acquire acquired;
    Py_DECREF(static_cast<PyObject*>(self->context));
  }
  delete self;
}
inline py::object tensor_over(void* data, dlpack::Device device, dlpack::DataType dtype,
                              const Shape& shape, py::object owner,
                              ManagedTensor::Release release = release_owner) {
  OwnedTensor owned(new ManagedTensor(release, data, device, dtype, shape));
  owned->context = owner.release().ptr();
  return handed_to_torch(std::move(owned));
}

// Whether a tensor of that size is made by new_small_tensor.
inline bool is_small(dlpack::Device device, const Shape& shape, dlpack::DataType dtype,
                     bool deterministic) {
  return device.type == dlpack::kCpu && !deterministic &&
         shape.elements() * (dtype.bits / 8) <= double(kMostSmallBytes);
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
