// Reads a module of torch.nn without the machinery of its attributes, because calls take only a few
// microseconds. Whatever that machinery could change is left to Python.
#pragma once

#include <algorithm>
#include <array>
#include <deque>
#include <optional>
#include <string_view>
#include <type_traits>
#include <utility>

#include "python/layer.h"
#include "python/torch.h"

namespace rnnkern {

// Weights in torch's flat order, with references to them. Most layers have four, so only as many
// are touched as there are.
class PlainWeights {
 public:
  static constexpr size_t kMax = kMaxDirections * (5 + kMaxParameters);

  PlainWeights() = default;
  PlainWeights(PlainWeights&& other) noexcept : count_(std::exchange(other.count_, 0)) {
    std::copy_n(other.tensors_, count_, tensors_);
  }
  PlainWeights& operator=(PlainWeights&&) = delete;
  ~PlainWeights() {
    for (size_t i = 0; i < count_; ++i) Py_DECREF(tensors_[i]);
  }

  void add(py::object weight) { tensors_[count_++] = weight.release().ptr(); }
  size_t size() const { return count_; }
  py::handle operator[](size_t i) const { return tensors_[i]; }

 private:
  PyObject* tensors_[kMax];
  size_t count_ = 0;
};

struct PlainModule {
  Layer layer;
  PlainWeights weights;
};

// The attributes of a module that a plain call reads: their places in `kNames`.
struct LayerAttributes {
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
  static constexpr const char* kNames[kCount] = {
      "mode", "num_layers",  "bidirectional",       "input_size",    "hidden_size", "proj_size",
      "bias", "batch_first", "_flat_weights_names", "_flat_weights", "_parameters"};
};

// The same for a cell, with its weights.
struct CellAttributes {
  enum Name {
    kInput,
    kHidden,
    kNonlinearity,
    kParameters,
    kWeightIh,
    kWeightHh,
    kBiasIh,
    kBiasHh,
    kCount
  };
  static constexpr const char* kNames[kCount] = {"input_size",  "hidden_size", "nonlinearity",
                                                 "_parameters", "weight_ih",   "weight_hh",
                                                 "bias_ih",     "bias_hh"};
};

// Whether an attribute is a weight of a cell. Those of a layer are in a list.
template <typename Attributes>
constexpr bool is_weight(int i) {
  return std::is_same_v<Attributes, CellAttributes> && i >= CellAttributes::kWeightIh;
}

template <typename Attributes>
PyObject* name_of(int i) {
  static const auto interned = [] {
    std::array<PyObject*, Attributes::kCount> made;
    for (size_t k = 0; k < made.size(); ++k) {
      made[k] = PyUnicode_InternFromString(Attributes::kNames[k]);
    }
    return made;
  }();
  return interned[size_t(i)];
}

// The methods that torch.nn's forward calls, and that a subclass may have overridden.
constexpr const char* kCalledByForward[] = {
    "_update_flat_weights",   "check_forward_args", "check_input",   "get_expected_hidden_size",
    "get_expected_cell_size", "check_hidden_size",  "permute_hidden"};

inline bool is_normalised(PyObject* space) {
  static PyObject* const name = PyUnicode_InternFromString("_gain_names");
  PyObject* const found = find_in(space, name);
  return found && PyObject_IsTrue(found) == 1;
}

// Whether a layer may have one of rnnkern's own options (rnnkern/constructor.py) in use. Recurrent
// dropout is in use only while the layer trains.
inline bool may_use_options(PyObject* space) {
  static PyObject* const given_name = PyUnicode_InternFromString("_rnnkern_options");
  static PyObject* const dropout_name = PyUnicode_InternFromString("recurrent_dropout");
  static PyObject* const zoneout_name = PyUnicode_InternFromString("zoneout");
  static PyObject* const training_name = PyUnicode_InternFromString("training");
  if (is_normalised(space)) return true;
  if (!find_in(space, given_name)) return false;
  // Such a name may be the user's, of a tensor for example, which is neither true nor false.
  const auto is_set = [](PyObject* value) {
    const int truth = value ? PyObject_IsTrue(value) : 0;
    if (truth < 0) PyErr_Clear();
    return truth != 0;
  };
  PyObject *const dropout = find_in(space, dropout_name), *zoneout = find_in(space, zoneout_name);
  return is_set(zoneout) || (is_set(dropout) && find_in(space, training_name) != Py_False);
}

// The class of torch.nn that a class of modules derives from, or null.
inline py::object class_of_torch(py::handle type) {
  for (py::handle base : type.attr("__mro__")) {
    if (base.attr("__module__").cast<std::string>() == "torch.nn.modules.rnn") {
      return py::reinterpret_borrow<py::object>(base);
    }
  }
  return {};
}

inline bool has_methods_of(py::handle theirs, py::handle type) {
  const py::object none = py::none();
  for (const char* name : kCalledByForward) {
    if (!py::getattr(type, name, none).is(py::getattr(theirs, name, none))) return false;
  }
  return true;
}

// What is found out about a class of modules, once.
struct ModuleClass {
  // Attributes of such modules are in the module's own namespace, and the methods that forward
  // calls are torch.nn's. So the class neither has the attributes, but for `properties`, nor looks
  // them up in a way of its own.
  bool plain = false;
  // The weights of such a cell that are properties of the class, as torch.nn.utils.parametrize
  // makes them: bits by CellAttributes::Name. A call asks for each of them once, as torch.nn's.
  unsigned properties = 0;
  // The cell of a class such as LSTMCell. Nothing for RNNCell, because each module has its
  // nonlinearity.
  std::optional<CellId> cell;
};

template <typename Attributes>
ModuleClass look_at_class(py::handle type) {
  const py::handle base(reinterpret_cast<PyObject*>(&PyBaseObject_Type));
  const py::object theirs = class_of_torch(type);
  ModuleClass found;
  if (!theirs) return found;
  constexpr std::string_view kSuffix = "Cell";
  const auto name = theirs.attr("__name__").cast<std::string>();
  if (name.ends_with(kSuffix))
    found.cell = cell_named(name.substr(0, name.size() - kSuffix.size()));
  found.plain = type.attr("__getattribute__").is(base.attr("__getattribute__")) &&
                has_methods_of(theirs, type);
  for (int i = 0; i < Attributes::kCount; ++i) {
    if (!py::hasattr(type, name_of<Attributes>(i))) continue;
    const py::object attribute = py::getattr(type, name_of<Attributes>(i));
    if (is_weight<Attributes>(i) && Py_IS_TYPE(attribute.ptr(), &PyProperty_Type)) {
      found.properties |= 1u << i;
    } else {
      found.plain = false;
    }
  }
  // A cell of torch.nn asks for its weights by name, so its class may give others. A layer has them
  // in a list.
  if constexpr (std::is_same_v<Attributes, CellAttributes>) {
    found.plain = found.plain && type.attr("__getattr__").is(theirs.attr("__getattr__"));
  }
  return found;
}

// It is found out again only when the class has changed: CPython then gives it another version tag,
// where 0 is none.
template <typename Attributes>
ModuleClass module_class(PyTypeObject* type) {
  struct Answer {
    py::object type;
    unsigned version;
    ModuleClass found;
  };
  constexpr size_t kKept = 16;
  static auto& kept = *new std::deque<Answer>();  // outlives the interpreter
  for (const Answer& answer : kept) {
    if (answer.type.ptr() == reinterpret_cast<PyObject*>(type) && answer.version &&
        answer.version == type->tp_version_tag) {
      return answer.found;
    }
  }
  const auto object = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(type));
  const ModuleClass found = look_at_class<Attributes>(object);
  kept.push_front({object, unsigned(type->tp_version_tag), found});
  while (kept.size() > kKept) {
    const Answer oldest = std::move(kept.back());  // its end may run Python, which may come back
    kept.pop_back();
  }
  return found;
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

inline std::string_view text_of(PyObject* object) {
  Py_ssize_t length = 0;
  const char* text = PyUnicode_CheckExact(object) ? PyUnicode_AsUTF8AndSize(object, &length) : "";
  if (text) return {text, size_t(length)};
  PyErr_Clear();
  return {};
}

inline py::object namespace_of(py::handle module) {
  auto space = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module.ptr(), nullptr));
  if (!space) throw py::error_already_set();
  return space;
}

