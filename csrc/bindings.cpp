// The Python module rnnkern._C: turns tensors into a scan, and releases the interpreter while it
// runs. Only this file and csrc/python know Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <optional>
#include <string>

#include "cpu/kernels.h"
#include "cuda/driver.h"
#include "cuda/plan.h"
#include "plan.h"
#include "python/frozen.h"
#include "python/layer.h"
#include "python/operands.h"
#include "python/options.h"
#include "python/plain_module.h"
#include "python/run.h"
#include "python/second_order.h"
#include "python/states.h"
#include "python/torch.h"

namespace rnnkern {
namespace {

// Why no kernel covers these tensors, or None. Gaps are the answer only if there is no other
// reason. They stand for lazy signs, too: the kernels cover a dense copy of either.
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
    if (reason && reason != kGaps && reason != kNegated) return py::str(reason);
    if (reason) gaps = kGaps;
  }
  return gaps ? py::object(py::str(gaps)) : py::object(py::none());
}

// Calls f(T{}) for the elements T of the input of a layer. Forward and backward ask separately. One
// may run as F32ByBf16 and the other as float32, because both save and read float32.
template <typename F>
auto with_element_of(const Layer& layer, py::handle x, F f) {
  if (!is_tensor(x)) throw Refused("input is not covered: tensor subclass");
  const TensorView view = view_of(x, "input");
  if (!with_element(view.tensor.dtype, [](auto) { return true; })) {
    view.fail("is not covered: its dtype");
  }
  if (view.tensor.device.type == dlpack::kCpu && view.tensor.dtype == dlpack::kDataType<float> &&
      has_kernels<F32ByBf16>()) {
    int64_t rows = 1;
    for (int i = 0; i + 1 < view.tensor.ndim; ++i) rows *= view.size(i);
    const int64_t N = view.tensor.ndim == 3 ? view.size(layer.batch_first ? 0 : 1) : rows;
    // The cheapest question is asked first, because a small call notices each of them.
    if (worth_bfloat16(rows, false) || worth_bfloat16(rows, is_so(api.deterministic))) {
      const auto precision = layer.by_bfloat16 ? MatmulPrecision::kMedium : matmul_precision();
      if (precision == MatmulPrecision::kMedium) return f(F32ByBf16{});
      if (precision == MatmulPrecision::kHigh && has_kernels<F32By3Bf16>() &&
          worth_split(rows, N, is_so(api.deterministic))) {
        return f(F32By3Bf16{});
      }
    }
  }
  return with_element(view.tensor.dtype, f);
}

struct Outputs {
  py::object y, hn, cn;  // hn: None for a cell, because it is y; cn: None without a cell state
  // For backward: y as it is now (y itself if the caller may not change it, None if it is a part of
  // what forward saves), and what forward saves, or None.
  py::object kept_y = py::none(), saved = py::none();
};

// What the caller of a forward pass wants of it.
struct Wanted {
  bool training = false;
  bool keeps_y = false;      // the caller hands y on, and whoever gets it may change it
  bool cells = false;        // save the cell states of all steps in any case
  bool saves_bytes = false;  // what is saved may be a bytearray
  const Frozen* packed_weights = nullptr;  // of this layer alone
};

// A readout, and the inputs that it computes. All are None if there is no closed loop.
struct ReadoutOperands {
  py::object w = py::none(), b = py::none(), made = py::none();
};

template <typename T, typename Weights>
Outputs forward_of(const Layer& layer, py::handle x, py::handle h0, py::handle c0,
                   const Weights& weights, py::handle steps, Wanted wanted,
                   const ReadoutOperands& readout = {}, const CallOptions& options = {}) {
  Operands<T> o(layer, x, steps);
  Forward<T> f;
  o.read_weights(weights, f.weights);
  if (!readout.w.is_none()) f.readout = o.readout(readout.w, readout.b, readout.made);
  const Sizes& z = o.sizes;
  if (o.steps.T == 0) throw Refused("the sequence has no steps");
  f.x = o.input();
  f.h0 = o.template state<const T>(h0, "h_0", z.O);
  f.c0 = o.initial_cell(c0);
  options.give(o, &f);
  Outputs made;
  made.y = o.make_rows(z.D * z.O, &f.y);
  if (o.of_a_cell()) {
    made.hn = py::none();
    f.hn = {f.y.data, 0, f.y.row};
  } else {
    made.hn = o.make_state(z.O, &f.hn);
  }
  made.cn = layer.has_cell_state() ? o.make_state(layer.cell_width(), &f.cn) : py::none();
  T* copy_of_y = nullptr;
  const bool keeps_y = wanted.keeps_y && z.D * o.steps.total * z.O > 0;
  const bool is_copied = keeps_y && o.are_few_rows(z.D * z.O);
  auto parts = o.saved(is_copied, f.noise.zoneout > 0);
  if (!wanted.training) parts = {.cells = wanted.cells ? parts.cells : 0};
  if (parts.elements()) {
    T* data = nullptr;
    made.saved = o.make_saved(parts.elements(), wanted.saves_bytes, &data);
    parts.place(data, &f);
    copy_of_y = data + parts.before_output();
  }
  f.sizes = z;
  f.steps = o.steps;
  f.rounds_cells = o.deterministic;
  if (wanted.packed_weights) f.packed = wanted.packed_weights->only_layer<T>(layer, z.I);
  run_on_device(o, f);
  if (wanted.training && is_copied) {
    std::memcpy(copy_of_y, f.y.data, size_t(parts.output) * sizeof(T));
  } else if (wanted.training) {
    made.kept_y = keeps_y ? o.keep_rows(made.y, f.y, z.D * z.O) : made.y;
  }
  return made;
}

