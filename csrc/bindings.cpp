// The Python module rnnkern._C. The only file that knows Python: turns tensors into checked views, views into a scan, and
// releases the interpreter while it runs. Whatever does not fit raises RuntimeError before anything is written.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/kernels.h"
#include "dlpack_view.h"

namespace py = pybind11;

namespace rnnkern {
namespace {

const dlpack::ExchangeTable* exchange = nullptr;
PyTypeObject* tensor_type = nullptr;
PyTypeObject* parameter_type = nullptr;
PyObject* is_neg = nullptr;

void bind_exchange_table() {
  const py::object type = py::module_::import("torch").attr("Tensor");
  if (!py::hasattr(type, "__dlpack_c_exchange_api__")) {
    throw py::import_error("rnnkern needs torch >= 2.10: this torch has no DLPack exchange table");
  }
  const py::capsule capsule = type.attr("__dlpack_c_exchange_api__");
  const auto* table = static_cast<const dlpack::ExchangeTable*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (table && table->header.major != 1) {
    table = reinterpret_cast<const dlpack::ExchangeTable*>(table->header.previous);
  }
  if (!table || !table->view_of_object) throw py::import_error("this torch has no DLPack 1.x exchange table");
  exchange = table;
  tensor_type = reinterpret_cast<PyTypeObject*>(py::object(type).release().ptr());
  const py::object parameter = py::module_::import("torch.nn").attr("Parameter");
  parameter_type = reinterpret_cast<PyTypeObject*>(py::object(parameter).release().ptr());
  is_neg = py::str("is_neg").release().ptr();
}

TensorView view_of(py::handle object, const char* name) {
  if (!PyObject_TypeCheck(object.ptr(), tensor_type)) {
    throw py::type_error(std::string(name) + " must be a torch.Tensor, got " + Py_TYPE(object.ptr())->tp_name);
  }
  TensorView view;
  view.name = name;
  if (exchange->view_of_object(object.ptr(), &view.tensor) != 0) throw py::error_already_set();
  return view;
}

const char kGaps[] = "gaps along the last axis";

// Why no kernel covers this tensor, or an empty string. `like` is the tensor whose dtype it must share.
std::string refusal_of(py::handle object, const TensorView* like, TensorView* view) {
  const PyTypeObject* type = Py_TYPE(object.ptr());
  if (type != tensor_type && type != parameter_type) return std::string("tensor subclass ") + type->tp_name;
  if (exchange->view_of_object(object.ptr(), &view->tensor) != 0) {
    PyErr_Clear();
    return "no plain memory behind a tensor (meta, sparse, quantized or wrapped)";
  }
  const dlpack::Tensor& t = view->tensor;
  if (t.device.type != dlpack::kCpu) return "device other than cpu";
  if (t.dtype.code != dlpack::kFloat || (t.dtype.bits != 32 && t.dtype.bits != 64)) {
    return "dtype other than float32 and float64";
  }
  if (like && like->tensor.dtype.bits != t.dtype.bits) return "mixed dtypes";
  int64_t elements = 1;
  for (int i = 0; i < t.ndim; ++i) elements *= t.shape[i];
  if (elements && !t.data) return "no plain memory behind a tensor (meta, sparse, quantized or wrapped)";
  const py::object negated = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object.ptr(), is_neg));
  if (!negated) throw py::error_already_set();
  if (negated.ptr() == Py_True) return "lazily negated tensor";
  if (t.ndim && elements && t.shape[t.ndim - 1] > 1 && view->stride(t.ndim - 1) != 1) return kGaps;
  return {};
}

py::object refusal(py::handle x, py::handle h0, py::handle c0, const py::sequence& weights) {
  TensorView input, other;
  std::string gaps;
  const auto refuses = [&](py::handle object, TensorView* view) {
    if (object.is_none()) return std::string();
    std::string reason = refusal_of(object, view == &input ? nullptr : &input, view);
    if (reason != kGaps) return reason;
    gaps = reason;  // only where nothing worse is found
    return std::string();
  };
  std::string reason = refuses(x, &input);
  if (reason.empty()) reason = refuses(h0, &other);
  if (reason.empty()) reason = refuses(c0, &other);
  const size_t count = weights.size();
  for (size_t i = 0; reason.empty() && i < count; ++i) reason = refuses(weights[i], &other);
  if (reason.empty()) reason = gaps;
  return reason.empty() ? py::object(py::none()) : py::object(py::str(reason));
}

