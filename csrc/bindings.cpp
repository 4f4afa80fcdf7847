// The Python module rnnkern._C. The only file that knows Python: turns tensors into checked views,
// views into a scan, and releases the interpreter while it runs. Whatever does not fit raises
// Refused, a RuntimeError, before anything is written.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/kernels.h"
#include "dlpack_view.h"
#include "huge_pages.h"

namespace py = pybind11;

namespace rnnkern {
namespace {

const dlpack::ExchangeTable* exchange = nullptr;
PyTypeObject* tensor_type = nullptr;
PyTypeObject* parameter_type = nullptr;
// Methods of torch.Tensor, as plain functions of a tensor.
PyObject *is_neg = nullptr, *new_empty = nullptr, *new_empty_strided = nullptr;

// State of torch that no kernel can run in: a question of torch's own without arguments, true where
// it is so.
struct Mode {
  PyObject* question;
  const char* reason;
};
std::vector<Mode> modes;

void bind_modes() {
  const py::object core = py::module_::import("torch").attr("_C");
  const auto add = [&](const char* name, const char* reason) {
    modes.push_back({py::object(core.attr(name)).release().ptr(), reason});
  };
  add("_len_torch_dispatch_stack", "torch dispatch mode");
  add("_is_any_autocast_enabled", "autocast");
}

// Why no kernel may run in the present mode of torch, or null.
const char* mode_refusal() {
  for (const Mode& mode : modes) {
    const py::object answer = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(mode.question));
    if (!answer) throw py::error_already_set();
    if (PyObject_IsTrue(answer.ptr())) return mode.reason;
  }
  return nullptr;
}

void bind_exchange_table() {
  const py::object type = py::module_::import("torch").attr("Tensor");
  if (!py::hasattr(type, "__dlpack_c_exchange_api__")) {
    throw py::import_error("rnnkern needs torch >= 2.10: this torch has no DLPack exchange table");
  }
  const py::capsule capsule = type.attr("__dlpack_c_exchange_api__");
  const auto* table = static_cast<const dlpack::ExchangeTable*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (table && table->header.major != 1) {
    table = reinterpret_cast<const dlpack::ExchangeTable*>(table->header.previous);
  }
  if (!table || !table->view_of_object)
    throw py::import_error("this torch has no DLPack 1.x exchange table");
  exchange = table;
  tensor_type = reinterpret_cast<PyTypeObject*>(py::object(type).release().ptr());
  const py::object parameter = py::module_::import("torch.nn").attr("Parameter");
  parameter_type = reinterpret_cast<PyTypeObject*>(py::object(parameter).release().ptr());
  is_neg = py::object(type.attr("is_neg")).release().ptr();
  new_empty = py::object(type.attr("new_empty")).release().ptr();
  new_empty_strided = py::object(type.attr("new_empty_strided")).release().ptr();
}

TensorView view_of(py::handle object, const char* name) {
  if (!PyObject_TypeCheck(object.ptr(), tensor_type)) {
    throw Refused(std::string(name) + " must be a torch.Tensor, got " +
                  Py_TYPE(object.ptr())->tp_name);
  }
  TensorView view;
  view.name = name;
  if (exchange->view_of_object(object.ptr(), &view.tensor) != 0) {
    PyErr_Clear();
    view.fail("has no plain memory");
  }
  return view;
}

constexpr const char* kGaps = "gaps along the last axis";
constexpr const char* kNoMemory =
    "no plain memory behind a tensor (meta, sparse, quantized or wrapped)";

// Why no kernel covers this tensor, or null. `like` is the tensor whose dtype it must share.
const char* refusal_of(py::handle object, const TensorView* like, TensorView* view) {
  const PyTypeObject* type = Py_TYPE(object.ptr());
  if (type != tensor_type && type != parameter_type) return "tensor subclass";
  if (exchange->view_of_object(object.ptr(), &view->tensor) != 0) {
    PyErr_Clear();
    return kNoMemory;
  }
  const dlpack::Tensor& t = view->tensor;
  if (t.device.type != dlpack::kCpu) return "device other than cpu";
  if (t.dtype.code != dlpack::kFloat || (t.dtype.bits != 32 && t.dtype.bits != 64)) {
    return "dtype other than float32 and float64";
  }
  if (like && like->tensor.dtype.bits != t.dtype.bits) return "mixed dtypes";
  int64_t elements = 1;
  for (int i = 0; i < t.ndim; ++i) elements *= t.shape[i];
  if (elements && !t.data) return kNoMemory;
  const py::object negated =
      py::reinterpret_steal<py::object>(PyObject_CallOneArg(is_neg, object.ptr()));
  if (!negated) throw py::error_already_set();
  if (negated.ptr() == Py_True) return "lazily negated tensor";
  if (t.ndim && elements && t.shape[t.ndim - 1] > 1 && view->stride(t.ndim - 1) != 1) return kGaps;
  return nullptr;
}

// Why no kernel covers these tensors, or None; gaps only where nothing worse is found.
py::object refusal(py::handle x, py::handle h0, py::handle c0, const py::sequence& weights) {
  std::vector<py::object> all = {py::reinterpret_borrow<py::object>(x),
                                 py::reinterpret_borrow<py::object>(h0),
                                 py::reinterpret_borrow<py::object>(c0)};
  for (py::handle weight : weights) all.push_back(py::reinterpret_borrow<py::object>(weight));
  TensorView first, other;
  const char* gaps = nullptr;
  for (size_t i = 0; i < all.size(); ++i) {
    if (all[i].is_none()) continue;
    const char* reason = refusal_of(all[i], i ? &first : nullptr, i ? &other : &first);
    if (reason && reason != kGaps) return py::str(reason);
    if (reason) gaps = reason;
  }
  return gaps ? py::object(py::str(gaps)) : py::object(py::none());
}

// What a layer is, apart from its sizes.
struct Layer {
  int cell, directions;
  int64_t hidden, out;
  bool bias, projected, batch_first;

