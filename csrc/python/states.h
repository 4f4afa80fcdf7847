// The initial states of a call, and whether a gradient of its operands is to be recorded.
#pragma once

#include <array>
#include <optional>

#include "python/operands.h"

namespace rnnkern {

// Instances of subclasses are not asked, because some refuse that. No kernel covers them.
template <typename Operands>
bool requires_gradient(const Operands& operands) {
  static PyObject* const name = PyUnicode_InternFromString("requires_grad");
  for (size_t i = 0; i < operands.size(); ++i) {
    const py::handle operand = operands[i];
    if (!is_tensor(operand)) continue;
    PyObject* answer = PyObject_GetAttr(operand.ptr(), name);
    if (!answer) throw py::error_already_set();
    if (is_true(py::reinterpret_steal<py::object>(answer))) return true;
  }
  return false;
}

// Whether a gradient of these operands is to be recorded: torch's modes allow it, and one of the
// operands requires it.
template <typename... Operands>
bool wants_gradient(const Operands&... operands) {
  return is_so(api.grad_enabled) && (requires_gradient(operands) || ...) &&
         !is_so(api.inference_mode);
}

// The initial states of a call, in torch's order.
struct PlainStates {
  std::array<py::handle, 2> tensors;
  size_t count = 0;

  size_t size() const { return count; }
  py::handle operator[](size_t i) const { return i < count ? tensors[i] : py::handle(Py_None); }
};

// The states that a module was given as None, a tensor, or a tuple of two; nothing for any other
// hx.
inline std::optional<PlainStates> plain_states(const Layer& layer, py::handle hx) {
  if (hx.is_none()) return PlainStates{};
  PlainStates states;
  if (!layer.has_cell_state()) {
    states = {{hx}, 1};
  } else if (PyTuple_CheckExact(hx.ptr()) && PyTuple_GET_SIZE(hx.ptr()) == 2) {
    states = {{PyTuple_GET_ITEM(hx.ptr(), 0), PyTuple_GET_ITEM(hx.ptr(), 1)}, 2};
  }
  for (size_t i = 0; i < states.count; ++i) {
    if (!is_tensor(states[i])) return std::nullopt;
  }
  return states.count ? std::optional(states) : std::nullopt;
}

}  // namespace rnnkern
