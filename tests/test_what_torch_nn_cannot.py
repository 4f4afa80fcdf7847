"""What torch.nn cannot do, for the table of docs/torch.md.

Other tests show that rnnkern can. If a test fails here, change the row of the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import LAYERS, build, compiled, loss_of, weights_of
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def _vmapped(m: nn.Module, x: Tensor) -> Any:
    return vmap(lambda a: m(a)[0])(torch.stack((x, x)))


def _ensemble(m: nn.Module, x: Tensor) -> Any:
    weights = {name: torch.stack((w, w)) for name, w in weights_of(m).items()}
    return vmap(loss_of(m), (0, None))(weights, x)


def _per_sample(m: nn.Module, x: Tensor) -> Any:
    return vmap(grad(loss_of(m)), (None, 0))(weights_of(m), torch.stack((x, x)))


def _forward_mode(m: nn.Module, x: Tensor) -> Any:
    return jvp(lambda a: m(a)[0], (x,), (x,))


def _exported(m: nn.Module, x: Tensor) -> Any:
    shapes = ({0: torch.export.Dim("time", max=99)},)
    return torch.export.export(m, (x,), dynamic_shapes=shapes, strict=False)


def _in_onnx(m: nn.Module, x: Tensor) -> None:
    """Run for another number of steps."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    shapes = ({0: "time", 1: "batch"},)
    program = torch.onnx.export(m.eval(), (x,), dynamic_shapes=shapes, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    y, *_ = session.run(None, {session.get_inputs()[0].name: torch.cat((x, x)).numpy()})
    assert len(y) == 2 * len(x), "time is fixed"


CANNOT: dict[str, tuple[Callable[[nn.Module, Tensor], Any], tuple[str, ...], str]] = {
    "lengths": (lambda m, x: m(x, lengths=torch.tensor([3, 2])), LAYERS, "lengths"),
    "reset": (lambda m, x: m(x, reset=torch.zeros(3, 2).bool()), LAYERS, "reset"),
    "compile": (lambda m, x: compiled(m)(x), LAYERS, "RNN, GRU, or LSTM"),
    "export": (_exported, LAYERS, "Constraints violated"),
    # From 2.15 on torch's exporter makes an LSTM node for any time.
    "onnx": (
        _in_onnx,
        ("LSTM",) if torch.__version__ < "2.15" else (),
        "static shape|time is fixed",
    ),
    "vmap": (_vmapped, LAYERS, "Batching rule not implemented"),
    "ensemble": (_ensemble, LAYERS, "Batching rule not implemented"),
    "per-sample": (_per_sample, ("RNN", "GRU"), "doesn't match the broadcast shape"),
    "forward-mode": (_forward_mode, ("LSTM",), "forward AD"),
}


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("what", "kind"), [(what, kind) for what, (_, kinds, _) in CANNOT.items() for kind in kinds]
)
def test_what_torch_nn_cannot(what: str, kind: str) -> None:
    call, _, message = CANNOT[what]
    x = torch.randn(3, 2, 2)
    call(build(kind, 2, 3), x)
    with pytest.raises(Exception, match=message):
        call(getattr(nn, kind)(2, 3), x)