  int tensors() const { return 2 + 2 * bias + projected; }  // per direction
};

// A view of an operand that a kernel covers; the caller finds out with `refusal` why one is not.
template <typename T>
TensorView float_view(py::handle object, const char* name, bool allow_gaps = false) {
  TensorView view;
  view.name = name;
  if (!PyObject_TypeCheck(object.ptr(), tensor_type)) {
    throw py::type_error(std::string(name) + " must be a torch.Tensor, got " +
                         Py_TYPE(object.ptr())->tp_name);
  }
  const char* reason = refusal_of(object, nullptr, &view);
  if (reason && !(allow_gaps && reason == kGaps))
    view.fail(std::string("is not covered: ") + reason);
  if (view.tensor.dtype.bits != 8 * sizeof(T)) view.fail("has another dtype than the input");
  return view;
}

// The operands of one scan, checked against each other as they are read.
template <typename T>
class Operands {
 public:
  Operands(const Layer& layer, py::handle x, py::handle steps)
      : layer_(layer), object_(x), x_(float_view<T>(x, "input")) {
    if (layer.cell < 0 || layer.cell > int(CellId::kGru) || layer.directions < 1 ||
        layer.directions > kMaxDirections) {
      throw Refused("unknown layer");
    }
    read_steps(steps);
    sizes.cell = CellId(layer.cell);
    sizes.D = layer.directions;
    sizes.H = layer.hidden;
    sizes.O = layer.out;
    sizes.projected = layer.projected;
    sizes.I = x_.size(x_.tensor.ndim - 1);
  }

  Sizes sizes;
  Steps steps;

