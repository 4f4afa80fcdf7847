// A module of torch.nn as it stands, read past the machinery of its attributes: for calls of a few
// microseconds. Whatever that machinery could change is left to Python.
#pragma once

#include <array>
#include <deque>
#include <optional>
#include <string_view>
#include <utility>

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

struct ModuleAttributes {
  enum Name {
    kMode,
    kLayers,
    kBidirectional,
    kInput,
    kHidden,
    kProj,
    kBias,
    kBatchFirst,
    kWeightNames,
    kWeights,
    kParameters,
    kCount
  };
  static PyObject* name(int i) {
    static const auto interned = [] {
      std::array<PyObject*, kCount> made;
      size_t next = 0;
      for (const char* name :
           {"mode", "num_layers", "bidirectional", "input_size", "hidden_size", "proj_size", "bias",
            "batch_first", "_flat_weights_names", "_flat_weights", "_parameters"}) {
        made[next++] = PyUnicode_InternFromString(name);
      }
      return made;
    }();
    return interned[size_t(i)];
  }
};

// The methods that torch.nn's forward calls, and that a subclass may have overridden.
constexpr const char* kCalledByForward[] = {
    "_update_flat_weights",   "check_forward_args", "check_input",   "get_expected_hidden_size",
    "get_expected_cell_size", "check_hidden_size",  "permute_hidden"};

inline bool has_torchs_methods(py::handle type) {
  py::object theirs;
  for (py::handle base : type.attr("__mro__")) {
    if (base.attr("__module__").cast<std::string>() == "torch.nn.modules.rnn") {
      theirs = py::reinterpret_borrow<py::object>(base);
      break;
    }
  }
  if (!theirs) return false;
  for (const char* name : kCalledByForward) {
    const py::object none = py::none();
    if (!py::getattr(type, name, none).is(py::getattr(theirs, name, none))) return false;
  }
  return true;
}

// Whether attributes of such modules are what stands in the module's own namespace, and the methods
// that forward calls are torch.nn's: the class neither has the attributes, as properties for
// example, nor looks them up in a way of its own. Asked again only when the class has changed
// (CPython gives it another version tag then; 0 is none).
inline bool has_plain_attributes(PyTypeObject* type) {
  struct Answer {
    py::object type;
    unsigned version;
    bool plain;
  };
  constexpr size_t kKept = 16;
  static auto& kept = *new std::deque<Answer>();  // outlives the interpreter
  for (const Answer& answer : kept) {
    if (answer.type.ptr() == reinterpret_cast<PyObject*>(type) && answer.version &&
        answer.version == type->tp_version_tag) {
      return answer.plain;
    }
  }
  const auto object = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(type));
  const py::handle base(reinterpret_cast<PyObject*>(&PyBaseObject_Type));
  bool plain = object.attr("__getattribute__").is(base.attr("__getattribute__")) &&
               has_torchs_methods(object);
  for (int i = 0; i < ModuleAttributes::kCount; ++i) {
    plain = plain && !py::hasattr(object, ModuleAttributes::name(i));
  }
  kept.push_front({object, unsigned(type->tp_version_tag), plain});
  while (kept.size() > kKept) {
    const Answer oldest = std::move(kept.back());  // its end may run Python, which may come back
    kept.pop_back();
  }
  return plain;
}

inline std::optional<int64_t> integer(PyObject* object) {
  int overflow = 0;
  const long long value =
      PyLong_CheckExact(object) ? PyLong_AsLongLongAndOverflow(object, &overflow) : -1;
  return value < 0 ? std::nullopt : std::optional<int64_t>(value);
}

inline bool is_same_name(PyObject* a, PyObject* b) {
  return a == b ||
         (PyUnicode_CheckExact(a) && PyUnicode_CheckExact(b) && PyUnicode_Compare(a, b) == 0);
}

// The module's only layer, which takes that many features, and its weights. Nothing where it has
// several layers, or where one of its attributes or weights is not as torch.nn makes it.
inline std::optional<PlainModule> plain_module(py::handle module, int64_t features) {
  using A = ModuleAttributes;
  if (!has_plain_attributes(Py_TYPE(module.ptr()))) return std::nullopt;
  const auto space =
      py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module.ptr(), nullptr));
  if (!space) throw py::error_already_set();
  PyObject* found[A::kCount];
  for (int i = 0; i < A::kCount; ++i) {
    found[i] = find_in(space.ptr(), A::name(i));
    if (!found[i]) return std::nullopt;
  }
  for (int i : {A::kBidirectional, A::kBias, A::kBatchFirst}) {
    if (!PyBool_Check(found[i])) return std::nullopt;
  }
  const auto layers = integer(found[A::kLayers]), input = integer(found[A::kInput]),
             hidden = integer(found[A::kHidden]), proj = integer(found[A::kProj]);
  if (layers != 1 || input != features || !hidden || !proj ||
      !PyUnicode_CheckExact(found[A::kMode]) || !PyList_CheckExact(found[A::kWeightNames]) ||
      !PyList_CheckExact(found[A::kWeights]) || !PyDict_CheckExact(found[A::kParameters])) {
    return std::nullopt;
  }
  const auto cell = [&]() -> std::optional<CellId> {
    Py_ssize_t length = 0;
    const char* text = PyUnicode_AsUTF8AndSize(found[A::kMode], &length);
    if (text) return cell_named({text, size_t(length)});
    PyErr_Clear();
    return std::nullopt;
  }();
  const auto count = size_t(PyList_GET_SIZE(found[A::kWeightNames]));
  if (!cell || count > PlainWeights::kMax ||
      PyList_GET_SIZE(found[A::kWeights]) != Py_ssize_t(count)) {
    return std::nullopt;
  }
  PlainModule plain = {
      Layer(*cell, found[A::kBidirectional] == Py_True ? 2 : 1, *hidden, *proj,
            found[A::kBias] == Py_True, found[A::kBatchFirst] == Py_True, false, false),
      {}};
  PlainWeights& weights = plain.weights;
  // Parameters mostly stand in the order of their names, and then need not be looked up.
  Py_ssize_t place = 0;
  for (; weights.count < count; ++weights.count) {
    const auto i = Py_ssize_t(weights.count);
    PyObject *name = PyList_GET_ITEM(found[A::kWeightNames], i), *key = nullptr, *weight = nullptr;
    if (!PyDict_Next(found[A::kParameters], &place, &key, &weight) || !is_same_name(key, name)) {
      weight = find_in(found[A::kParameters], name);
    }
    // Somebody may have put another tensor into the list, or into the module's namespace.
    if (!weight || weight == Py_None || weight != PyList_GET_ITEM(found[A::kWeights], i) ||
        find_in(space.ptr(), name)) {
      return std::nullopt;
    }
    weights.tensors[weights.count] = py::reinterpret_borrow<py::object>(weight);
  }
  return plain;
}

}  // namespace rnnkern