// The module's only layer, which takes that many features, and its weights. Nothing if it has
// several layers, or if one of its attributes or weights is not as torch.nn makes it.
inline std::optional<PlainModule> plain_module(py::handle module, int64_t features) {
  using A = LayerAttributes;
  if (!module_class<A>(Py_TYPE(module.ptr())).plain) return std::nullopt;
  const py::object space = namespace_of(module);
  PyObject* found[A::kCount];
  for (int i = 0; i < A::kCount; ++i) {
    found[i] = find_in(space.ptr(), name_of<A>(i));
    if (!found[i]) return std::nullopt;
  }
  if (may_use_options(space.ptr())) return std::nullopt;
  for (int i : {A::kBidirectional, A::kBias, A::kBatchFirst}) {
    if (!PyBool_Check(found[i])) return std::nullopt;
  }
  const auto layers = integer(found[A::kLayers]), input = integer(found[A::kInput]),
             hidden = integer(found[A::kHidden]), proj = integer(found[A::kProj]);
  if (layers != 1 || input != features || !hidden || !proj ||
      !PyList_CheckExact(found[A::kWeightNames]) || !PyList_CheckExact(found[A::kWeights]) ||
      !PyDict_CheckExact(found[A::kParameters])) {
    return std::nullopt;
  }
  const std::optional<CellId> cell = known_id(text_of(found[A::kMode]));
  const auto count = size_t(PyList_GET_SIZE(found[A::kWeightNames]));
  // A module of a cell with more states takes and gives a longer tuple.
  if (!cell || known_shape(*cell).more_states || count > PlainWeights::kMax ||
      PyList_GET_SIZE(found[A::kWeights]) != Py_ssize_t(count)) {
    return std::nullopt;
  }
  const auto layer =
      Layer(*cell, found[A::kBidirectional] == Py_True ? 2 : 1, *hidden, *proj,
            found[A::kBias] == Py_True, found[A::kBatchFirst] == Py_True, false, false);
  PlainWeights weights;
  // Parameters are mostly in the order of their names, and then need not be looked up.
  Py_ssize_t place = 0;
  while (weights.size() < count) {
    const auto i = Py_ssize_t(weights.size());
    PyObject *name = PyList_GET_ITEM(found[A::kWeightNames], i), *key = nullptr, *weight = nullptr;
    if (!PyDict_Next(found[A::kParameters], &place, &key, &weight) || !is_same_name(key, name)) {
      weight = find_in(found[A::kParameters], name);
    }
    // The caller may have put another tensor into the list, or into the module's namespace.
    if (!weight || weight == Py_None || weight != PyList_GET_ITEM(found[A::kWeights], i) ||
        find_in(space.ptr(), name)) {
      return std::nullopt;
    }
    weights.add(py::reinterpret_borrow<py::object>(weight));
  }
  return PlainModule{layer, std::move(weights)};
}

