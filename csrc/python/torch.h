// What is asked of torch through Python: its types, its modes, its memory. Bound once, when the
// module loads.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "dlpack_view.h"

namespace rnnkern {
namespace py = pybind11;

// A state of torch in which no kernel can run: a function of torch without arguments, which returns
// something true in that state.
struct Mode {
  PyObject* question;
  const char* reason;
};

struct TorchApi {
  const dlpack::ExchangeTable* exchange;
  PyTypeObject *tensor, *parameter;
  // Methods of torch.Tensor, as plain functions of a tensor.
  PyObject *is_neg, *new_empty_strided, *contiguous;
  // Makes a copy of a tensor when the tensor or the copy is written to. `is_lazy` tells whether a
  // tensor is one of such a pair, and `address` where its memory is; null if this torch lacks them.
  PyObject *lazy_clone, *is_lazy, *address;
  std::vector<std::pair<PyObject*, dlpack::DataType>> dtypes;  // of torch, and as DLPack has them
  // Questions without arguments.
  PyObject *num_threads, *deterministic, *grad_enabled, *inference_mode;
  PyObject* graph_is_kept;  // by the backward pass under way
  PyObject *autocast_on_cpu, *autocast_on_cuda;
  PyObject* autocast_on_any;  // faster than either; null if this torch lacks it
  // Names how float32 is multiplied on a GPU: by recurrent layers of cuDNN, and by everything else.
  PyObject *cudnn_enabled, *float32_of_layers, *float32_of_products;
  PyObject* matmul_precision;  // torch.get_float32_matmul_precision: a string
  std::vector<Mode> modes;
  PyObject* forward_ad;  // the namespace of torch.autograd.forward_ad
  PyObject* profiler;    // and of torch.autograd.profiler
  // load(mode, element type, GPU or -1): loads the kernels of a cell that Python has added, or says
  // why not.
  PyObject* load_kernels = nullptr;
};

inline TorchApi api;

inline py::object ask(PyObject* question) {
  PyObject* answer = PyObject_CallNoArgs(question);
  if (!answer) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(answer);
}

inline bool is_true(py::handle object) {
  const int truth = PyObject_IsTrue(object.ptr());
  if (truth < 0) throw py::error_already_set();
  return truth == 1;
}

inline bool is_so(PyObject* question) { return is_true(ask(question)); }

// The same of an object.
inline py::object ask(PyObject* question, py::handle object) {
  PyObject* answer = PyObject_CallOneArg(question, object.ptr());
  if (!answer) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(answer);
}
inline bool is_so(PyObject* question, py::handle object) { return is_true(ask(question, object)); }

// Null if there is none. `name` is an interned string.
inline PyObject* find_in(PyObject* dict, PyObject* name) {
  PyObject* found = PyDict_GetItemWithError(dict, name);
  if (!found && PyErr_Occurred()) throw py::error_already_set();
  return found;
}

// A plain tensor or parameter, and no subclass that computes in its own way.
inline bool is_tensor(py::handle object) {
  const PyTypeObject* type = Py_TYPE(object.ptr());
  return type == api.tensor || type == api.parameter;
}

inline bool is_autocast(dlpack::Device device) {
  if (api.autocast_on_any && !is_so(api.autocast_on_any)) return false;
  return is_so(device.type == dlpack::kCuda ? api.autocast_on_cuda : api.autocast_on_cpu);
}

// Follows torch.nn on a GPU, whose layers are cuDNN's and whose cells are matrix products:
// torch.backends.cudnn.rnn.fp32_precision or torch.backends.cuda.matmul.fp32_precision, or the
// older flags allow_tf32.
inline bool is_tf32_allowed(bool is_cell) {
  PyObject* const question =
      is_cell || !is_so(api.cudnn_enabled) ? api.float32_of_products : api.float32_of_layers;
  return ask(question).cast<std::string>() == "tf32";
}

// torch.set_float32_matmul_precision: products may take float32 as bfloat16 ("medium"), or as the
// sum of two of them ("high").
enum class MatmulPrecision { kHighest, kHigh, kMedium };
inline MatmulPrecision matmul_precision() {
  const py::object name = ask(api.matmul_precision);
  const auto is = [&](const char* wanted) {
    return PyUnicode_CompareWithASCIIString(name.ptr(), wanted) == 0;
  };
  return is("medium") ? MatmulPrecision::kMedium
         : is("high") ? MatmulPrecision::kHigh
                      : MatmulPrecision::kHighest;
}

// The current stream of torch, a cudaStream_t.
inline void* current_stream(dlpack::Device device) {
  void* stream = nullptr;
  if (api.exchange->current_stream(device.type, device.id, &stream) != 0) {
    throw py::error_already_set();
  }
  return stream;
}

inline int num_threads() { return ask(api.num_threads).cast<int>(); }

inline void bind_torch() {
  const auto keep = [](py::object object) { return object.release().ptr(); };
  const py::module_ package = py::module_::import("torch");
  const py::object type = package.attr("Tensor"), core = package.attr("_C");
  if (!py::hasattr(type, "__dlpack_c_exchange_api__")) {
    throw py::import_error("rnnkern needs torch >= 2.10: this torch has no DLPack exchange table");
  }
  const py::capsule capsule = type.attr("__dlpack_c_exchange_api__");
  const auto* table = static_cast<const dlpack::ExchangeTable*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (table && table->header.major != 1) {
    table = reinterpret_cast<const dlpack::ExchangeTable*>(table->header.previous);
  }
  if (!table || !table->view_of_object || !table->managed_to_object || !table->current_stream)
    throw py::import_error("this torch has no DLPack 1.x exchange table");
  api.exchange = table;
  api.tensor = reinterpret_cast<PyTypeObject*>(keep(type));
  api.parameter =
      reinterpret_cast<PyTypeObject*>(keep(py::module_::import("torch.nn").attr("Parameter")));
  api.is_neg = keep(type.attr("is_neg"));
  api.new_empty_strided = keep(type.attr("new_empty_strided"));
  api.contiguous = keep(type.attr("contiguous"));
  api.lazy_clone = keep(py::getattr(package, "_lazy_clone", type.attr("clone")));
  const auto keep_if_any = [&](const py::object& from, const char* name) {
    return py::hasattr(from, name) ? keep(from.attr(name)) : nullptr;
  };
  api.is_lazy = keep_if_any(core, "_is_cow_tensor");
  api.address = keep_if_any(type, "const_data_ptr");
  api.dtypes = {{keep(package.attr("float32")), dlpack::kDataType<float>},
                {keep(package.attr("float64")), dlpack::kDataType<double>},
                {keep(package.attr("bfloat16")), dlpack::kDataType<Bf16>},
                {keep(package.attr("float16")), dlpack::kDataType<F16>}};
  api.num_threads = keep(package.attr("get_num_threads"));
  api.deterministic = keep(core.attr("_get_deterministic_algorithms"));
  api.grad_enabled = keep(package.attr("is_grad_enabled"));
  api.inference_mode = keep(package.attr("is_inference_mode_enabled"));
  api.graph_is_kept = keep(core.attr("_autograd").attr("_get_current_graph_task_keep_graph"));
  const py::object partial = py::module_::import("functools").attr("partial"),
                   autocast = package.attr("is_autocast_enabled");
  api.autocast_on_any = keep_if_any(core, "_is_any_autocast_enabled");
  api.autocast_on_cpu = keep(partial(autocast, "cpu"));
  api.autocast_on_cuda = keep(partial(autocast, "cuda"));
  const py::object precision = core.attr("_get_fp32_precision_getter");
  api.cudnn_enabled = keep(core.attr("_get_cudnn_enabled"));
  api.float32_of_layers = keep(partial(precision, "cuda", "rnn"));
  api.float32_of_products = keep(partial(precision, "cuda", "matmul"));
  api.matmul_precision = keep(core.attr("_get_float32_matmul_precision"));
  api.modes = {
      {keep(core.attr("_get_tracing_state")), "torch.jit.trace"},
      {keep(core.attr("_are_functorch_transforms_active")), "torch.func transform"},
      {keep(core.attr("_len_torch_dispatch_stack")), "torch dispatch mode"},
  };
  api.forward_ad = keep(py::module_::import("torch.autograd.forward_ad").attr("__dict__"));
  api.profiler = keep(py::module_::import("torch.autograd.profiler").attr("__dict__"));
}

// Why no kernel may run in the current mode of torch, or null.
inline const char* mode_refusal() {
  for (const Mode& mode : api.modes) {
    if (is_so(mode.question)) return mode.reason;
  }
  static PyObject* const name = PyUnicode_InternFromString("_current_level");
  PyObject* level = find_in(api.forward_ad, name);
  if (!level) throw py::import_error("this torch does not tell whether forward mode is on");
  return py::handle(level).cast<long>() >= 0 ? "forward-mode differentiation" : nullptr;
}

// A profiler of torch records what runs.
inline bool is_profiled() {
  static PyObject* const name = PyUnicode_InternFromString("_is_profiler_enabled");
  return find_in(api.profiler, name) == Py_True;
}

}  // namespace rnnkern