template <typename Weights>
Outputs forward_any(const Layer& layer, py::handle x, py::handle h0, py::handle c0,
                    const Weights& weights, py::handle steps, Wanted wanted,
                    const CallOptions& options = {}) {
  return with_element_of(layer, x, [&](auto element) {
    return forward_of<decltype(element)>(layer, x, h0, c0, weights, steps, wanted, {}, options);
  });
}

py::tuple outputs_of(Outputs&& made) {
  if (made.hn.is_none() && made.cn.is_none()) return py::make_tuple(std::move(made.y));
  if (made.hn.is_none()) return py::make_tuple(std::move(made.y), std::move(made.cn));
  if (made.cn.is_none()) return py::make_tuple(std::move(made.y), std::move(made.hn));
  return py::make_tuple(std::move(made.y), std::move(made.hn), std::move(made.cn));
}

// record((layer, None, number of states), outputs, kept y, saved, x, *weights, *states). The four
// operands before x have no gradients.
constexpr size_t kRecordedBefore = 4;
py::tuple recorded(py::handle record, const Layer& layer, py::handle x, const PlainWeights& weights,
                   const PlainStates& states, Outputs&& made) {
  const py::object kept_y = std::move(made.kept_y), saved = std::move(made.saved),
                   outputs = outputs_of(std::move(made)),
                   scanned = py::make_tuple(object_of(layer), py::none(), states.size());
  PyObject* operands[kRecordedBefore + 1 + PlainWeights::kMax + 2] = {
      scanned.ptr(), outputs.ptr(), kept_y.ptr(), saved.ptr(), x.ptr()};
  size_t count = kRecordedBefore + 1;
  for (size_t i = 0; i < weights.size(); ++i) operands[count++] = weights[i].ptr();
  for (size_t i = 0; i < states.size(); ++i) operands[count++] = states[i].ptr();
  PyObject* result = PyObject_Vectorcall(record.ptr(), operands, count, nullptr);
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::tuple>(result);
}

// Whether it pays that the steps of a loop add the gradients of these weights to one sum
// (rnnkern/loops.py). With fewer than kElements, that takes longer than autograd's additions: a
// decoder of RNNCell with 128 units took 1.1 times as long with it.
bool are_worth_sums(const Layer& layer, dlpack::Device device) {
  constexpr double kElements = 1 << 15;  // of weight_hh
  const double elements =
      double(known_shape(layer.cell).gates) * double(layer.hidden) * double(layer.hidden);
  return elements >= kElements && !cuda::kIsStandIn && device.type == dlpack::kCpu;
}

// Whether autocast or a profiler has to see a call, which is then no plain one.
bool must_be_seen(dlpack::Device device) { return is_autocast(device) || is_profiled(); }

// The outputs of a plain call, with initial states or without. Returns nothing if the call is not a
// plain one. `record` makes the outputs differentiable; `record_in_loop` does it if sums pay,
// unless it is null.
std::optional<py::tuple> plain_outputs(const std::optional<PlainModule>& plain, py::handle x,
                                       py::handle x_as_read, py::handle hx, dlpack::Device device,
                                       py::handle record, py::handle record_in_loop = {}) {
  if (!plain) return std::nullopt;
  const auto& [layer, weights] = *plain;
  const std::optional<PlainStates> states = plain_states(layer, hx);
  if (!states) return std::nullopt;
  const bool training = wants_gradient(weights, std::array<py::handle, 1>{x}, *states);
  const bool sums = record_in_loop && are_worth_sums(layer, device);
  const Wanted wanted = {.training = training, .keeps_y = training, .saves_bytes = !sums};
  Outputs made = forward_any(layer, x_as_read, as_read((*states)[0]), (*states)[1], weights,
                             py::none(), wanted);
  if (!training) return outputs_of(std::move(made));
  return recorded(sums ? record_in_loop : record, layer, x, weights, *states, std::move(made));
}

