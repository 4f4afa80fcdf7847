"""Programs of torch.export and models of ONNX: what they are made of, and that they run without
rnnkern, for other sizes than those of the example.
"""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from support import (
    CELLS,
    DTYPES,
    FORMS,
    WIDE_DTYPES,
    assert_bitwise,
    build,
    flatten,
    initial_states,
    states_of,
    torch_nn_autocasts_lstm,
    without_onednn,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import rnnkern
from rnnkern import onnx

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SHAPES = [(3, 7), (5, 2), (2, 11)]  # N, T: of the example, and two more
DIMS = torch.export.Dim("N", max=100), torch.export.Dim("T", max=100)


class Case(NamedTuple):
    """A module, how it is called, and how it is exported."""

    form: str
    options: dict[str, Any]
    extra: str = ""  # of hx, lengths, reset
    dtype: torch.dtype = torch.float32
    strict: bool = False

    def build(self) -> nn.Module:
        kind, own = FORMS.get(self.form, (self.form, {}))
        module = build(kind, 4, 6, dtype=self.dtype, **own, **self.options)
        return Caller(module, self.extra.split()).eval()

    def inputs(self, N: int, T: int) -> tuple[Any, ...]:
        module = self.build().module
        if self.form in CELLS:
            return torch.randn(N, 4, dtype=self.dtype), None, None, None
        axes = (N, T) if module.batch_first else (T, N)
        lengths = torch.randint(0, T + 1, (N,))
        lengths[0], lengths[-1] = 0, T
        states = {k: s.to(self.dtype) for k, s in initial_states(module, N).items()}
        return (
            torch.randn(*axes, 4, dtype=self.dtype),
            states_of(states) if "hx" in self.extra else None,
            lengths if "lengths" in self.extra else None,
            torch.rand(axes) < 0.3 if "reset" in self.extra else None,
        )

    def dynamic(self) -> tuple[Any, ...]:
        N, T = DIMS
        if self.form in CELLS:
            return {0: N}, None, None, None
        axes = {0: N, 1: T} if self.options.get("batch_first") else {0: T, 1: N}
        state = {1: N}
        return (
            axes,
            None if "hx" not in self.extra else (state, state) if "LSTM" in self.form else state,
            {0: N} if "lengths" in self.extra else None,
            axes if "reset" in self.extra else None,
        )

    def export(self, module: nn.Module) -> torch.export.ExportedProgram:
        torch._dynamo.reset()
        return torch.export.export(
            module, self.inputs(*SHAPES[0]), dynamic_shapes=self.dynamic(), strict=self.strict
        )


class Caller(nn.Module):
    """A module that takes all by position; what there is none of is not passed on."""

    def __init__(self, module: nn.Module, extra: list[str]) -> None:
        super().__init__()
        self.module = module
        self.keywords = [name for name in ("lengths", "reset") if name in extra]

    def forward(self, x: Tensor, hx: Any, lengths: Any, reset: Any) -> Any:
        given = {"lengths": lengths, "reset": reset}
        return self.module(x, hx, **{name: given[name] for name in self.keywords})


BOTH: dict[str, Any] = {"bidirectional": True}
CASES = {
    "RNN": Case("RNN", {"num_layers": 2, "batch_first": True}),
    "RNN-relu": Case("RNN-relu", BOTH, "hx", strict=True),
    "RNN-lengths": Case("RNN", BOTH, "hx lengths"),
    "RNN-float64": Case("RNN", {}, dtype=torch.float64),
    "LSTM": Case("LSTM", {**BOTH, "num_layers": 2, "batch_first": True}, "hx"),
    "LSTM-lengths": Case("LSTM", {**BOTH, "num_layers": 2}, "hx lengths"),
    "LSTM-reset": Case("LSTM", {**BOTH, "batch_first": True}, "hx lengths reset"),
    "LSTM-bfloat16": Case("LSTM", BOTH, dtype=torch.bfloat16),
    "LSTM-proj": Case("LSTM-proj", BOTH, "hx", strict=True),
    "LSTM-proj-lengths": Case("LSTM-proj", {"bias": False}, "hx lengths"),
    "GRU": Case("GRU", {"bias": False}),
    "GRU-lengths": Case("GRU", {**BOTH, "batch_first": True}, "lengths", strict=True),
    "GRU-reset": Case("GRU", {"num_layers": 2}, "reset", strict=True),
    "GRU-float16": Case("GRU", {"batch_first": True}, dtype=torch.float16),
    **{kind: Case(kind, {}) for kind in CELLS},
}


def operators(program: torch.export.ExportedProgram) -> Counter[str]:
    names = (str(node.target) for node in program.graph.nodes if node.op == "call_function")
    return Counter(name for name in names if "getitem" not in name)


def of_aten(found: Counter[str]) -> bool:
    return all(name.startswith(("aten.", "<built-in function")) for name in found)


def layers_of(found: Counter[str]) -> int:
    recurrent = ("aten.lstm.", "aten.gru.", "aten.rnn_")
    return sum(count for name, count in found.items() if name.startswith(recurrent))


# What the child does: rnnkern cannot be imported there.
CHILD = """
import json, pathlib, sys
import torch
sys.modules["rnnkern"] = None
found = {}
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.pt2")):
    module = torch.export.load(path).module()
    try:
        for inputs, expected in torch.load(path.with_suffix(".pt")):
            torch.testing.assert_close(module(*inputs), expected)
        found[path.stem] = ""
    except Exception as error:
        found[path.stem] = repr(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def programs() -> dict[str, tuple[nn.Module, torch.export.ExportedProgram]]:
    torch.manual_seed(0)
    made = {}
    for name, case in CASES.items():
        module = case.build()
        made[name] = module, case.export(module)
    return made


@pytest.fixture(scope="module")
def elsewhere(programs: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong with each program, saved and loaded where rnnkern is not installed."""
    folder = tmp_path_factory.mktemp("programs")
    for name, (module, program) in programs.items():
        torch.export.save(program, folder / f"{name}.pt2")
        given = [CASES[name].inputs(*shape) for shape in SHAPES]
        # In 16 bits torch's operators round in each step, which rnnkern's kernels do not.
        wide = CASES[name].dtype in WIDE_DTYPES
        expected = module if wide else rnnkern.revert(copy.deepcopy(module))
        with torch.no_grad():
            torch.save([(own, expected(*own)) for own in given], folder / f"{name}.pt")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(folder)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_a_program_runs_where_rnnkern_is_not_installed(
    name: str, programs: Any, elsewhere: dict[str, str]
) -> None:
    """For any batch and time, of torch's operators alone."""
    assert elsewhere[name] == ""
    assert of_aten(operators(programs[name][1]))


@pytest.mark.parametrize(
    ("name", "nodes"),
    [("RNN", 2), ("LSTM", 2), ("LSTM-lengths", 4), ("LSTM-reset", 1), ("GRU-lengths", 2)],
)
def test_one_operator_a_layer(name: str, nodes: int, programs: Any) -> None:
    """With lengths, one a direction."""
    assert layers_of(operators(programs[name][1])) == nodes


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "loose"])
@pytest.mark.parametrize("form", FORMS)
def test_a_program_with_the_kernels(form: str, strict: bool) -> None:
    """Saved, loaded and run: what the module gives, bit for bit."""
    case = Case(form, {"num_layers": 2, "batch_first": True}, "reset", strict=strict)
    module, file = case.build(), io.BytesIO()
    with rnnkern.exporting_kernels():
        program = case.export(module)
    assert operators(program)["rnnkern.scan.default"] == 2
    torch.export.save(program, file)
    file.seek(0)
    run = torch.export.load(file).module()
    for shape in SHAPES:
        given = case.inputs(*shape)
        assert_bitwise(flatten(run(*given)), flatten(module(*given)))


