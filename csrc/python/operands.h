// The operands of one scan: tensors turned into checked views. Whatever does not fit raises Refused
// before anything is written.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "cuda/kernels.h"
#include "python/layer.h"
#include "python/lazy_copies.h"
#include "python/new_tensor.h"
#include "python/torch.h"
#include "scan.h"

namespace rnnkern {

inline TensorView view_of(py::handle object, const char* name) {
  if (!PyObject_TypeCheck(object.ptr(), api.tensor)) {
    throw Refused(std::string(name) + " must be a torch.Tensor, got " +
                  Py_TYPE(object.ptr())->tp_name);
  }
  TensorView view;
  view.name = name;
  if (api.exchange->view_of_object(object.ptr(), &view.tensor) != 0) {
    PyErr_Clear();
    view.fail("has no plain memory");
  }
  return view;
}

constexpr const char* kGaps = "gaps along the last axis, or overlapping rows";
constexpr const char* kNegated = "lazily negated tensor";
constexpr const char* kNoMemory =
    "no plain memory behind a tensor (meta, sparse, quantized or wrapped)";

// The mode of torch comes before the view: if a transform has wrapped x, torch takes a millisecond
// to refuse one.
inline bool may_be_viewed(py::handle x) { return is_tensor(x) && !mode_refusal(); }

// Calls f(T{}) for elements T of this dtype. If no kernel knows them, returns a false value of the
// type that f returns.
template <typename F>
auto with_element(dlpack::DataType dtype, F f) {
  if (dtype == dlpack::kDataType<float>) return f(float{});
  if (dtype == dlpack::kDataType<double>) return f(double{});
  if (dtype == dlpack::kDataType<Bf16>) return f(Bf16{});
  if (dtype == dlpack::kDataType<F16>) return f(F16{});
  return decltype(f(float{})){};
}

constexpr dlpack::Device kHost = {dlpack::kCpu, 0};

// Why there are no kernels for tensors of this device, or null.
inline const char* refusal_of(dlpack::Device device) {
  if (device.type == dlpack::kCpu) return nullptr;
  return device.type == dlpack::kCuda ? cuda::refusal(device.id) : "device other than cpu and cuda";
}

// Why no kernel covers this tensor, or null. `like` is the tensor whose dtype it must share.
inline const char* refusal_of(py::handle object, const TensorView* like, TensorView* view) {
  if (!is_tensor(object)) return "tensor subclass";
  if (api.exchange->view_of_object(object.ptr(), &view->tensor) != 0) {
    PyErr_Clear();
    return kNoMemory;
  }
  const dlpack::Tensor& t = view->tensor;
  if (const char* reason = refusal_of(t.device)) return reason;
  if (!with_element(t.dtype, [](auto) { return true; })) {
    return "dtype other than float32, float64, bfloat16 and float16";
  }
  if (like && like->tensor.dtype != t.dtype) return "mixed dtypes";
  if (like && like->tensor.device != t.device) return "tensors on different devices";
  int64_t elements = 1;
  for (int i = 0; i < t.ndim; ++i) elements *= t.shape[i];
  if (elements && !t.data) return kNoMemory;
  if (is_so(api.is_neg, object)) return kNegated;
  if (t.ndim && elements && t.shape[t.ndim - 1] > 1 && view->stride(t.ndim - 1) != 1) return kGaps;
  // Rows of a matrix may overlap, or be one row for all, unless a library multiplies them.
  if ((t.device.type != dlpack::kCpu || cuda::kIsStandIn) && t.ndim == 2 && t.shape[0] > 1 &&
      view->stride(0) < t.shape[1]) {
    return kGaps;
  }
  return nullptr;
}

// A view of an operand, which must be one that a kernel covers; `refusal` tells the caller why one
// is not. If `gaps` is given, the operand may have gaps, and `gaps` says whether it has.
template <typename T>
TensorView float_view(py::handle object, const char* name, bool* gaps = nullptr) {
  TensorView view;
  view.name = name;
  if (!PyObject_TypeCheck(object.ptr(), api.tensor)) {
    throw py::type_error(std::string(name) + " must be a torch.Tensor, got " +
                         Py_TYPE(object.ptr())->tp_name);
  }
  const char* reason = refusal_of(object, nullptr, &view);
  if (gaps) *gaps = reason == kGaps;
  if (reason && !(gaps && *gaps)) view.fail(std::string("is not covered: ") + reason);
  if (view.tensor.dtype != dlpack::kDataType<T>) view.fail("has another dtype than the input");
  return view;
}

// The weights of all directions of a layer that reads I features: `list` has size() and []. With
// `may_miss`, None means zeros.
template <typename T, typename List>
void read_weights(const Layer& layer, int64_t I, dlpack::Device device, const List& list,
                  Weights<T>* out, bool may_miss = false) {
  if (int(list.size()) != layer.directions * layer.tensors()) {
    throw Refused("expected " + std::to_string(layer.directions * layer.tensors()) +
                  " weights, got " + std::to_string(list.size()));
  }
  size_t i = 0;
  const auto next = [&](const char* name, std::initializer_list<int64_t> shape, const T** data,
                        int64_t* row) {
    const py::handle weight = list[i++];
    if (may_miss && weight.is_none()) return;
    const TensorView v = float_view<T>(weight, name);
    v.expect_device(device);
    v.expect_shape(shape);
    *data = v.template data<const T>();
    if (row) *row = v.size(0) > 1 ? v.stride(0) : v.size(1);
  };
  const CellShape shape = known_shape(layer.cell);
  const int64_t rows = shape.gates * layer.hidden;
  const AddedCell* const added = added_cells().at(layer.cell);
  for (int d = 0; d < layer.directions; ++d) {
    Weights<T>& w = out[d];
    next("weight_ih", {rows, I}, &w.w_ih, &w.w_ih_row);
    if (shape.recurrent) next("weight_hh", {rows, layer.out}, &w.w_hh, &w.w_hh_row);
    if (layer.bias) {
      next("bias_ih", {rows}, &w.b_ih, nullptr);
      if (shape.recurrent) next("bias_hh", {rows}, &w.b_hh, nullptr);
    }
    if (layer.projected) next("weight_hr", {layer.out, layer.hidden}, &w.w_hr, &w.w_hr_row);
    for (int k = 0; k < shape.parameters; ++k) {
      const char* name = added ? added->parameters[size_t(k)].c_str() : "parameter of the cell";
      next(name, {layer.hidden}, &w.parameters[k], nullptr);
    }
  }
}

// Raises Refused if there are no kernels of T for the cell, which Python may have to load first.
template <typename T>
void expect_kernels(CellId id, dlpack::Device device) {
  const AddedCell* const added = added_cells().at(id);
  if (!added) return;
  constexpr int kPlace = place_of_element<T>();
  const bool on_gpu = device.type != dlpack::kCpu || cuda::kIsStandIn;
  if (on_gpu && device.id >= kMostDevices) {
    throw Refused("a cell of its own runs on the first " + std::to_string(kMostDevices) + " GPUs");
  }
  const std::atomic<const void*>& loaded =
      on_gpu ? added->cuda_libraries[kPlace][size_t(device.id)] : added->kernels[kPlace];
  if (loaded.load(std::memory_order_acquire)) return;
  if (!api.load_kernels) throw Refused("nothing loads the kernels of cells");
  const py::object why = py::reinterpret_borrow<py::object>(api.load_kernels)(
      added->mode, kElementNames[kPlace], on_gpu ? device.id : -1);
  if (!why.is_none()) throw Refused(why.cast<std::string>());
}

// The operands of one scan, checked against each other as they are read.
template <typename T>
class Operands {
 public:
  Operands(const Layer& layer, py::handle x, py::handle steps)
      : deterministic(is_so(api.deterministic)),
        layer_(layer),
        object_(x),
        x_(float_view<T>(x, "input")),
        of_a_cell_(layer.is_cell && (x_.tensor.ndim == 1 || x_.tensor.ndim == 2)) {
    expect_kernels<T>(layer.cell, x_.tensor.device);
    read_steps(steps);
    sizes.cell = layer.cell;
    sizes.D = layer.directions;
    sizes.H = layer.hidden;
    sizes.O = layer.out;
    sizes.projected = layer.projected;
    sizes.I = x_.size(x_.tensor.ndim - 1);
  }