// The plain call of a module of one layer on a batch. Returns the results of the module, or None if
// the call is not a plain one.
py::object plain_call(py::handle module, py::handle x, py::handle hx, py::handle record) {
  if (!may_be_viewed(x)) return py::none();
  const py::object seen = as_read(x);
  const dlpack::Tensor input = view_of(seen, "input").tensor;
  if (input.ndim != 3 || must_be_seen(input.device)) return py::none();
  const auto outputs =
      plain_outputs(plain_module(module, input.shape[2]), x, seen, hx, input.device, record);
  if (!outputs) return py::none();
  if (outputs->size() == 2) return *outputs;
  return py::make_tuple((*outputs)[0], py::make_tuple((*outputs)[1], (*outputs)[2]));
}

// The same for a cell, on a row or a batch of them.
py::object plain_cell(py::handle module, py::handle x, py::handle hx, py::handle record,
                      py::handle record_in_loop) {
  if (!may_be_viewed(x)) return py::none();
  const py::object seen = as_read(x);
  const dlpack::Tensor input = view_of(seen, "input").tensor;
  if (input.ndim != 1 && input.ndim != 2) return py::none();
  // Asked before the weights are read, because a module may compute them, and would once more.
  if (must_be_seen(input.device)) return py::none();
  const auto outputs = plain_outputs(plain_cell_module(module, input.shape[input.ndim - 1]), x,
                                     seen, hx, input.device, record, record_in_loop);
  if (!outputs) return py::none();
  if (outputs->size() == 2) return *outputs;
  return (*outputs)[0];
}

// Runs a layer whose next input the readout computes from its output. Returns h_n, c_n. `inputs`,
// time first, has one step more than are run: the first is given, the others are written.
py::tuple closed_loop(Layer layer, py::handle inputs, py::handle h0, py::handle c0,
                      const py::sequence& weights, const py::object& w, const py::object& b) {
  if (layer.directions != 1) throw Refused("a closed loop is of one direction");
  layer.batch_first = false;
  const py::object slice = py::reinterpret_borrow<py::object>(inputs);
  const py::object x = slice[py::slice(0, -1, 1)],
                   made = slice[py::slice(py::int_(1), py::none(), py::none())];
  Outputs outputs = with_element_of(layer, x, [&](auto element) {
    return forward_of<decltype(element)>(layer, x, h0, c0, weights, py::none(), {}, {w, b, made});
  });
  return py::make_tuple(outputs.hn, outputs.cn);
}

