// Copies of outputs that torch makes when somebody writes to one of the two. Reading needs care,
// too: torch makes the copy as soon as it is asked for the memory in a way that allows writing, as
// DLPack does. So what kernels read here are tensors of their own over the same memory.
#pragma once

#include <atomic>

#include "python/new_tensor.h"
#include "python/torch.h"

namespace rnnkern {

// How many copies of ours are alive. While there are none, nobody has to ask whether an operand
// shares its memory with one.
inline std::atomic<int64_t> lazy_copies = 0;

// A tensor with what `made`, whose memory this is, holds now. Later changes of `made` do not reach
// it.
inline py::object lazy_copy(const py::object& made, void* data, dlpack::Device device,
                            dlpack::DataType dtype, const Shape& shape) {
  py::object copy = ask(api.lazy_clone, made);
  if (!api.is_lazy || !is_so(api.is_lazy, copy)) return copy;
  // The owner is seen by nobody, so nobody makes it leave this memory.
  lazy_copies.fetch_add(1, std::memory_order_relaxed);
  return tensor_over(data, device, dtype, shape, std::move(copy), [](ManagedTensor* self) {
    lazy_copies.fetch_sub(1, std::memory_order_relaxed);
    release_owner(self);
  });
}

// Whether torch says so. It has no answer for tensors without plain memory.
inline bool shares_lazily(py::handle operand) {
  PyObject* answer = PyObject_CallOneArg(api.is_lazy, operand.ptr());
  if (answer) return is_true(py::reinterpret_steal<py::object>(answer));
  PyErr_Clear();
  return false;
}

// The operand for kernels to read: itself, or a tensor over its memory if it shares that with a
// lazy copy. The owner of that memory is another lazy copy: another thread may make the operand
// leave it, by `numpy` for example, while a kernel reads it. On a GPU, torch makes the copy.
inline py::object as_read(py::handle operand) {
  const py::object own = py::reinterpret_borrow<py::object>(operand);
  if (lazy_copies.load(std::memory_order_relaxed) == 0 || !api.address || !is_tensor(operand) ||
      !shares_lazily(operand) || is_so(api.is_neg, operand) || !own.attr("is_cpu").cast<bool>()) {
    return own;
  }
  const py::tuple sizes = own.attr("shape"), strides = own.attr("stride")();
  const py::object dtype = own.attr("dtype");
  Shape shape = {int(sizes.size()), {}, {}};
  if (shape.axes > kMaxAxes) return own;
  for (int i = 0; i < shape.axes; ++i) {
    shape.sizes[i] = sizes[size_t(i)].cast<int64_t>();
    shape.strides[i] = strides[size_t(i)].cast<int64_t>();
  }
  for (const auto& [known, type] : api.dtypes) {
    if (dtype.ptr() != known) continue;
    py::object owner = ask(api.lazy_clone, own);
    void* const data = PyLong_AsVoidPtr(ask(api.address, owner).ptr());
    return tensor_over(data, {dlpack::kCpu, 0}, type, shape, std::move(owner));
  }
  return own;
}

}  // namespace rnnkern