  const bool deterministic;  // torch.use_deterministic_algorithms
  Sizes sizes;
  Steps steps;

  dlpack::Device device() const { return x_.tensor.device; }
  // The output of a cell is its state as well: one tensor.
  bool of_a_cell() const { return of_a_cell_; }
  const Layer& layer() const { return layer_; }

  // `list` has size() and []. With `may_miss`, None means zeros.
  template <typename List>
  void read_weights(const List& list, Weights<T>* out, bool may_miss = false) {
    rnnkern::read_weights(layer_, sizes.I, device(), list, out, may_miss);
  }

  void expect_cpu(const char* what) const {
    if (device().type == dlpack::kCpu && !cuda::kIsStandIn) return;
    x_.fail(std::string("is not covered: ") + what + " on a GPU");
  }

  Rows<const T> input() { return rows_of<const T>(x_, sizes.I); }

  Readout<T> readout(py::handle w, py::handle b, py::handle made) {
    expect_cpu("a closed loop");
    Readout<T> r;
    const TensorView weight = view(w, "weight of the readout");
    weight.expect_shape({sizes.I, sizes.O});
    r.w = weight.template data<const T>();
    r.row = weight.stride(0);
    if (!b.is_none()) {
      const TensorView bias = view(b, "bias of the readout");
      bias.expect_shape({sizes.I});
      r.b = bias.template data<const T>();
    }
    r.made = rows<T>(made, "inputs made", sizes.I);
    return r;
  }