// Returns a list of the gradients of x, the weights and the given initial states, with None for
// those that are not wanted. If there are `sums`, gradients of the weights are added to these, and
// the list has None in their place. The states of a reset follow the initial states. Also returns
// the gradients of the slots. With `overwrite` they replace what was saved.
template <typename T>
py::tuple backward_of(const Layer& layer, py::handle x, py::handle h0, py::handle c0,
                      const py::sequence& weights, py::handle steps, py::handle y, py::handle saved,
                      py::handle dy, py::handle dhn, py::handle dcn, const py::sequence& wanted,
                      bool overwrite, const py::sequence& sums, const CallOptions& options,
                      py::handle dcells) {
  Operands<T> o(layer, x, steps);
  Backward<T> b;
  o.read_weights(weights, b.weights);
  const Sizes& z = o.sizes;
  const size_t states =
      !h0.is_none() + !c0.is_none() + !options.reset_h.is_none() + !options.reset_c.is_none();
  if (wanted.size() != 1 + weights.size() + states + options.gain_count()) {
    throw Refused("wanted: one flag per input, weight, given state and gain");
  }
  if (sums.size() > 0 &&
      (sums.size() != weights.size() || o.device().type != dlpack::kCpu || cuda::kIsStandIn)) {
    throw Refused("sums: one per weight, on the CPU");
  }
  b.adds = sums.size() > 0;
  b.x = o.input();
  b.h0 = o.template state<const T>(h0, "h_0", z.O);
  b.c0 = o.initial_cell(c0);
  if (!y.is_none()) b.y = o.template rows<const T>(y, "output", z.D * z.O);
  b.dy = o.incoming_rows(dy, "gradient of the output", z.D * z.O, &b.dy_uniform);
  b.dhn = o.incoming_state(dhn, "gradient of h_n", z.O);
  b.dcn = o.incoming_state(dcn, "gradient of c_n", layer.cell_width());
  options.give(o, &b);
  if (!dcells.is_none()) {
    if (!layer.has_cell_state()) throw Refused("gradients of cell states are of LSTMs alone");
    o.expect_cpu("gradients of all cell states");
    b.dcells = o.template rows<const T>(dcells, "gradient of the cell states", z.D * z.H);
  }
  const auto parts = o.saved(y.is_none(), b.noise.zoneout > 0);
  T* data = parts.elements() ? o.saved_data(saved, parts.elements()) : nullptr;
  if (y.is_none()) b.y = o.rows_at(data + parts.before_output(), z.D * z.O);
  parts.place(data, &b);
  const int64_t rows = z.D * o.steps.total, dslots = rows * known_shape(z.cell).stored() * z.H;
  py::object workspace, dprojected, dnormalised;
  b.dslots = data;
  if (!overwrite || !parts.slots) workspace = o.make(dense({dslots}), &b.dslots);
  if (z.projected && o.device().type == dlpack::kCpu && !cuda::kIsStandIn) {
    dprojected = o.make(dense({rows * z.O}), &b.dprojected);
  }
  if (z.normalised) dnormalised = o.make(dense({parts.normalised}), &b.dnormalised);
  py::list made;
  const auto is_wanted = [&](size_t i) { return wanted[i].template cast<bool>(); };
  made.append(is_wanted(0) ? o.make_rows(z.I, &b.dx) : py::none());
  o.make_gradients(is_wanted, sums, &made, b.gradients);
  const auto make_state = [&](py::handle given, int64_t features, State<T>* to) {
    if (given.is_none()) return;
    made.append(is_wanted(made.size()) ? o.make_state(features, to) : py::none());
  };
  make_state(h0, z.O, &b.dh0);
  make_state(c0, layer.cell_width(), &b.dc0);
  make_state(options.reset_h, z.O, &b.dreset_h);
  make_state(options.reset_c, layer.cell_width(), &b.dreset_c);
  for (int d = 0; z.normalised && d < z.D; ++d) {
    for_gains(layer, &b.gradients[d].gains, [&](const char*, T** to, int64_t size) {
      made.append(is_wanted(made.size()) ? o.make(dense({size}), to) : py::none());
    });
  }
  b.sizes = z;
  b.steps = o.steps;
  run_on_device(o, b);
  return py::make_tuple(std::move(made),
                        workspace ? workspace : py::reinterpret_borrow<py::object>(saved));
}

py::tuple backward_any(const Layer& layer, py::handle x, py::handle h0, py::handle c0,
                       const py::sequence& weights, py::handle steps, py::handle y,
                       py::handle saved, py::handle dy, py::handle dhn, py::handle dcn,
                       const py::sequence& wanted, bool overwrite, const py::sequence& sums,
                       const CallOptions& options = {}, py::handle dcells = py::none()) {
  const py::object seen = as_read(x), seen_h0 = as_read(h0);
  return with_element_of(layer, seen, [&](auto element) {
    return backward_of<decltype(element)>(layer, seen, seen_h0, c0, weights, steps, y, saved, dy,
                                          dhn, dcn, wanted, overwrite, sums, options, dcells);
  });
}