@pytest.mark.parametrize(
    ("name", "nodes", "kept"),
    [
        ("RNN", 2, True),
        ("LSTM-lengths", 4, True),
        ("GRU-reset", 2, True),
        ("LSTMCell", 1, True),
        ("LSTM", 2, False),
        ("GRU-reset", 2, False),
    ],
)
def test_decompositions(name: str, nodes: int, kept: bool, programs: Any) -> None:
    """Of programs that keep rnnkern's operators, and of those that are torch's already."""
    case, (module, program) = CASES[name], programs[name]
    if kept:
        with rnnkern.exporting_kernels():
            program = case.export(module)
        assert not of_aten(operators(program))
    program = program.run_decompositions(rnnkern.decompositions())
    found = operators(program)
    assert of_aten(found)
    assert layers_of(found) == nodes
    run = program.module()
    for shape in SHAPES:
        given = case.inputs(*shape)
        torch.testing.assert_close(run(*given), module(*given))


def test_decompositions_with_those_of_torch(programs: Any) -> None:
    """Core ATen, but for the layers."""
    module, _ = programs["GRU"]
    program = CASES["GRU"].export(module)  # torch's table may change what it decomposes
    table = torch.export.default_decompositions()
    table.update(rnnkern.decompositions())
    found = operators(program.run_decompositions(table))
    assert found["aten.gru.input"] == 1
    assert "aten.new_zeros.default" not in found