  void read_weights(const py::sequence& list, Weights<T>* out) {
    if (int(list.size()) != layer_.directions * layer_.tensors()) {
      throw Refused("expected " + std::to_string(layer_.directions * layer_.tensors()) +
                    " weights, got " + std::to_string(list.size()));
    }
    const int gates = cell_shape(sizes.cell).gates;
    for (int d = 0, i = 0; d < layer_.directions; ++d) {
      const TensorView w_ih = float_view<T>(list[i++], "weight_ih"),
                       w_hh = float_view<T>(list[i++], "weight_hh");
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

  // As rows, but the last axis may be expanded from one element, as in the gradient of a sum.
  Rows<const T> incoming_rows(py::handle object, const char* name, int64_t features,
                              bool* uniform) {
    if (object.is_none()) return {};
    const TensorView v = float_view<T>(object, name, true);
    const int64_t stride = v.tensor.ndim ? v.stride(v.tensor.ndim - 1) : 1;
    *uniform = features > 1 && stride == 0;
    if (features > 1 && stride > 1 && steps.total) v.fail(std::string("is not covered: ") + kGaps);
    return rows_of<const T>(v, features);
  }

  template <typename U>
  State<U> state(py::handle object, const char* name, int64_t features) {
    if (object.is_none()) return {};
    const TensorView v = float_view<T>(object, name);
    v.expect_shape({sizes.D, steps.N, features});
    return {v.data<U>(), v.stride(0), v.stride(1)};
  }

  // A new tensor like the input, uninitialised.
  py::object empty(std::initializer_list<int64_t> shape) const {
    PyObject* arguments[5] = {object_.ptr()};
    py::object owned[4];
    size_t count = 1;
    for (int64_t size : shape) {
      owned[count - 1] = py::int_(size);
      arguments[count] = owned[count - 1].ptr();
      ++count;
    }
    PyObject* result = PyObject_Vectorcall(new_empty, arguments, count, nullptr);
    if (!result) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
  }
  // Time first in memory also where the batch is the first axis: as torch.nn's outputs lie, so that
  // views of them work.
  py::object empty_rows(int64_t features) const {
    if (steps.start) return empty({steps.total, features});
    if (!layer_.batch_first) return empty({steps.T, steps.N, features});
    const py::tuple shape = py::make_tuple(steps.N, steps.T, features);
    const py::tuple strides = py::make_tuple(features, steps.N * features, 1);
    PyObject* arguments[3] = {object_.ptr(), shape.ptr(), strides.ptr()};
    PyObject* result = PyObject_Vectorcall(new_empty_strided, arguments, 3, nullptr);
    if (!result) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
  }
  py::object empty_state(int64_t features) const { return empty({sizes.D, steps.N, features}); }

  // What forward saves is one dense buffer of slots [D, total, S*H], cell states [D, total, H] and,
  // where there is a projection, hidden states before it [D, total, H].
  struct Saved {
    int64_t slots = 0, cells = 0, unprojected = 0;  // elements
    int64_t elements() const { return slots + cells + unprojected; }
  };
  Saved saved() const {
    const CellShape shape = cell_shape(sizes.cell);
    const int64_t one = sizes.D * steps.total * sizes.H;
    return {shape.saves_slots * shape.slots * one, shape.cell_state * one, sizes.projected * one};
  }

  // What was saved, as autograd hands it back: hooks may have made another tensor of it.
  T* saved_data(py::handle object, int64_t elements) const {
    const TensorView v = float_view<T>(object, "what forward saved");
    v.expect_shape({elements});
    return v.data<T>();
  }

  // A dense one-dimensional buffer of that many elements, made here.
  T* dense(py::handle object, const char* name, int64_t elements) const {
    const TensorView v = new_view(object, name);
    v.expect_shape({elements});
    return v.data<T>();
  }

  Rows<T> new_rows(py::handle object, int64_t features) {
    return rows_of<T>(new_view(object, "output"), features);
  }
  State<T> new_state(py::handle object) {
    const TensorView v = new_view(object, "final state");
    return {v.data<T>(), v.stride(0), v.stride(1)};
  }

  // Makes the gradients of the weights that are wanted, in the order of the weights.
  void make_gradients(const py::sequence& wanted, size_t first, py::list* made,
                      WeightGradients<T>* out) const {
    const int64_t rows = cell_shape(sizes.cell).gates * sizes.H;
    size_t i = first;
    const auto make = [&](std::initializer_list<int64_t> shape) -> T* {
      if (!wanted[i++].template cast<bool>()) {
        made->append(py::none());
        return nullptr;
      }
      made->append(empty(shape));
      return new_view((*made)[made->size() - 1], "gradient").template data<T>();
    };
    for (int d = 0; d < layer_.directions; ++d) {
      out[d].w_ih = make({rows, sizes.I});
      out[d].w_hh = make({rows, sizes.O});
      if (layer_.bias) {
        out[d].b_ih = make({rows});
        out[d].b_hh = make({rows});
      }
      if (layer_.projected) out[d].w_hr = make({sizes.O, sizes.H});
    }
  }

 private:
  // steps: None, or (active, order, reset, packed), each tensor or None.
  void read_steps(py::handle object) {
    const bool packed = !object.is_none() &&
                        py::cast<bool>(py::tuple(py::reinterpret_borrow<py::object>(object))[3]);
    const int dims = packed ? 2 : 3;
    if (x_.tensor.ndim != dims)
      x_.fail("has " + std::to_string(x_.tensor.ndim) + " axes, expected " + std::to_string(dims));
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
      x_.fail("has " + std::to_string(x_.size(0)) + " rows, but the batch_sizes add up to " +
              std::to_string(total));
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
      if (row < 0 || row >= steps.N || seen[size_t(row)])
        v.fail("must be a permutation of the batch");
      seen[size_t(row)] = true;
    }
  }

  void read_reset(py::handle object) {
    const TensorView v = view_of(object, "reset");
    v.expect_dtype(dlpack::kBool, 8, "bool");
    const int t = layer_.batch_first ? 1 : 0;
    if (v.tensor.ndim != 2 || v.size(t) != steps.T || v.size(1 - t) != steps.N) {
      v.fail("has shape " + shape_text(v.tensor.shape, v.tensor.ndim) +
             ", expected one flag per step and row");
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

  // A view of a tensor that was made here: nothing can be wrong with it.
  static TensorView new_view(py::handle object, const char* name) {
    const TensorView v = view_of(object, name);
    size_t bytes = sizeof(T);
    for (int i = 0; i < v.tensor.ndim; ++i) bytes *= size_t(v.size(i));
    advise_huge_pages(v.data<T>(), bytes);
    return v;
  }

  const Layer& layer_;
  py::handle object_;
  TensorView x_;
  std::vector<int64_t> start_;
};

// (output, h_n, c_n or None, what backward needs or None)
template <typename T>
py::tuple forward_of(const Layer& layer, py::handle x, py::handle h0, py::handle c0,
                     const py::sequence& weights, py::handle steps, bool training, int threads,
                     bool deterministic) {
  if (const char* reason = mode_refusal())
    throw Refused(std::string("no kernel may run: ") + reason);
  Operands<T> o(layer, x, steps);
  Forward<T> f;
  o.read_weights(weights, f.weights);
  const Sizes& z = o.sizes;
  if (o.steps.T == 0) throw Refused("the sequence has no steps");
  f.x = o.input();
  f.h0 = o.template state<const T>(h0, "h_0", z.O);
  f.c0 = o.template state<const T>(c0, "c_0", z.H);
  py::object y = o.empty_rows(z.D * z.O), hn = o.empty_state(z.O), cn = py::none(),
             saved = py::none();
  f.y = o.new_rows(y, z.D * z.O);
  f.hn = o.new_state(hn);
  if (cell_shape(z.cell).cell_state) {
    cn = o.empty_state(z.H);
    f.cn = o.new_state(cn);
  }
  const auto parts = o.saved();
  if (training && parts.elements()) {
    saved = o.empty({parts.elements()});
    T* data = o.dense(saved, "saved", parts.elements());
    if (parts.slots) f.slots = data;
    if (parts.cells) f.cells = data + parts.slots;
    if (parts.unprojected) f.unprojected = data + parts.slots + parts.cells;
  }
  f.sizes = z;
  f.steps = o.steps;
  {
    const py::gil_scoped_release release;
    forward<T>(f, threads, deterministic);
  }
  return py::make_tuple(std::move(y), std::move(hn), std::move(cn), std::move(saved));
}

// Gradients of x, h_0, c_0 and the weights, None where not wanted. With `overwrite` the gradients
// of the gates take the place of what was saved.
template <typename T>
py::list backward_of(const Layer& layer, py::handle x, py::handle h0, py::handle c0,
                     const py::sequence& weights, py::handle y, py::handle saved, py::handle dy,
                     py::handle dhn, py::handle dcn, const py::sequence& wanted, bool overwrite,
                     py::handle steps, int threads, bool deterministic) {
  Operands<T> o(layer, x, steps);
  Backward<T> b;
  o.read_weights(weights, b.weights);
  const Sizes& z = o.sizes;
  if (wanted.size() != 3 + weights.size()) throw Refused("wanted: one flag per input and weight");
  b.x = o.input();
  b.h0 = o.template state<const T>(h0, "h_0", z.O);
  b.c0 = o.template state<const T>(c0, "c_0", z.H);
  b.y = o.template rows<const T>(y, "output", z.D * z.O);
  b.dy = o.incoming_rows(dy, "gradient of the output", z.D * z.O, &b.dy_uniform);
  b.dhn = o.template state<const T>(dhn, "gradient of h_n", z.O);
  b.dcn = o.template state<const T>(dcn, "gradient of c_n", z.H);
  const auto parts = o.saved();
  T* data = parts.elements() ? o.saved_data(saved, parts.elements()) : nullptr;
  if (parts.slots) b.slots = data;
  if (parts.cells) b.cells = data + parts.slots;
  if (parts.unprojected) b.unprojected = data + parts.slots + parts.cells;

  const int64_t rows = z.D * o.steps.total, dslots = rows * cell_shape(z.cell).slots * z.H;
  py::object workspace, dprojected;
  if (overwrite && parts.slots) {
    b.dslots = data;
  } else {
    workspace = o.empty({dslots});
    b.dslots = o.dense(workspace, "workspace", dslots);
  }
  if (z.projected) {
    dprojected = o.empty({rows * z.O});
    b.dprojected = o.dense(dprojected, "workspace", rows * z.O);
  }
  py::list made;
  const auto make_state = [&](int i, py::handle given, int64_t features) -> State<T> {
    if (given.is_none() || !wanted[size_t(i)].cast<bool>()) {
      made.append(py::none());
      return {};
    }
    made.append(o.empty_state(features));
    return o.new_state(made[size_t(i)]);
  };
  made.append(wanted[0].cast<bool>() ? o.empty_rows(z.I) : py::object(py::none()));
  if (wanted[0].cast<bool>()) b.dx = o.new_rows(made[0], z.I);
  b.dh0 = make_state(1, h0, z.O);
  b.dc0 = make_state(2, c0, z.H);
  o.make_gradients(wanted, 3, &made, b.gradients);
  b.sizes = z;
  b.steps = o.steps;
  {
    const py::gil_scoped_release release;
    backward<T>(b, threads, deterministic);
  }
  return made;
}

// Only picks the instantiation: what else may be wrong with the input is found there.
bool is_double(py::handle x) {
  const PyTypeObject* type = Py_TYPE(x.ptr());
  if (type != tensor_type && type != parameter_type)
    throw Refused("input is not covered: tensor subclass");
  return view_of(x, "input").tensor.dtype.bits == 64;
}

std::string describe_plan(const Layer& layer, int64_t T, int64_t N, int64_t total, int64_t I,
                          int element_bytes, int threads, bool deterministic, bool backward) {
  Problem problem;
  problem.sizes = {CellId(layer.cell), I, layer.hidden, layer.out, layer.directions,
                   layer.projected};
  problem.T = T;
  problem.N = N;
  problem.total = total;
  problem.deterministic = deterministic;
  const InstructionSet& set = instruction_set_for(layer.hidden, element_bytes);
  const Machine machine = machine_for(set, threads, element_bytes);
  const Plan plan = backward ? plan_backward(problem, machine) : plan_forward(problem, machine);
  return std::string(set.name) + ", " + describe(plan, problem, machine);
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
  bind_modes();
  try {
    instruction_set();
  } catch (const std::runtime_error& error) {
    throw py::import_error(error.what());
  }
  py::register_exception<Refused>(m, "RefusedError", PyExc_RuntimeError);
  py::class_<Layer>(m, "Layer", "What a layer is, apart from the sizes of its input.")
      .def(py::init<int, int, int64_t, int64_t, bool, bool, bool>(), py::arg("cell"),
           py::arg("directions"), py::arg("hidden"), py::arg("out"), py::arg("bias"),
           py::arg("projected"), py::arg("batch_first"));
  m.attr("GAPS") = kGaps;
  m.def("refusal", &refusal);
  m.def("mode_refusal", &mode_refusal);
  m.def("forward", [](const Layer& layer, py::handle x, py::handle h0, py::handle c0,
                      const py::sequence& weights, py::handle steps, bool training, int threads,
                      bool deterministic) {
    return (is_double(x) ? forward_of<double> : forward_of<float>)(layer, x, h0, c0, weights, steps,
                                                                   training, threads,
                                                                   deterministic);
  });
  m.def("backward", [](const Layer& layer, py::handle x, py::handle h0, py::handle c0,
                       const py::sequence& weights, py::handle y, py::handle saved, py::handle dy,
                       py::handle dhn, py::handle dcn, const py::sequence& wanted, bool overwrite,
                       py::handle steps, int threads, bool deterministic) {
    return (is_double(x) ? backward_of<double>
                         : backward_of<float>)(layer, x, h0, c0, weights, y, saved, dy, dhn, dcn,
                                               wanted, overwrite, steps, threads, deterministic);
  });
  m.def("describe_plan", &describe_plan);
  m.def("compiled_sets", &compiled_sets);
  m.def("instruction_set", [] { return std::string(instruction_set().name); });
#if defined(__clang__)
  m.attr("compiler") = __VERSION__;
#else
  m.attr("compiler") = "g++ " __VERSION__;
#endif
}