// The backward pass of a recorded call: the gradients for autograd's node `ctx`
// (rnnkern/autograd.py). None if no gradient arrives, if what was saved is used up, if the
// gradients must be differentiable, if a mode of torch or a profiler has to see the pass, if a hook
// has the saved tensors, if a loop sums its gradients, or if an operand is refused.
py::object plain_backward(py::handle ctx, py::handle dy, py::handle dhn, py::handle dcn) {
  static PyObject* const scanned_name = PyUnicode_InternFromString("scanned");
  static PyObject* const own_name = PyUnicode_InternFromString("own");
  static PyObject* const shared_name = PyUnicode_InternFromString("is_shared");
  if ((dy.is_none() && dhn.is_none() && dcn.is_none()) || is_so(api.grad_enabled) ||
      mode_refusal() || is_profiled()) {
    return py::none();
  }
  const py::object space = namespace_of(ctx);
  PyObject* const scanned = find_in(space.ptr(), scanned_name);
  PyObject* const own = find_in(space.ptr(), own_name);
  if (!scanned || !own || own == Py_False || find_in(space.ptr(), shared_name) ||
      !PyTuple_CheckExact(scanned) || PyTuple_GET_SIZE(scanned) != 3) {
    return py::none();
  }
  const auto item = [](PyObject* tuple, Py_ssize_t i) {
    return py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(tuple, i));
  };
  const auto part = [](const py::tuple& tuple, size_t begin, size_t end) {
    return py::reinterpret_steal<py::tuple>(
        PyTuple_GetSlice(tuple.ptr(), Py_ssize_t(begin), Py_ssize_t(end)));
  };
  const py::object layer = item(scanned, 0), steps = item(scanned, 1),
                   saved = py::reinterpret_borrow<py::object>(own);
  const auto states = item(scanned, 2).cast<size_t>();
  const py::tuple tensors = ctx.attr("saved_tensors"), needed = ctx.attr("needs_input_grad");
  const size_t weights_end = tensors.size() - states;  // y, x, weights, states
  const auto state = [&](size_t i) -> py::object {
    if (i < states) return tensors[weights_end + i];
    return py::none();
  };
  const bool is_kept = is_so(api.graph_is_kept);
  py::list made;
  try {
    made = backward_any(layer.cast<const Layer&>(), tensors[1], state(0), state(1),
                        part(tensors, 2, weights_end), steps, tensors[0], saved, dy, dhn, dcn,
                        part(needed, kRecordedBefore, needed.size()), !is_kept, py::tuple())[0];
  } catch (const Refused&) {
    return py::none();
  }
  if (!is_kept && PyDict_SetItem(space.ptr(), own_name, Py_False) != 0)
    throw py::error_already_set();
  py::tuple gradients(kRecordedBefore + made.size());
  for (size_t i = 0; i < kRecordedBefore; ++i) gradients[i] = py::none();
  for (size_t i = 0; i < made.size(); ++i) gradients[kRecordedBefore + i] = made[i];
  return gradients;
}

Sizes sizes_of(const Layer& layer, int64_t I) {
  return {layer.cell, I, layer.hidden, layer.out, layer.directions, layer.projected};
}

// What Python knows of a cell (rnnkern/known_cells.py). `names` is empty if the only gate is h
// itself.
py::dict fields_of(const CellShape& shape, const std::vector<std::string>& names) {
  return py::dict(
      py::arg("gates") = shape.gates, py::arg("slots") = shape.slots,
      py::arg("names") = py::tuple(py::cast(names)), py::arg("has_cell_state") = shape.cell_state,
      py::arg("saves_slots") = shape.saves_slots, py::arg("reads_h") = shape.reads_h,
      py::arg("parameters") = shape.parameters, py::arg("recurrent") = shape.recurrent,
      py::arg("normalises_c") = shape.normalises_c, py::arg("more_states") = shape.more_states,
      py::arg("may_be_projected") = shape.may_be_projected());
}