// What a layer is, apart from its sizes.
struct Layer {
  int cell, directions;
  bool bias, projected, batch_first;

  int tensors() const { return 2 + 2 * bias + projected; }  // per direction
};

template <typename T>
TensorView float_view(py::handle object, const char* name) {
  TensorView view = view_of(object, name);
  view.expect_dtype(dlpack::kFloat, 8 * sizeof(T), sizeof(T) == 4 ? "the input's float32" : "the input's float64");
  return view;
}

// The operands of one scan, checked against each other as they are read.
template <typename T>
class Operands {
 public:
  Operands(const Layer& layer, py::handle x, py::handle steps) : layer_(layer), x_(float_view<T>(x, "input")) {
    if (layer.cell < 0 || layer.cell > int(CellId::kGru) || layer.directions < 1 || layer.directions > kMaxDirections) {
      throw std::runtime_error("unknown layer");
    }
    read_steps(steps);
    sizes.cell = CellId(layer.cell);
    sizes.D = layer.directions;
    sizes.projected = layer.projected;
    sizes.I = x_.size(x_.tensor.ndim - 1);
  }

  Sizes sizes;
  Steps steps;

  void read_weights(const py::sequence& list, Weights<T>* out) {
    if (int(list.size()) != layer_.directions * layer_.tensors()) {
      throw std::runtime_error("expected " + std::to_string(layer_.directions * layer_.tensors()) + " weights, got " +
                               std::to_string(list.size()));
    }
    const int gates = cell_shape(sizes.cell).gates;
    for (int d = 0, i = 0; d < layer_.directions; ++d) {
      const TensorView w_ih = float_view<T>(list[i++], "weight_ih"), w_hh = float_view<T>(list[i++], "weight_hh");
      if (d == 0) {
        if (w_hh.tensor.ndim != 2 || w_hh.size(0) % gates) {
          w_hh.fail("has shape " + shape_text(w_hh.tensor.shape, w_hh.tensor.ndim) + ", expected " +
                    std::to_string(gates) + " gates x hidden_size rows");
        }
        sizes.H = w_hh.size(0) / gates;
        sizes.O = layer_.projected ? w_hh.size(1) : sizes.H;
      }
      const int64_t rows = gates * sizes.H;
      w_ih.expect_shape({rows, sizes.I});
      w_hh.expect_shape({rows, sizes.O});
      Weights<T>& w = out[d];
      w.w_ih = w_ih.template data<const T>();
      w.w_hh = w_hh.template data<const T>();
      w.w_ih_row = w_ih.stride(0);
      w.w_hh_row = w_hh.stride(0);
      if (layer_.bias) {
        w.b_ih = vector(list[i++], "bias_ih", rows);
        w.b_hh = vector(list[i++], "bias_hh", rows);
      }
      if (layer_.projected) {
        const TensorView w_hr = float_view<T>(list[i++], "weight_hr");
        w_hr.expect_shape({sizes.O, sizes.H});
        w.w_hr = w_hr.template data<const T>();
        w.w_hr_row = w_hr.stride(0);
      }
    }
  }

  Rows<const T> input() { return rows_of<const T>(x_, sizes.I); }

  template <typename U>
  Rows<U> rows(py::handle object, const char* name, int64_t features) {
    if (object.is_none()) return {};
    return rows_of<U>(float_view<T>(object, name), features);
  }

  template <typename U>
  State<U> state(py::handle object, const char* name, int64_t features) {
    if (object.is_none()) return {};
    const TensorView v = float_view<T>(object, name);
    v.expect_shape({sizes.D, steps.N, features});
    return {v.data<U>(), v.stride(0), v.stride(1)};
  }

