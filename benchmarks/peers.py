"""The layers of a case in ONNX Runtime and OpenVINO, which also run inference.

Both come with the dependency group ``peers``. A case becomes an ONNX model of one operator, with
the parameters as constants. So each of the two may pack them once, while rnnkern and torch.nn get
them in each call.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

import rnnkern
from rnnkern.bench.workloads import FORWARD, Case

Call = Callable[[], Any]

# The numbers of ONNX's gates in torch's order: i o f c of i f g o, z r h of r z n.
GATE_ORDER = {"RNN": (0,), "LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}


def installed() -> dict[str, Callable[[Case, int], Call]]:
    """A maker of calls for each peer that is installed, by name."""
    peers: dict[str, Callable[[Case, int], Call]] = {}
    if find_spec("onnx") and find_spec("onnxruntime"):
        peers["ONNX Runtime"] = onnxruntime_call
    if find_spec("onnx") and find_spec("openvino"):
        peers["OpenVINO"] = openvino_call
    return peers


def module_calls(case: Case, pass_name: str, dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """A pass of our module and of torch.nn's, by name."""
    libraries = {"rnnkern": rnnkern, "torch.nn": nn}
    return {name: case.side(library, dtype).call(pass_name) for name, library in libraries.items()}


def calls(case: Case, threads: int) -> dict[str, Call]:
    """The plain forward pass in every library, by name; each returns something with the output."""
    others = {name: maker(case, threads) for name, maker in installed().items()}
    return module_calls(case, FORWARD) | others


def output(result: Any) -> np.ndarray:
    """The output ``[T, N, H]`` of what a call returned."""
    first = result[0]
    array = first.detach().numpy() if isinstance(first, torch.Tensor) else np.asarray(first)
    return array.squeeze(1) if array.ndim == 4 else array  # ONNX has an axis for the direction


def _onnx_model(case: Case) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    w = case.workload
    order = GATE_ORDER[case.cell]

    def gates(name: str) -> np.ndarray:
        blocks = case.state[name].numpy().reshape(len(order), w.hidden_size, -1)
        return blocks[list(order)].reshape(1, len(order) * w.hidden_size, -1)

    biases = [gates(name)[..., 0] for name in ("bias_ih_l0", "bias_hh_l0")]
    constants = {
        "W": gates("weight_ih_l0"),
        "R": gates("weight_hh_l0"),
        "B": np.concatenate(biases, axis=1),
    }
    options: dict[str, Any] = {"hidden_size": w.hidden_size}
    if case.cell == "GRU":
        options["linear_before_reset"] = 1
    if case.cell == "RNN":
        options["activations"] = [w.nonlinearity.capitalize()]
    outputs = ["Y", "Y_h", "Y_c"][: 3 if case.cell == "LSTM" else 2]
    node = helper.make_node(case.cell, ["X", "W", "R", "B"], outputs, **options)
    state = [1, w.batch, w.hidden_size]
    shapes = {"Y": [w.steps, 1, w.batch, w.hidden_size], "Y_h": state, "Y_c": state}
    graph = helper.make_graph(
        [node],
        case.cell,
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, list(case.x.shape))],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, shapes[n]) for n in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    return model.SerializeToString()


def onnxruntime_call(case: Case, threads: int) -> Call:
    """One inference session, all optimisations, its own threads."""
    return _session_call(_onnx_model(case), case, threads)


def onnxruntime_int8_call(case: Case, threads: int) -> Call:
    """The same of ONNX Runtime's DynamicQuantizeLSTM, with a scale for each column of weights."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with TemporaryDirectory() as folder:
        given, made = (str(Path(folder, name)) for name in ("given.onnx", "made.onnx"))
        onnx.save(onnx.load_from_string(_onnx_model(case)), given)
        quantize_dynamic(given, made, weight_type=QuantType.QInt8, per_channel=True)
        model = Path(made).read_bytes()
    if "DynamicQuantizeLSTM" not in {n.op_type for n in onnx.load_from_string(model).graph.node}:
        raise RuntimeError("this ONNX Runtime did not quantize the LSTM")
    return _session_call(model, case, threads)


def _session_call(model: bytes, case: Case, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {"X": case.x.numpy()}
    return lambda: session.run(None, feed)


def openvino_call(case: Case, threads: int) -> Call:
    """A compiled model for latency in float32, with its input bound once."""
    import openvino

    core = openvino.Core()
    model = core.read_model(_onnx_model(case))
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(case.x.numpy(), shared_memory=True))

    def call() -> list[Any]:
        request.infer()
        return [request.get_output_tensor(0).data]

    return call
