// SecondOrder (scan.h) from Python.
#pragma once

#include "cpu/kernels.h"
#include "python/operands.h"
#include "python/run.h"

namespace rnnkern {

// What Python knows of a point and of a direction, None standing for zeros: operands as the layer
// has them, weights flat; (y, h_n, c_n); and slots [D, rows, S*H].
struct SecondOrderOperands {
  py::handle x, h0, c0;
  py::sequence weights;
  py::handle steps, y, saved, slots;
  py::sequence incoming;  // gradients of y, h_n, c_n
};
struct SecondOrderDirection {
  py::handle x, h0, c0;
  py::sequence weights;
  py::handle slots;  // their sums
  py::sequence incoming;
};

template <typename T>
py::tuple second_order_of(const Layer& layer, const SecondOrderOperands& at,
                          const SecondOrderDirection& direction) {
  Operands<T> o(layer, at.x, at.steps);
  SecondOrder<T> s;
  o.read_weights(at.weights, s.weights);
  o.read_weights(direction.weights, s.tangent_weights, true);
  const Sizes& z = o.sizes;
  const auto read_incoming = [&](const py::sequence& from, Rows<const T>* dy, State<const T>* dhn,
                                 State<const T>* dcn) {
    if (from.size() != 3) throw Refused("incoming gradients: one of y, h_n, c_n each");
    *dy = o.template rows<const T>(from[0], "gradient of the output", z.D * z.O);
    *dhn = o.template state<const T>(from[1], "gradient of h_n", z.O);
    *dcn = o.template state<const T>(from[2], "gradient of c_n", z.H);
  };
  s.x = o.input();
  s.h0 = o.template state<const T>(at.h0, "h_0", z.O);
  s.c0 = o.template state<const T>(at.c0, "c_0", z.H);
  s.y = o.template rows<const T>(at.y, "output", z.D * z.O);
  const auto parts = o.saved();
  const T* saved = parts.elements() ? o.saved_data(at.saved, parts.elements()) : nullptr;
  if (parts.slots) s.slots = saved;
  if (parts.cells) s.cells = saved + parts.slots;
  if (parts.unprojected) s.unprojected = saved + parts.slots + parts.cells;
  s.dslots = o.slots_data(at.slots, "gradients of the slots");
  if (!s.dslots || !s.y.data) throw Refused("the output or the gradients of the slots are None");
  read_incoming(at.incoming, &s.dy, &s.dhn, &s.dcn);
  s.tangent_x = o.template rows<const T>(direction.x, "tangent of the input", z.I);
  s.tangent_h0 = o.template state<const T>(direction.h0, "tangent of h_0", z.O);
  s.tangent_c0 = o.template state<const T>(direction.c0, "tangent of c_0", z.H);
  s.tangent_sums = o.slots_data(direction.slots, "tangents of the slots");
  read_incoming(direction.incoming, &s.tangent_dy, &s.tangent_dhn, &s.tangent_dcn);

  py::object y = o.make_rows(z.D * z.O, &s.tangent_y), hn = o.make_state(z.O, &s.tangent_hn);
  py::object cn = layer.has_cell_state() ? o.make_state(z.H, &s.tangent_cn) : py::none();
  py::object x = o.make_rows(z.I, &s.tangent_dx);
  py::object h0 = at.h0.is_none() ? py::none() : o.make_state(z.O, &s.tangent_dh0);
  py::object c0 = at.c0.is_none() ? py::none() : o.make_state(z.H, &s.tangent_dc0);
  py::list weights;
  o.make_gradients([](size_t) { return true; }, &weights, s.tangent_gradients);
  py::object slots = o.make_slots(&s.tangent_dslots);
  s.sizes = z;
  s.steps = o.steps;
  const int threads = num_threads();
  with_interpreter_released(z, o.steps, [&] { run(s, threads, o.deterministic); });
  return py::make_tuple(py::make_tuple(y, hn, cn), py::make_tuple(x, h0, c0, weights, slots));
}

inline py::tuple second_order(const Layer& layer, const SecondOrderOperands& at,
                              const SecondOrderDirection& direction) {
  const TensorView view = view_of(at.x, "input");
  if (view.tensor.device.type != dlpack::kCpu || cuda::kIsStandIn) {
    view.fail("is not covered: second derivatives on a GPU");
  }
  const dlpack::DataType dtype = view.tensor.dtype;
  if (dtype == dlpack::kDataType<float>) return second_order_of<float>(layer, at, direction);
  if (dtype == dlpack::kDataType<double>) return second_order_of<double>(layer, at, direction);
  view.fail("is not covered: its dtype");
}

}  // namespace rnnkern