  // A dense [D, total, features] buffer.
  T* buffer(py::handle object, const char* name, int64_t features) {
    if (object.is_none()) return nullptr;
    const TensorView v = float_view<T>(object, name);
    v.expect_shape({sizes.D, steps.total, features});
    return v.data<T>();
  }

  // Gradients of the weights, in the order of the weights; None where not wanted.
  void read_gradients(const py::sequence& list, WeightGradients<T>* out) {
    if (int(list.size()) != layer_.directions * layer_.tensors()) throw std::runtime_error("wrong number of gradients");
    const int64_t rows = cell_shape(sizes.cell).gates * sizes.H;
    for (int d = 0, i = 0; d < layer_.directions; ++d) {
      out[d].w_ih = matrix(list[i++], rows, sizes.I);
      out[d].w_hh = matrix(list[i++], rows, sizes.O);
      if (layer_.bias) {
        out[d].b_ih = matrix(list[i++], rows, 0);
        out[d].b_hh = matrix(list[i++], rows, 0);
      }
      if (layer_.projected) out[d].w_hr = matrix(list[i++], sizes.O, sizes.H);
    }
  }

 private:
  // steps: None, or (active, order, reset, packed), each tensor or None.
  void read_steps(py::handle object) {
    const bool packed = !object.is_none() && py::cast<bool>(py::tuple(py::reinterpret_borrow<py::object>(object))[3]);
    const int dims = packed ? 2 : 3;
    if (x_.tensor.ndim != dims) x_.fail("has " + std::to_string(x_.tensor.ndim) + " axes, expected " + std::to_string(dims));
    if (!packed) {
      steps.T = x_.size(layer_.batch_first ? 1 : 0);
      steps.N = x_.size(layer_.batch_first ? 0 : 1);
      steps.total = steps.T * steps.N;
    }
    if (object.is_none()) return;
    const py::tuple parts = py::reinterpret_borrow<py::object>(object);
    if (!parts[0].is_none()) read_active(parts[0], packed);
    if (!parts[1].is_none()) read_order(parts[1]);
    if (!parts[2].is_none()) read_reset(parts[2]);
  }

  void read_active(py::handle object, bool packed) {
    const TensorView v = view_of(object, packed ? "batch_sizes" : "active rows");
    v.expect_dtype(dlpack::kInt, 64, "int64");
    if (packed) {
      if (v.tensor.ndim != 1) v.fail("must have one axis");
      steps.T = v.size(0);
      steps.N = steps.T ? v.data<const int64_t>()[0] : 0;
    }
    v.expect_shape({steps.T});
    steps.active = v.data<const int64_t>();
    int64_t total = 0;
    for (int64_t t = 0; t < steps.T; ++t) {
      if (packed) start_.push_back(total);
      if (steps.active[t] < 0 || steps.active[t] > (t ? steps.active[t - 1] : steps.N)) {
        v.fail("must not increase, nor be negative");
      }
      total += steps.active[t];
    }
    if (!packed) return;
    steps.start = start_.data();
    steps.total = total;
    if (x_.size(0) != total) {
      x_.fail("has " + std::to_string(x_.size(0)) + " rows, but the batch_sizes add up to " + std::to_string(total));
    }
  }

  void read_order(py::handle object) {
    const TensorView v = view_of(object, "order of rows");
    v.expect_dtype(dlpack::kInt, 64, "int64");
    v.expect_shape({steps.N});
    steps.order = v.data<const int64_t>();
    std::vector<bool> seen(size_t(steps.N), false);
    for (int64_t k = 0; k < steps.N; ++k) {
      const int64_t row = steps.order[k];
      if (row < 0 || row >= steps.N || seen[size_t(row)]) v.fail("must be a permutation of the batch");
      seen[size_t(row)] = true;
    }
  }