const char* reading_name(Reading reading) {
  constexpr const char* kNames[] = {"packed", "dots", "broadcast", "in place", "none"};
  return kNames[int(reading)];
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
  bind_torch();
  try {
    check_environment();
  } catch (const std::runtime_error& error) {
    throw py::import_error(error.what());
  }
  py::register_exception<Refused>(m, "RefusedError", PyExc_RuntimeError);
  py::class_<Layer>(m, "Kernel", "The kernels of one layer, apart from the sizes of its input.")
      .def_property_readonly("mode", &Layer::mode)
      .def_readonly("directions", &Layer::directions)
      .def_readonly("out", &Layer::out)
      .def_readonly("bias", &Layer::bias)
      .def_readonly("batch_first", &Layer::batch_first)
      .def_readonly("proj", &Layer::projected)
      .def_readonly("by_bfloat16", &Layer::by_bfloat16)
      .def_readonly("is_cell", &Layer::is_cell)
      .def_property_readonly("tensors", &Layer::tensors)
      .def_property_readonly("has_cell_state", &Layer::has_cell_state)
      .def(
          "forward",
          [](const Layer& layer, py::handle x, py::handle h0, py::handle c0,
             const py::sequence& weights, py::handle steps, std::optional<bool> asked, bool keeps_y,
             bool cells, py::handle options, const Frozen* packed_weights) {
            const bool training =
                asked ? *asked : wants_gradient(weights, std::array<py::handle, 3>{x, h0, c0});
            const Wanted wanted = {.training = training,
                                   .keeps_y = keeps_y,
                                   .cells = cells,
                                   .packed_weights = packed_weights};
            Outputs made = forward_any(layer, as_read(x), as_read(h0), c0, weights, steps, wanted,
                                       CallOptions::of(options));
            py::object kept_y = std::move(made.kept_y), saved = std::move(made.saved);
            return py::make_tuple(outputs_of(std::move(made)), training, std::move(kept_y),
                                  std::move(saved));
          },
          py::arg("x"), py::arg("h0"), py::arg("c0"), py::arg("weights"), py::arg("steps"),
          py::arg("training") = py::none(), py::arg("keeps_y") = false, py::arg("cells") = false,
          py::arg("options") = py::none(), py::arg("packed_weights") = py::none())
      .def("closed_loop", &closed_loop)
      .def(
          "backward",
          [](const Layer& layer, py::handle x, py::handle h0, py::handle c0,
             const py::sequence& weights, py::handle steps, py::handle y, py::handle saved,
             py::handle dy, py::handle dhn, py::handle dcn, const py::sequence& wanted,
             bool overwrite, const py::sequence& sums, py::handle options, py::handle dcells) {
            return backward_any(layer, x, h0, c0, weights, steps, y, saved, dy, dhn, dcn, wanted,
                                overwrite, sums, CallOptions::of(options), dcells);
          },
          py::arg("x"), py::arg("h0"), py::arg("c0"), py::arg("weights"), py::arg("steps"),
          py::arg("y"), py::arg("saved"), py::arg("dy"), py::arg("dhn"), py::arg("dcn"),
          py::arg("wanted"), py::arg("overwrite"), py::arg("sums") = py::tuple(),
          py::arg("options") = py::none(), py::arg("dcells") = py::none())
      .def("second_order", &second_order);
  py::class_<Frozen>(m, "Frozen", "The packed weights of a module, and the kernels that read them.")
      .def(py::init<const Layer&, int64_t, int, const std::string&, const py::sequence&,
                    const py::sequence&>(),
           py::arg("kernel"), py::arg("input_size"), py::arg("layers"), py::arg("numbers"),
           py::arg("weights"), py::arg("scales"))
      .def_readonly("number", &Frozen::number)
      .def_property_readonly("kernel", [](const Frozen& f) { return object_of(f.layer()); })
      .def_property_readonly("hidden", [](const Frozen& f) { return f.layer().hidden; })
      .def_property_readonly("layers", &Frozen::layers)
      .def_property_readonly("nbytes", &Frozen::bytes)
      .def("plain_call", &Frozen::plain_call)
      .def("forward", &Frozen::forward)
      .def("step", &Frozen::step)
      .def("unpack", &Frozen::unpack);
  m.def(
      "kernel",
      [](const std::string& mode, int directions, int64_t hidden, int64_t proj, bool bias,
         bool batch_first, bool by_bfloat16, bool is_cell) {
        const std::optional<CellId> cell = known_id(mode);
        if (!cell) throw py::value_error("no kernel knows the cell '" + mode + "'");
        if (directions < 1 || directions > kMaxDirections) {
          throw py::value_error("a layer has 1 or 2 directions, got " + std::to_string(directions));
        }
        if (proj && !known_shape(*cell).may_be_projected()) {
          throw py::value_error("a layer of the cell '" + mode + "' has no projection");
        }
        return object_of(
            Layer(*cell, directions, hidden, proj, bias, batch_first, by_bfloat16, is_cell));
      },
      py::arg("mode"), py::arg("directions"), py::arg("hidden"), py::arg("proj"), py::arg("bias"),
      py::arg("batch_first"), py::arg("by_bfloat16") = false, py::arg("is_cell") = false);
  m.def(
      "add_cell",
      [](const std::string& mode, const std::vector<std::string>& gates, int slots, bool cell_state,
         bool saves_slots, bool reads_h, const std::vector<std::string>& parameters, bool recurrent,
         int more_states) {
        const CellShape shape = {.gates = int(gates.size()),
                                 .slots = slots,
                                 .cell_state = cell_state,
                                 .saves_slots = saves_slots,
                                 .reads_h = reads_h,
                                 .parameters = int(parameters.size()),
                                 .more_states = more_states,
                                 .recurrent = recurrent};
        if (!shape.is_valid()) throw py::value_error("no cell has such a shape");
        if (known_id(mode)) throw py::value_error("there is a cell '" + mode + "' already");
        added_cells().add(mode, gates, parameters, shape);
        return fields_of(shape, shape.saves_slots ? gates : std::vector<std::string>{});
      },
      py::kw_only(), py::arg("mode"), py::arg("gates"), py::arg("slots"), py::arg("cell_state"),
      py::arg("saves_slots"), py::arg("reads_h"), py::arg("parameters"), py::arg("recurrent"),
      py::arg("more_states"));
  m.def(
      "load_library",
      [](const std::string& path, const std::string& mode, const std::string& element) {
        const py::gil_scoped_release release;
        load_library(path, mode, element);
      },
      py::arg("path"), py::arg("mode"), py::arg("element"));
  m.def(
      "load_cuda_library",
      [](const std::string& path, const std::string& mode, const std::string& element, int device) {
        const py::gil_scoped_release release;
        cuda::load_library(path, mode, element, RNNKERN_HEADERS, device);
      },
      py::arg("path"), py::arg("mode"), py::arg("element"), py::arg("device"));
  m.def("set_loader", [](const py::object& load) { api.load_kernels = load.inc_ref().ptr(); });
  py::dict cells;
  for (const auto& [mode, gate_names, shape] : kCellInfos) {
    cells[mode] = fields_of(shape, {gate_names.begin(), gate_names.end()});
  }
  m.attr("CELLS") = cells;
  m.attr("HEADERS") = RNNKERN_HEADERS;
  m.attr("IS_STAND_IN") = cuda::kIsStandIn;
  m.attr("GAPS") = kGaps;
  py::list called;
  for (const char* name : kCalledByForward) called.append(name);
  m.attr("CALLED_BY_FORWARD") = py::tuple(called);
  m.def("refusal", &refusal);
  m.def("mode_refusal", &mode_refusal);
  m.def("plain_call", &plain_call);
  m.def("plain_cell", &plain_cell);
  m.def("plain_backward", &plain_backward);
  m.def("multiplies_as_bfloat16", [](const Layer& layer, py::handle x) {
    return with_element_of(
        layer, x, [](auto element) { return std::is_same_v<decltype(element), F32ByBf16>; });
  });
  m.def("are_worth_sums", [](const Layer& layer, py::handle x) {
    return are_worth_sums(layer, view_of(x, "input").tensor.device);
  });
  py::class_<Machine>(m, "Machine")
      .def(py::init([](int threads, int lanes, int tile_rows, int element_bytes, int group,
                       bool multiplies_in_place, bool converts, bool rounded_for_products,
                       bool by_tiles, int64_t l2_bytes) {
             return Machine{threads,   lanes,
                            tile_rows, element_bytes,
                            group,     multiplies_in_place,
                            converts,  rounded_for_products,
                            by_tiles,  l2_bytes};
           }),
           py::kw_only(), py::arg("threads"), py::arg("lanes"), py::arg("tile_rows"),
           py::arg("element_bytes"), py::arg("group"), py::arg("multiplies_in_place"),
           py::arg("converts"), py::arg("rounded_for_products"), py::arg("by_tiles"),
           py::arg("l2_bytes"))
      .def_readonly("rounded_for_products", &Machine::rounded_for_products);
  m.def("machine", [](const Layer& layer, int threads, py::handle x) {
    return with_element_of(layer, x,
                           [&](auto element) { return machine_for<decltype(element)>(threads); });
  });
  m.def("multiplied_as", [](const Layer& layer, py::handle x) {
    return with_element_of(layer, x, [](auto element) {
      using T = decltype(element);
      return std::is_same_v<T, F32ByBf16>    ? "bfloat16"
             : std::is_same_v<T, F32By3Bf16> ? "sums of two bfloat16"
                                             : "";
    });
  });
  py::class_<Plan>(m, "Plan")
      .def_readonly("threads", &Plan::threads)
      .def_readonly("row_blocks", &Plan::row_blocks)
      .def_readonly("unit_blocks", &Plan::unit_blocks)
      .def_property_readonly("input", [](const Plan& p) { return reading_name(p.input); })
      .def_property_readonly("recurrent", [](const Plan& p) { return reading_name(p.recurrent); })
      .def_property_readonly(
          "by_dots",
          [](const Plan& p) { return py::make_tuple(p.input_by_dots, p.recurrent_by_dots); })
      .def_readonly("block_steps", &Plan::block_steps);
  m.def(
      "plan",
      [](const Layer& layer, const Machine& machine, int64_t T, int64_t N, int64_t I, int64_t total,
         bool deterministic, bool backward, bool frozen, bool from_zeros) {
        const Problem problem = {sizes_of(layer, I), T,      N,         total,
                                 deterministic,      frozen, from_zeros};
        const Plan plan =
            backward ? plan_backward(problem, machine) : plan_forward(problem, machine);
        return py::make_tuple(plan, describe(plan, problem, machine, backward));
      },
      py::arg("kernel"), py::arg("machine"), py::kw_only(), py::arg("T"), py::arg("N"),
      py::arg("I"), py::arg("total"), py::arg("deterministic"), py::arg("backward"),
      py::arg("frozen") = false, py::arg("from_zeros") = false);
  py::class_<cuda::Device>(m, "CudaDevice")
      .def(py::init([](std::pair<int, int> capability, int multiprocessors, int64_t shared_bytes) {
             cuda::Device device = cuda::device_of_kind(capability.first, capability.second);
             device.multiprocessors = multiprocessors;
             device.blocks_at_once = cuda::blocks_of(multiprocessors);
             device.shared_bytes = shared_bytes;
             return device;
           }),
           py::kw_only(), py::arg("capability"), py::arg("multiprocessors"),
           py::arg("shared_bytes"));
  py::class_<cuda::Plan>(m, "CudaPlan")
      .def_readonly("resident", &cuda::Plan::resident)
      .def_property_readonly("row_tiles", [](const cuda::Plan& p) { return p.tile.row_tiles; })
      .def_property_readonly("column_tiles",
                             [](const cuda::Plan& p) { return p.tile.column_tiles; })
      .def_readonly("row_teams", &cuda::Plan::row_teams)
      .def_readonly("unit_blocks", &cuda::Plan::unit_blocks)
      .def_readonly("passes", &cuda::Plan::passes)
      .def_readonly("groups", &cuda::Plan::groups)
      .def_readonly("units", &cuda::Plan::units)
      .def_readonly("chunks", &cuda::Plan::chunks)
      .def_readonly("warp_chunks", &cuda::Plan::warp_chunks)
      .def_readonly("held_chunks", &cuda::Plan::held_chunks)
      .def_readonly("shared_chunks", &cuda::Plan::shared_chunks)
      .def_readonly("shared_bytes", &cuda::Plan::shared_bytes)
      .def_readonly("bytes_per_step", &cuda::Plan::bytes_per_step)
      .def_readonly("window", &cuda::Plan::window)
      .def_readonly("us_per_step", &cuda::Plan::us_per_step);
  m.def(
      "cuda_plan",
      [](const Layer& layer, const cuda::Device& device, py::handle x, int64_t T, int64_t N,
         int64_t I, bool tf32, bool backward, bool deterministic, bool has_library, bool records) {
        return with_element(view_of(x, "input").tensor.dtype, [&](auto element) {
          using Element = decltype(element);
          const cuda::Problem problem = {
              .sizes = sizes_of(layer, I),
              .T = T,
              .N = N,
              .numbers = cuda::numbers_of<Element>(tf32),
              .backward = backward,
              .deterministic = deterministic,
              .has_library = has_library,
              .inputs_are_saved = records && cuda::kSavesInputs<Element>};
          const cuda::Plan plan = cuda::plan_for(problem, device);
          return py::make_tuple(plan, cuda::describe(plan, problem, device));
        });
      },
      py::arg("kernel"), py::arg("device"), py::arg("x"), py::kw_only(), py::arg("T"), py::arg("N"),
      py::arg("I"), py::arg("tf32"), py::arg("backward"), py::arg("deterministic") = false,
      py::arg("has_library") = true, py::arg("records") = false);
  m.def(
      "cuda_describe",
      [](const Layer& layer, py::handle x, int64_t T, int64_t N, int64_t I, bool backward) {
        const dlpack::Tensor tensor = view_of(x, "input").tensor;
        return with_element(tensor.dtype, [&](auto element) {
          const cuda::Call call = {tensor.device.id, nullptr, tf32_for(layer),
                                   is_so(api.deterministic)};
          return cuda::describe<decltype(element)>(sizes_of(layer, I), T, N, backward, call);
        });
      },
      py::arg("kernel"), py::arg("x"), py::kw_only(), py::arg("T"), py::arg("N"), py::arg("I"),
      py::arg("backward"));
  m.def("compiled_sets", &compiled_sets);
  m.def("cuda_version", &cuda::version);
  m.def("cuda_architectures", &cuda::architectures);
  m.def("cuda_driver", &cuda::driver);
  m.def("cuda_driver_refusal", [] { return cuda::driver_refusal(); });
  m.def(
      "cuda_driver_refusal",
      [](int driver, int built) { return cuda::driver_refusal(driver, built); }, py::arg("driver"),
      py::arg("built"));
  m.def("instruction_set", [] { return std::string(instruction_set().name); });
#if defined(__clang__)
  m.attr("compiler") = __VERSION__;
#else
  m.attr("compiler") = "g++ " __VERSION__;
#endif
}