def test_decompositions_of_torch_nn() -> None:
    module = nn.LSTM(4, 6, num_layers=2, bidirectional=True)
    x = torch.randn(5, 3, 4)
    program = torch.export.export(module, (x,)).run_decompositions(rnnkern.decompositions())
    assert operators(program)["aten.lstm.input"] == 2
    torch.testing.assert_close(program.module()(x), module(x))


def test_a_program_can_be_trained() -> None:
    module, x = build("LSTM", 4, 6, num_layers=2, dropout=0.5), torch.randn(5, 3, 4)
    program = torch.export.export(module, (x,), {"lengths": torch.tensor([5, 0, 2])})
    run = program.module()
    run(x, lengths=torch.tensor([1, 5, 3]))[0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in run.parameters())


@pytest.mark.parametrize("form", ["LSTM", "GRU"])
def test_padding_of_a_program_may_be_nan(form: str, programs: Any) -> None:
    module, program = programs[f"{form}-lengths"]
    x, *rest = CASES[f"{form}-lengths"].inputs(3, 7)
    expected = module(x, *rest)
    ended = torch.arange(7) >= rest[1][:, None]  # [N, T]
    x[ended if module.module.batch_first else ended.t()] = torch.nan
    torch.testing.assert_close(program.module()(x, *rest), expected)


def test_autocast_of_a_program() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = build("LSTM", 4, 6)

        def forward(self, x: Tensor) -> Any:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.rnn(x)

    module, x = Model().eval(), torch.randn(5, 3, 4)
    program = torch.export.export(module, (x,)).module()
    if torch_nn_autocasts_lstm():
        torch.testing.assert_close(program(x), rnnkern.revert(module)(x))
        return
    with without_onednn(True):  # results of a module are float32 then
        found, wanted = tree_leaves(program(x)), tree_leaves(rnnkern.revert(module)(x))
    for own, z in zip(found, wanted, strict=True):
        assert own.dtype == torch.bfloat16
        torch.testing.assert_close(own.float(), z, rtol=0, atol=1e-2)


# ONNX


def run_onnx(model: bytes, given: tuple[Any, ...]) -> list[Tensor]:
    """Results for the tensors of ``given``, in the order of the model's inputs."""
    own = pytest.importorskip("onnxruntime").InferenceSession(model)
    tensors = [t for t in tree_leaves(given) if isinstance(t, Tensor)]
    names = [each.name for each in own.get_inputs()]
    feed = {name: t.numpy() for name, t in zip(names, tensors, strict=True)}
    return [torch.from_numpy(z) for z in own.run(None, feed)]


def exported_to_onnx(module: Any, *given: Any, **options: Any) -> tuple[bytes, Counter[str]]:
    pytest.importorskip("onnxscript")
    torch._dynamo.reset()
    program = torch.onnx.export(module, *given, verbose=False, dynamo=True, **options)
    kinds = Counter(node.op_type for node in program.model.graph)
    return program.model_proto.SerializeToString(), kinds


ONNX = {
    "RNN": "RNN",
    "RNN-relu": "RNN",
    "LSTM-lengths": "LSTM",
    "LSTM-bfloat16": "LSTM",
    "GRU-lengths": "GRU",
    "GRU-float16": "GRU",
}
# With the translations given by hand, as one had to before torch's exporter found them.
BY_TABLE = [(name, True) for name in ("RNN-relu", "LSTM-lengths", "GRU-lengths")]


