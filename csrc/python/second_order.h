// SecondOrder (scan.h) from Python.
#pragma once

#include <initializer_list>
#include <string>

#include "cpu/kernels.h"
#include "python/layer.h"
#include "python/new_tensor.h"
#include "python/operands.h"
#include "python/run.h"

namespace rnnkern {

// Reads dense tensors of one call, and makes those of its results.
template <typename T>
class DenseOperands {
 public:
  explicit DenseOperands(py::handle first) : like_(first) {}

  template <typename U = T>
  U* read(py::handle object, const char* name, std::initializer_list<int64_t> shape,
          dlpack::DataType dtype = dlpack::kDataType<T>) const {
    if (object.is_none()) return nullptr;
    const TensorView v = view_of(object, name);
    if (!is_tensor(object)) v.fail("is a tensor subclass");
    v.expect_device(kHost);
    v.expect_dtype(dtype, "wanted");
    v.expect_shape(shape);
    const Shape wanted = dense(shape);
    for (int i = 0; i < wanted.axes; ++i) {
      if (v.size(i) > 1 && v.stride(i) != wanted.strides[i]) v.fail("is not dense");
    }
    return v.data<U>();
  }

  py::object make(std::initializer_list<int64_t> shape, T** data) const {
    NewTensor made = new_tensor(like_, kHost, dense(shape), dlpack::kDataType<T>, false);
    *data = static_cast<T*>(made.data);
    return std::move(made.object);
  }

 private:
  py::handle like_;
};

template <typename T>
py::tuple second_order_of(CellId cell, py::handle sums, const py::dict& given) {
  const CellShape shape = cell_shape(cell);
  const TensorView view = view_of(sums, "tangent_slots");
  if (view.tensor.ndim != 3 || view.size(2) % shape.slots) {
    view.fail("must be [T, N, slots * H]");
  }
  SecondOrder<T> s;
  s.cell = cell;
  s.steps = view.size(0);
  s.N = view.size(1);
  s.H = view.size(2) / shape.slots;
  const int64_t T_ = s.steps, N = s.N, H = s.H, S = shape.slots * H;
  const DenseOperands<T> o(sums);
  const auto number = [&](const char* name, std::initializer_list<int64_t> sizes) -> const T* {
    return o.read(given[name], name, sizes);
  };
  const auto flag = [&](const char* name) -> const bool* {
    return o.template read<bool>(given[name], name, {T_, N}, {dlpack::kBool, 8, 1});
  };
  s.tangent_slots = o.read(sums, "tangent_slots", {T_, N, S});
  s.active = flag("active");
  s.kept = flag("kept");
  s.w_hh = number("w_hh", {shape.gates * H, H});
  s.slots = number("slots", {T_, N, S});
  s.h = number("h", {T_, N, H});
  s.c = number("c", {T_, N, H});
  s.h0 = number("h0", {N, H});
  s.c0 = number("c0", {N, H});
  s.dslots = number("dslots", {T_, N, S});
  if (!s.w_hh || !s.h || !s.dslots || (shape.saves_slots && !s.slots) ||
      (shape.cell_state && !s.c)) {
    throw Refused("an operand that the cell needs is None");
  }
  s.dy = number("dy", {T_, N, H});
  s.dhn = number("dhn", {N, H});
  s.dcn = number("dcn", {N, H});
  s.tangent_h0 = number("tangent_h0", {N, H});
  s.tangent_c0 = number("tangent_c0", {N, H});
  s.tangent_dy = number("tangent_dy", {T_, N, H});
  s.tangent_dhn = number("tangent_dhn", {N, H});
  s.tangent_dcn = number("tangent_dcn", {N, H});
  s.crossing = number("crossing", {T_, N, H});
  py::object h = o.make({T_, N, H}, &s.tangent_h), before = o.make({T_, N, H}, &s.tangent_h_prev);
  py::object hn = o.make({N, H}, &s.tangent_hn), dh0 = o.make({N, H}, &s.tangent_dh0);
  py::object cn = py::none(), dc0 = py::none();
  if (shape.cell_state) {
    cn = o.make({N, H}, &s.tangent_cn);
    dc0 = o.make({N, H}, &s.tangent_dc0);
  }
  Sizes sizes;
  sizes.cell = cell;
  sizes.H = sizes.O = H;
  Steps steps;
  steps.total = T_ * N;
  const int threads = num_threads();
  const bool deterministic = is_so(api.deterministic);
  with_interpreter_released(sizes, steps, [&] { run(s, threads, deterministic); });
  return py::make_tuple(h, before, hn, cn, dh0, dc0);
}

inline py::tuple second_order(const std::string& mode, py::handle sums, const py::dict& given) {
  const std::optional<CellId> cell = cell_named(mode);
  if (!cell) throw py::value_error("no kernel knows the cell '" + mode + "'");
  const dlpack::DataType dtype = view_of(sums, "tangent_slots").tensor.dtype;
  if (dtype == dlpack::kDataType<float> && has_second_order<float>()) {
    return second_order_of<float>(*cell, sums, given);
  }
  if (dtype == dlpack::kDataType<double> && has_second_order<double>()) {
    return second_order_of<double>(*cell, sums, given);
  }
  throw Refused("tangent_slots is not covered: its dtype");
}

}  // namespace rnnkern