  void read_reset(py::handle object) {
    const TensorView v = view_of(object, "reset");
    v.expect_dtype(dlpack::kBool, 8, "bool");
    const int t = layer_.batch_first ? 1 : 0;
    if (v.tensor.ndim != 2 || v.size(t) != steps.T || v.size(1 - t) != steps.N) {
      v.fail("has shape " + shape_text(v.tensor.shape, v.tensor.ndim) + ", expected one flag per step and row");
    }
    steps.reset = v.data<const bool>();
    steps.reset_step = v.stride(t);
    steps.reset_row = v.stride(1 - t);
  }

  template <typename U>
  Rows<U> rows_of(const TensorView& v, int64_t features) const {
    if (steps.start) {
      v.expect_shape({steps.total, features});
      return {v.data<U>(), 0, v.stride(0)};
    }
    if (layer_.batch_first) {
      v.expect_shape({steps.N, steps.T, features});
      return {v.data<U>(), v.stride(1), v.stride(0)};
    }
    v.expect_shape({steps.T, steps.N, features});
    return {v.data<U>(), v.stride(0), v.stride(1)};
  }

  const T* vector(py::handle object, const char* name, int64_t size) {
    const TensorView v = float_view<T>(object, name);
    v.expect_shape({size});
    return v.data<const T>();
  }

  T* matrix(py::handle object, int64_t rows, int64_t width) {
    if (object.is_none()) return nullptr;
    const TensorView v = float_view<T>(object, "gradient");
    if (width) {
      v.expect_shape({rows, width});
    } else {
      v.expect_shape({rows});
    }
    return v.data<T>();
  }

  const Layer& layer_;
  TensorView x_;
  std::vector<int64_t> start_;
};

template <typename T>
void forward_of(const Layer& layer, py::handle x, py::handle h0, py::handle c0, const py::sequence& weights, py::handle y,
                py::handle hn, py::handle cn, const py::tuple& saved, py::handle steps, int threads, bool deterministic) {
  Operands<T> o(layer, x, steps);
  Forward<T> f;
  o.read_weights(weights, f.weights);
  const Sizes& z = o.sizes;
  f.x = o.input();
  f.h0 = o.template state<const T>(h0, "h_0", z.O);
  f.c0 = o.template state<const T>(c0, "c_0", z.H);
  f.y = o.template rows<T>(y, "output", z.D * z.O);
  f.hn = o.template state<T>(hn, "h_n", z.O);
  f.cn = o.template state<T>(cn, "c_n", z.H);
  const CellShape shape = cell_shape(z.cell);
  if (!f.hn.data || !f.y.data || (shape.cell_state && !f.cn.data)) {
    if (o.steps.N * z.O > 0) throw std::runtime_error("outputs must be given");
  }
  if (saved.size() == 3) {
    f.slots = o.buffer(saved[0], "slots", shape.slots * z.H);
    f.cells = o.buffer(saved[1], "cells", z.H);
    f.unprojected = o.buffer(saved[2], "unprojected", z.H);
  }
  f.sizes = z;
  f.steps = o.steps;
  const py::gil_scoped_release release;
  forward<T>(f, threads, deterministic);
}

template <typename T>
void backward_of(const Layer& layer, py::handle x, py::handle h0, py::handle c0, const py::sequence& weights, py::handle y,
                 const py::tuple& saved, const py::tuple& incoming, const py::tuple& workspace, const py::tuple& outgoing,
                 const py::sequence& gradients, py::handle steps, int threads, bool deterministic) {
  Operands<T> o(layer, x, steps);
  Backward<T> b;
  o.read_weights(weights, b.weights);
  const Sizes& z = o.sizes;
  const CellShape shape = cell_shape(z.cell);
  b.x = o.input();
  b.h0 = o.template state<const T>(h0, "h_0", z.O);
  b.c0 = o.template state<const T>(c0, "c_0", z.H);
  b.y = o.template rows<const T>(y, "output", z.D * z.O);
  b.slots = o.buffer(saved[0], "slots", shape.slots * z.H);
  b.cells = o.buffer(saved[1], "cells", z.H);
  b.unprojected = o.buffer(saved[2], "unprojected", z.H);
  b.dy = o.template rows<const T>(incoming[0], "gradient of the output", z.D * z.O);
  b.dhn = o.template state<const T>(incoming[1], "gradient of h_n", z.O);
  b.dcn = o.template state<const T>(incoming[2], "gradient of c_n", z.H);
  b.dslots = o.buffer(workspace[0], "gradient of the slots", shape.slots * z.H);
  b.dprojected = o.buffer(workspace[1], "gradient before the projection", z.O);
  b.dx = o.template rows<T>(outgoing[0], "gradient of the input", z.I);
  b.dh0 = o.template state<T>(outgoing[1], "gradient of h_0", z.O);
  b.dc0 = o.template state<T>(outgoing[2], "gradient of c_0", z.H);
  o.read_gradients(gradients, b.gradients);
  const bool empty = o.steps.total * z.H == 0;
  if (!empty && (!b.y.data || !b.dslots || (shape.saves_slots && !b.slots) || (shape.cell_state && !b.cells) ||
                 (z.projected && (!b.unprojected || !b.dprojected)))) {
    throw std::runtime_error("what forward saved must be given");
  }
  b.sizes = z;
  b.steps = o.steps;
  const py::gil_scoped_release release;
  backward<T>(b, threads, deterministic);
}