inline std::optional<CellId> elman_cell(PyObject* nonlinearity) {
  if (!nonlinearity) return std::nullopt;
  const std::string_view text = text_of(nonlinearity);
  if (text == "tanh") return cell_named("RNN_TANH");
  if (text == "relu") return cell_named("RNN_RELU");
  return std::nullopt;
}

// A cell that takes that many features, and its weights. Nothing if one of its attributes or
// weights is not as torch.nn makes it.
inline std::optional<PlainModule> plain_cell_module(py::handle module, int64_t features) {
  using A = CellAttributes;
  const ModuleClass type = module_class<A>(Py_TYPE(module.ptr()));
  if (!type.plain) return std::nullopt;
  const py::object space = namespace_of(module);
  const auto own = [&](A::Name name) { return find_in(space.ptr(), name_of<A>(name)); };
  const std::optional<CellId> cell = type.cell ? type.cell : elman_cell(own(A::kNonlinearity));
  PyObject *const input = own(A::kInput), *const hidden = own(A::kHidden),
                  *const found = own(A::kParameters);
  const auto parameters = py::reinterpret_borrow<py::object>(found ? found : Py_None);
  if (!cell || !input || !hidden || !PyDict_CheckExact(parameters.ptr()) ||
      is_normalised(space.ptr())) {
    return std::nullopt;
  }
  const std::optional<int64_t> size = integer(hidden);
  if (integer(input) != features || !size || !*size) return std::nullopt;
  PlainWeights weights;
  int missing = 0;
  for (A::Name name : {A::kWeightIh, A::kWeightHh, A::kBiasIh, A::kBiasHh}) {
    // The caller may have put another tensor into the module's namespace.
    if (own(name)) return std::nullopt;
    const bool is_property = type.properties & 1u << name;
    auto weight =
        is_property
            ? py::reinterpret_steal<py::object>(PyObject_GetAttr(module.ptr(), name_of<A>(name)))
            : py::reinterpret_borrow<py::object>(find_in(parameters.ptr(), name_of<A>(name)));
    if (is_property && !weight) throw py::error_already_set();
    if (!weight) return std::nullopt;
    if (weight.is_none()) {
      if (name == A::kWeightIh || name == A::kWeightHh) return std::nullopt;
      ++missing;
    } else {
      weights.add(std::move(weight));
    }
  }
  if (missing == 1) return std::nullopt;  // no biases at all, or both
  return PlainModule{Layer(*cell, 1, *size, 0, missing == 0, false, false, true),
                     std::move(weights)};
}

}  // namespace rnnkern