  template <typename U>
  Rows<U> rows(py::handle object, const char* name, int64_t features) {
    if (object.is_none()) return {};
    return rows_of<U>(view(object, name), features);
  }

  // The same for a gradient. Its last axis may be expanded from one element, as in the gradient of
  // a sum.
  Rows<const T> incoming_rows(py::handle object, const char* name, int64_t features,
                              bool* uniform) {
    if (object.is_none()) return {};
    bool gaps = false;
    const TensorView v = view(object, name, &gaps);
    const int64_t stride = v.tensor.ndim ? v.stride(v.tensor.ndim - 1) : 1;
    *uniform = features > 1 && stride == 0;
    if (features > 1 && stride > 1 && steps.total) {
      return rows_of<const T>(view(dense_copy(object), name), features);
    }
    return rows_of<const T>(v, features);
  }

  template <typename U>
  State<U> state(py::handle object, const char* name, int64_t features) const {
    if (object.is_none()) return {};
    return state_of<U>(view(object, name), features);
  }

  // The same for a gradient. If it has gaps, as the gradient of a sum has, a dense copy is read.
  State<const T> incoming_state(py::handle object, const char* name, int64_t features) {
    if (object.is_none()) return {};
    bool gaps = false;
    const TensorView v = view(object, name, &gaps);
    if (!gaps) return state_of<const T>(v, features);
    return state<const T>(dense_copy(object), name, features);
  }

  State<const T> initial_cell(py::handle c0) {
    if (!c0.is_none() && !layer_.has_cell_state()) throw Refused("c_0 is of LSTMs alone");
    return state<const T>(c0, "c_0", layer_.cell_width());
  }

