// A module of torch.nn as it stands, read past the machinery of its attributes: for calls of a few
// microseconds. Anything unusual is left to Python.
#pragma once

#include <array>
#include <optional>

#include "python/layer.h"
#include "python/torch.h"

namespace rnnkern {

// Weights in torch's flat order.
struct PlainWeights {
  static constexpr size_t kMax = kMaxDirections * 5;
  std::array<py::object, kMax> tensors;
  size_t count = 0;

  size_t size() const { return count; }
  py::handle operator[](size_t i) const { return tensors[i]; }
};

struct PlainModule {
  Layer layer;
  PlainWeights weights;
};

// The module's only layer and its weights. Nothing where it has several layers, or where an
// attribute or a weight does not stand in the module's own namespace (parametrized, computed).
inline std::optional<PlainModule> plain_module(py::handle module) {
  enum { kMode, kLayers, kBidirectional, kHidden, kProj, kBias, kBatchFirst, kNames, kParameters };
  static const auto attributes = [] {
    std::vector<PyObject*> names;
    for (const char* name : {"mode", "num_layers", "bidirectional", "hidden_size", "proj_size",
                             "bias", "batch_first", "_flat_weights_names", "_parameters"}) {
      names.push_back(PyUnicode_InternFromString(name));
    }
    return names;
  }();
  const auto space =
      py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module.ptr(), nullptr));
  if (!space) throw py::error_already_set();
  PyObject* found[kParameters + 1];
  for (size_t i = 0; i < attributes.size(); ++i) {
    found[i] = PyDict_GetItemWithError(space.ptr(), attributes[i]);
    if (!found[i]) return std::nullopt;
  }
  for (int i : {kLayers, kHidden, kProj}) {
    if (!PyLong_Check(found[i])) return std::nullopt;
  }
  if (!PyUnicode_Check(found[kMode]) || !PyList_Check(found[kNames]) ||
      !PyDict_Check(found[kParameters]) || PyLong_AsLong(found[kLayers]) != 1) {
    return std::nullopt;
  }
  const auto flag = [&](int i) { return PyObject_IsTrue(found[i]) == 1; };
  PlainModule plain = {Layer(PyUnicode_AsUTF8(found[kMode]), 1 + flag(kBidirectional),
                             PyLong_AsLongLong(found[kHidden]), PyLong_AsLongLong(found[kProj]),
                             flag(kBias), flag(kBatchFirst)),
                       {}};
  PlainWeights& weights = plain.weights;
  const auto count = size_t(PyList_GET_SIZE(found[kNames]));
  if (count > PlainWeights::kMax) return std::nullopt;
  for (; weights.count < count; ++weights.count) {
    PyObject* weight = PyDict_GetItemWithError(
        found[kParameters], PyList_GET_ITEM(found[kNames], Py_ssize_t(weights.count)));
    if (!weight || weight == Py_None) return std::nullopt;
    weights.tensors[weights.count] = py::reinterpret_borrow<py::object>(weight);
  }
  return plain;
}

}  // namespace rnnkern
