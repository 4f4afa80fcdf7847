// SecondOrder (scan.h) from Python.
#pragma once

#include "cpu/kernels.h"
#include "python/operands.h"
#include "python/run.h"

namespace rnnkern {

// Operands of a layer as Python has them; None means zeros. A point is (x, h_0, c_0, weights,
// steps, y, saved, slots, incoming): `slots` are the gradients of the slots, `incoming` those of
// (y, h_n, c_n). A tangent is (x, h_0, c_0, weights, slots, incoming): `slots` are further changes
// of the pre-activations.
struct SecondOrderOperands {
  py::object x, h0, c0, weights, steps, y, saved, slots, incoming;

  static SecondOrderOperands point(const py::tuple& t) {
    if (t.size() != 9) throw Refused("a point has 9 operands, got " + std::to_string(t.size()));
    return {t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8]};
  }
  static SecondOrderOperands direction(const py::tuple& t) {
    if (t.size() != 6) throw Refused("a direction has 6 operands, got " + std::to_string(t.size()));
    return {t[0], t[1], t[2], t[3], py::none(), py::none(), py::none(), t[4], t[5]};
  }
};

template <typename T>
py::tuple second_order_of(const Layer& layer, const SecondOrderOperands& at,
                          const SecondOrderOperands& direction, const py::sequence& wanted) {
  Operands<T> o(layer, at.x, at.steps);
  SecondOrder<T> s;
  const py::sequence weights = at.weights, tangent_weights = direction.weights;
  o.read_weights(weights, s.weights);
  o.read_weights(tangent_weights, s.tangent.weights, true);
  const Sizes& z = o.sizes;
  const auto read_incoming = [&](const py::sequence& from, Rows<const T>* dy, State<const T>* dhn,
                                 State<const T>* dcn) {
    if (from.size() != 3) throw Refused("incoming gradients: one of y, h_n, c_n each");
    *dy = o.template rows<const T>(from[0], "gradient of the output", z.D * z.O);
    *dhn = o.template state<const T>(from[1], "gradient of h_n", z.O);
    *dcn = o.template state<const T>(from[2], "gradient of c_n", layer.cell_width());
  };
  s.x = o.input();
  s.h0 = o.template state<const T>(at.h0, "h_0", z.O);
  s.c0 = o.initial_cell(at.c0);
  s.y = o.template rows<const T>(at.y, "output", z.D * z.O);
  const auto parts = o.saved();
  const T* saved = parts.elements() ? o.saved_data(at.saved, parts.elements()) : nullptr;
  parts.place(saved, &s);
  if (at.y.is_none() || at.slots.is_none()) {
    throw Refused("the output or the gradients of the slots are None");
  }
  s.dslots = const_cast<T*>(o.slots_data(at.slots, "gradients of the slots"));  // only read
  if (wanted.size() != 1 + weights.size() + !at.h0.is_none() + !at.c0.is_none()) {
    throw Refused("wanted: one flag per input, weight and initial state");
  }
  read_incoming(at.incoming, &s.dy, &s.dhn, &s.dcn);
  s.tangent.x = o.template rows<const T>(direction.x, "tangent of the input", z.I);
  s.tangent.h0 = o.template state<const T>(direction.h0, "tangent of h_0", z.O);
  s.tangent.c0 = o.template state<const T>(direction.c0, "tangent of c_0", layer.cell_width());
  s.tangent_sums = o.slots_data(direction.slots, "tangents of the slots");
  read_incoming(direction.incoming, &s.tangent.dy, &s.tangent.dhn, &s.tangent.dcn);

  py::object y = o.make_rows(z.D * z.O, &s.tangent_y), hn = o.make_state(z.O, &s.tangent_hn);
  py::object cn =
      layer.has_cell_state() ? o.make_state(layer.cell_width(), &s.tangent_cn) : py::none();
  const auto is_wanted = [&](size_t i) { return wanted[i].template cast<bool>(); };
  py::list made;
  made.append(is_wanted(0) ? o.make_rows(z.I, &s.tangent.dx) : py::none());
  o.make_gradients(is_wanted, py::tuple(), &made, s.tangent.gradients);
  if (!at.h0.is_none()) {
    made.append(is_wanted(made.size()) ? o.make_state(z.O, &s.tangent.dh0) : py::none());
  }
  if (!at.c0.is_none()) {
    made.append(is_wanted(made.size()) ? o.make_state(layer.cell_width(), &s.tangent.dc0)
                                       : py::none());
  }
  py::object slots = o.make_slots(&s.tangent.dslots);
  s.sizes = z;
  s.steps = o.steps;
  run_on_device(o, s);
  return py::make_tuple(py::make_tuple(y, hn, cn), made, slots);
}

inline py::tuple second_order(const Layer& layer, const py::tuple& point,
                              const py::tuple& direction, const py::sequence& wanted) {
  const auto at = SecondOrderOperands::point(point);
  const auto to = SecondOrderOperands::direction(direction);
  const TensorView view = view_of(at.x, "input");
  const dlpack::DataType dtype = view.tensor.dtype;
  if (dtype == dlpack::kDataType<float>) return second_order_of<float>(layer, at, to, wanted);
  if (dtype == dlpack::kDataType<double>) return second_order_of<double>(layer, at, to, wanted);
  view.fail("is not covered: its dtype");
}

}  // namespace rnnkern