@pytest.mark.parametrize(("name", "by_table"), [*((name, False) for name in ONNX), *BY_TABLE])
def test_onnx(name: str, by_table: bool) -> None:
    """One node a layer, for any batch and time; what ONNX Runtime finds is what rnnkern finds."""
    case, kind = CASES[name], ONNX[name]
    module = case.build()
    table = {"custom_translation_table": rnnkern.onnx.translations()} if by_table else {}
    model, kinds = exported_to_onnx(
        module, case.inputs(*SHAPES[0]), dynamic_shapes=case.dynamic(), **table
    )
    layers = {k: n for k, n in kinds.items() if k in ("RNN", "LSTM", "GRU", "Loop")}
    assert layers == {kind: case.options.get("num_layers", 1)}
    if case.dtype == torch.bfloat16:  # which numpy has not
        assert kinds["Cast"] > 0
        return
    # In 16 bits ONNX Runtime rounds at the end alone.
    own = {} if case.dtype in WIDE_DTYPES else {"rtol": 0, "atol": torch.finfo(case.dtype).eps}
    for shape in SHAPES:
        given = case.inputs(*shape)
        torch.testing.assert_close(run_onnx(model, given), tree_leaves(module(*given)), **own)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_biases_do_not_open_the_gates_past_the_end_of_a_row(dtype: torch.dtype) -> None:
    """Beyond those of float16 too, in other dtypes."""
    most = 5e4 if dtype == torch.float16 else 1e6

    class Ragged(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = build("LSTM", 3, 4, dtype=dtype).requires_grad_(False)
            self.layer.bias_ih_l0[:4], self.layer.bias_ih_l0[4:8] = most, -most

        def forward(self, x: Tensor, lengths: Tensor) -> Any:
            return self.layer(x, lengths=lengths)

    module, x, lengths = Ragged(), torch.randn(5, 3, 3).to(dtype), torch.tensor([2, 5, 0])
    program = torch.export.export(module, (x, lengths)).module()
    own = {} if dtype in WIDE_DTYPES else {"rtol": 0, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(program(x, lengths), module(x, lengths), **own)


def test_programs_with_lengths_run_under_autocast_to_float16() -> None:
    """What holds the cell state past the end of a row is finite there."""
    case = CASES["LSTM-lengths"]
    module, given = case.build(), case.inputs(*SHAPES[0])
    program = torch.export.export(module, given).module()
    refused = not torch_nn_autocasts_lstm()
    with torch.no_grad(), torch.autocast("cpu", torch.float16), without_onednn(refused):
        found = program(*given)
    wanted = tree_leaves(module(*given))
    for own, z in zip(tree_leaves(found), wanted, strict=True):
        torch.testing.assert_close(own.float(), z, rtol=0, atol=1e-2)


def test_onnx_of_a_cell() -> None:
    module, x = build("LSTMCell", 4, 6).eval(), torch.randn(3, 4)
    model, _ = exported_to_onnx(module, (x,))
    torch.testing.assert_close(run_onnx(model, (x,)), tree_leaves(module(x)))


def test_onnx_of_a_program() -> None:
    """Of a program that torch.export has made before, RNNs too are one node each."""
    case = CASES["RNN"]
    module, given = case.build(), case.inputs(*SHAPES[0])
    program = torch.export.export(module, given)
    model, kinds = exported_to_onnx(program, custom_translation_table=rnnkern.onnx.translations())
    assert kinds["RNN"] == 2
    torch.testing.assert_close(run_onnx(model, given), tree_leaves(module(*given)))


def test_onnx_by_tracing() -> None:
    """``dynamo=False``: a layer within a model."""
    pytest.importorskip("onnx")
    module, file = nn.Sequential(build("GRU", 4, 6, bidirectional=True)).eval(), io.BytesIO()
    x = torch.randn(5, 3, 4)
    torch.onnx.export(module, (x,), file, dynamo=False)
    torch.testing.assert_close(run_onnx(file.getvalue(), (x,)), tree_leaves(module(x)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("LSTM-proj", "proj_size cannot be exported to ONNX, because no recurrent operator"),
        ("GRU-reset", "reset cannot be exported to ONNX, because no recurrent operator"),
    ],
)
def test_what_onnx_has_no_operator_for(name: str, message: str) -> None:
    case = CASES[name]
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match=message):
        exported_to_onnx(case.build(), case.inputs(*SHAPES[0]))


def test_a_cell_that_onnx_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(onnx._OPERATORS, "GRU")
    case = CASES["GRU"]
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="ONNX has no operator for"):
        exported_to_onnx(case.build(), case.inputs(*SHAPES[0]))


def test_importing_rnnkern_imports_no_exporter() -> None:
    code = (
        "import sys, torch; own = set(sys.modules); import rnnkern; print(*set(sys.modules) - own)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    exporters = ("onnx", "sympy", "torch._dynamo", "torch.export", "torch.fx.exp", "torch.onnx")
    assert [name for name in done.stdout.split() if name.startswith(exporters)] == []