bool is_double(py::handle x) {
  const TensorView view = view_of(x, "input");
  if (view.tensor.dtype.code != dlpack::kFloat || (view.tensor.dtype.bits != 32 && view.tensor.dtype.bits != 64)) {
    view.fail("must be float32 or float64");
  }
  return view.tensor.dtype.bits == 64;
}

std::string describe_plan(const Layer& layer, int64_t T, int64_t N, int64_t I, int64_t H, int64_t O, int element_bytes,
                          int threads, bool deterministic, bool backward) {
  Problem problem;
  problem.sizes = {CellId(layer.cell), I, H, O, layer.directions, layer.projected};
  problem.T = T;
  problem.N = N;
  problem.total = T * N;
  problem.deterministic = deterministic;
  const Machine machine = machine_for(threads, element_bytes);
  return describe(backward ? plan_backward(problem, machine) : plan_forward(problem, machine), problem, machine);
}

std::vector<std::string> compiled_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : instruction_sets()) names.push_back(set.name);
  return names;
}

}  // namespace
}  // namespace rnnkern

PYBIND11_MODULE(_C, m) {
  using namespace rnnkern;
  bind_exchange_table();
  try {
    instruction_set();
  } catch (const std::runtime_error& error) {
    throw py::import_error(error.what());
  }
  py::class_<Layer>(m, "Layer", "What a layer is, apart from its sizes: cell, directions, bias, projection, layout.")
      .def(py::init<int, int, bool, bool, bool>(), py::arg("cell"), py::arg("directions"), py::arg("bias"),
           py::arg("projected"), py::arg("batch_first"));
  m.attr("GAPS") = kGaps;
  m.def("refusal", &refusal);
  m.def("forward",
        [](const Layer& layer, py::handle x, py::handle h0, py::handle c0, const py::sequence& weights, py::handle y,
           py::handle hn, py::handle cn, const py::tuple& saved, py::handle steps, int threads, bool deterministic) {
          (is_double(x) ? forward_of<double> : forward_of<float>)(layer, x, h0, c0, weights, y, hn, cn, saved, steps,
                                                                  threads, deterministic);
        });
  m.def("backward", [](const Layer& layer, py::handle x, py::handle h0, py::handle c0, const py::sequence& weights,
                       py::handle y, const py::tuple& saved, const py::tuple& incoming, const py::tuple& workspace,
                       const py::tuple& outgoing, const py::sequence& gradients, py::handle steps, int threads,
                       bool deterministic) {
    (is_double(x) ? backward_of<double> : backward_of<float>)(layer, x, h0, c0, weights, y, saved, incoming, workspace,
                                                              outgoing, gradients, steps, threads, deterministic);
  });
  m.def("describe_plan", &describe_plan);
  m.def("compiled_sets", &compiled_sets);
  m.def("instruction_set", [] { return std::string(instruction_set().name); });
#if defined(__VERSION__)
  m.attr("compiler") = "g++ " __VERSION__;
#endif
}