  // New tensors like the input. Each function also hands out a pointer to the memory.
  template <typename U = T>
  py::object make(const Shape& shape, U** data) const {
    NewTensor made = new_tensor(object_, device(), shape, dlpack::kDataType<T>, deterministic);
    *data = static_cast<T*>(made.data);
    return std::move(made.object);
  }
  py::object make_rows(int64_t features, Rows<T>* out) const {
    out->row = features;
    out->step = steps.is_packed() ? 0 : steps.N * features;
    return make(rows_shape(features), &out->data);
  }
  // The rows of make_rows as they are now, whatever becomes of `made`.
  py::object keep_rows(const py::object& made, const Rows<T>& rows, int64_t features) const {
    return lazy_copy(made, rows.data, device(), dlpack::kDataType<T>, rows_shape(features));
  }
  // Whether there are so few rows that copying them takes less time than `keep_rows`.
  bool are_few_rows(int64_t features) const {
    return is_small(device(), rows_shape(features), dlpack::kDataType<T>, deterministic);
  }
  // Rows with the memory layout of those of make_rows.
  Rows<const T> rows_at(const T* data, int64_t features) const {
    return {data, steps.is_packed() ? 0 : steps.N * features, features};
  }
  py::object make_state(int64_t features, State<T>* out) const {
    out->row = features;
    out->direction = steps.N * features;
    return make(of_a_cell_ ? rows_shape(features) : dense({sizes.D, steps.N, features}),
                &out->data);
  }

  const T* vector(py::handle object, const char* name, int64_t size) const {
    const TensorView v = view(object, name);
    v.expect_shape({size});
    return v.template data<const T>();
  }

  // What forward saves is one dense buffer: slots [D, total, S*H], cell states [D, total, H], with
  // zoneout cell states before it [D, total, H], hidden states before a projection or zoneout [D,
  // total, H], what normalisation has made [D, total, normalised_width], and a copy of the output,
  // if it is small and its caller may change it.
  struct Saved {
    int64_t slots = 0, cells = 0, candidates = 0, unprojected = 0, normalised = 0;  // elements
    int64_t output = 0;
    int64_t before_unprojected() const { return slots + cells + candidates; }
    int64_t before_normalised() const { return before_unprojected() + unprojected; }
    int64_t before_output() const { return before_normalised() + normalised; }
    int64_t elements() const { return before_output() + output; }

    // Points the fields of a pass to the parts.
    template <typename Scan, typename U>
    void place(U* data, Scan* scan) const {
      if (slots) scan->slots = data;
      if (cells) scan->cells = data + slots;
      if (candidates) scan->candidates = data + slots + cells;
      if (unprojected) scan->unprojected = data + before_unprojected();
      if (normalised) scan->normalised = data + before_normalised();
    }
  };
  Saved saved(bool with_output = false, bool with_zoneout = false) const {
    const CellShape shape = known_shape(sizes.cell);
    const int64_t one = sizes.D * steps.total * sizes.H;
    // Backward reads h only if there are no slots.
    const bool keeps_h = sizes.projected || (with_zoneout && !shape.saves_slots);
    return {.slots = shape.saves_slots * shape.stored() * one,
            .cells = shape.planes() * one,
            .candidates = with_zoneout * shape.planes() * one,
            .unprojected = keeps_h * one,
            .normalised =
                sizes.normalised * sizes.D * steps.total * normalised_width<T>(shape, sizes.H),
            .output = with_output ? sizes.D * steps.total * sizes.O : 0};
  }

  // What forward saved: bytes or a tensor. A hook may have replaced the tensor.
  T* saved_data(py::handle object, int64_t elements) const {
    if (PyByteArray_CheckExact(object.ptr())) {
      if (PyByteArray_GET_SIZE(object.ptr()) != elements * int64_t(sizeof(T))) {
        throw Refused("what forward saved has another size");
      }
      return reinterpret_cast<T*>(PyByteArray_AS_STRING(object.ptr()));
    }
    const TensorView v = view(object, "what forward saved");
    v.expect_shape({elements});
    return v.data<T>();
  }

  // A dense tensor [D, total, S*H], or null for None.
  const T* slots_data(py::handle object, const char* name) const {
    if (object.is_none()) return nullptr;
    const TensorView v = view(object, name);
    const Shape wanted = slots_shape();
    v.expect_shape({wanted.sizes[0], wanted.sizes[1], wanted.sizes[2]});
    for (int i = 0; i < wanted.axes; ++i) {
      if (v.size(i) > 1 && v.stride(i) != wanted.strides[i]) v.fail("is not dense");
    }
    return v.data<const T>();
  }
  // Memory of the graph alone. If it is small it is a bytearray, which is made faster than a tensor
  // (`rnnkern.autograd` makes one of it if somebody wants to see it).
  py::object make_saved(int64_t elements, bool may_be_bytes, T** data) const {
    const Shape shape = dense({elements});
    if (!may_be_bytes || !is_small(device(), shape, dlpack::kDataType<T>, deterministic)) {
      return make(shape, data);
    }
    PyObject* made = PyByteArray_FromStringAndSize(nullptr, elements * int64_t(sizeof(T)));
    if (!made) throw py::error_already_set();
    *data = reinterpret_cast<T*>(PyByteArray_AS_STRING(made));
    return py::reinterpret_steal<py::object>(made);
  }
  py::object make_slots(T** data) const { return make(slots_shape(), data); }

  // Appends the gradients of the weights to `made`, in the order of the weights: new tensors, or
  // None for those that are not wanted. is_wanted(i) is about entry i of `made`. If there are
  // `sums`, the gradients are added to these, and None is appended.
  template <typename IsWanted>
  void make_gradients(IsWanted is_wanted, const py::sequence& sums, py::list* made,
                      WeightGradients<T>* out) const {
    const CellShape shape = known_shape(sizes.cell);
    const int64_t rows = shape.gates * sizes.H;
    size_t next = 0;
    const auto add = [&](std::initializer_list<int64_t> shape) -> T* {
      T* data = nullptr;
      const size_t i = next++;
      const bool wanted = is_wanted(made->size());
      if (!wanted || sums.size() == 0) {
        made->append(wanted ? make(dense(shape), &data) : py::none());
        return data;
      }
      made->append(py::none());
      const py::object sum = sums[i];
      const TensorView v = view(sum, "sum of gradients");
      v.expect_shape(shape);
      if (v.tensor.ndim == 2 && v.size(0) > 1 && v.stride(0) != v.size(1)) v.fail("is not dense");
      return v.template data<T>();
    };
    for (int d = 0; d < layer_.directions; ++d) {
      out[d].w_ih = add({rows, sizes.I});
      if (shape.recurrent) out[d].w_hh = add({rows, sizes.O});
      if (layer_.bias) {
        out[d].b_ih = add({rows});
        if (shape.recurrent) out[d].b_hh = add({rows});
      }
      if (layer_.projected) out[d].w_hr = add({sizes.O, sizes.H});
      for (int k = 0; k < shape.parameters; ++k) {
        out[d].parameters[k] = add({sizes.H});
      }
    }
  }

  Shape rows_shape(int64_t features) const {
    if (of_a_cell_ && x_.tensor.ndim == 1) return dense({features});
    if (of_a_cell_ || steps.is_packed()) return dense({steps.total, features});
    Shape shape = dense({steps.T, steps.N, features});
    // Time is the first axis in memory even if the batch is the first axis of the shape. torch.nn's
    // outputs have this layout, and so views of them work here too.
    if (layer_.batch_first) {
      std::swap(shape.sizes[0], shape.sizes[1]);
      std::swap(shape.strides[0], shape.strides[1]);
    }
    return shape;
  }

 private:
  TensorView view(py::handle object, const char* name, bool* gaps = nullptr) const {
    const TensorView v = float_view<T>(object, name, gaps);
    v.expect_device(device());
    return v;
  }

  // Integers of Steps, which must be on the device `where`.
  TensorView index_view(py::handle object, const char* name, dlpack::Device where) const {
    const TensorView v = view_of(object, name);
    v.expect_device(where);
    v.expect_dtype({dlpack::kInt, 64, 1}, "int64");
    return v;
  }

  // steps: None, or (active, order, reset, packed, placed), the first fields of sequence.Steps.
  void read_steps(py::handle object) {
    if (of_a_cell_) {
      steps.T = 1;
      steps.N = steps.total = x_.tensor.ndim == 1 ? 1 : x_.size(0);
      return;
    }
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
    if (packed) {
      read_batch_sizes(parts[0], parts[4]);
    } else if (!parts[0].is_none()) {
      read_active(parts[0]);
    }
    if (!parts[1].is_none()) read_order(parts[1]);
    if (!parts[2].is_none()) read_reset(parts[2]);
  }

  void check_active(const TensorView& v) const {
    const auto* active = v.data<const int64_t>();
    for (int64_t t = 0; t < steps.T; ++t) {
      if (active[t] < 0 || active[t] > (t ? active[t - 1] : steps.N)) {
        v.fail("must not increase, nor be negative");
      }
    }
  }

  // On a GPU they are not checked, because the CPU would have to wait for them. sequence.py has
  // made them.
  void read_active(py::handle object) {
    const TensorView v = index_view(object, "active rows", device());
    v.expect_shape({steps.T});
    if (device().type == dlpack::kCpu) check_active(v);
    steps.active = v.data<const int64_t>();
  }

  // The batch sizes of a packed sequence are on the CPU. `placed` has them on another device, with
  // the row at which each step begins.
  void read_batch_sizes(py::handle object, py::handle placed) {
    const TensorView v = index_view(object, "batch_sizes", kHost);
    if (v.tensor.ndim != 1) v.fail("must have one axis");
    const auto* sizes = v.data<const int64_t>();
    steps.T = v.size(0);
    steps.N = steps.T ? sizes[0] : 0;
    check_active(v);
    for (int64_t t = 0; t < steps.T; ++t) {
      start_.push_back(steps.total);
      steps.total += sizes[t];
    }
    steps.host_start = start_.data();
    if (x_.size(0) != steps.total) {
      x_.fail("has " + std::to_string(x_.size(0)) + " rows, but the batch_sizes add up to " +
              std::to_string(steps.total));
    }
    if (device().type == dlpack::kCpu) {
      steps.active = sizes;
      steps.start = start_.data();
      return;
    }
    const TensorView p = index_view(placed, "batch_sizes and starts", device());
    p.expect_shape({2, steps.T});
    steps.active = p.data<const int64_t>();
    steps.start = steps.active + steps.T;
  }

  void read_order(py::handle object) {
    const TensorView v = index_view(object, "order of rows", device());
    v.expect_shape({steps.N});
    steps.order = v.data<const int64_t>();
    if (device().type != dlpack::kCpu) return;  // sequence.py has checked it
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
    v.expect_device(device());
    v.expect_dtype({dlpack::kBool, 8, 1}, "bool");
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
    if (of_a_cell_ && x_.tensor.ndim == 1) {
      v.expect_shape({features});
      return {v.data<U>(), 0, features};
    }
    if (of_a_cell_) {
      v.expect_shape({steps.N, features});
      return {v.data<U>(), 0, v.stride(0)};
    }
    if (steps.is_packed()) {
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

  template <typename U>
  State<U> state_of(const TensorView& v, int64_t features) const {
    if (of_a_cell_) {
      const Rows<U> own = rows_of<U>(v, features);
      return {own.data, 0, own.row};
    }
    v.expect_shape({sizes.D, steps.N, features});
    return {v.data<U>(), v.stride(0), v.stride(1)};
  }

  // The copy lives as long as these operands.
  py::handle dense_copy(py::handle object) {
    copies_.push_back(ask(api.contiguous, object));
    return copies_.back();
  }

  Shape slots_shape() const {
    return dense({sizes.D, steps.total, known_shape(sizes.cell).stored() * sizes.H});
  }

  const Layer& layer_;
  py::handle object_;
  TensorView x_;
  // A cell runs one step, and its tensors have no axis of time: [N, F], or [F] for a single row.
  const bool of_a_cell_;
  std::vector<int64_t> start_;
  std::vector<py::object> copies_;
};

}  // namespace rnnkern
