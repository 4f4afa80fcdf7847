"""Where torch sees operators only: compiled, exported, traced and counted; and the transforms of
torch.func.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_options import SETTINGS
from support import (
    DTYPES,
    FORMS,
    LAYERS,
    Seen,
    assert_bitwise,
    build,
    build_form,
    evaluate,
    flatten,
    leaves_for,
    plain,
)
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from rnnkern.layer import PACKED, Layer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


# torch.compile


# The operators themselves


def operands(form: str, setting: str, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    """Arguments of ``scan`` as they arrive in a call."""
    caught: list[Any] = []

    class Catch(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if function is torch.ops.rnnkern.scan_kernel.default:
                caught.append(args)
            return function(*args, **(kwargs or {}))

    option = SETTINGS[setting]
    module, leaves = option.make(form)
    module.to(dtype)
    with Catch(), torch.no_grad():
        option.call(module, {name: leaf.to(dtype) for name, leaf in leaves.items()})

    def fresh(tensor: Tensor) -> Tensor:
        copy = tensor.detach().clone(memory_format=torch.preserve_format)
        return copy.requires_grad_(copy.is_floating_point())

    given = tree_map(lambda t: fresh(t) if isinstance(t, Tensor) else t, caught[0])
    x, weights, code, _, *rest = given
    h0, c0, *steps = (*rest, *[None] * (6 - len(rest)))
    return (x, h0, c0, weights, *steps, bool(code & PACKED), *Layer.of_code(code), True)


def of_kernel(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same for ``scan_kernel``, whose tensors ask for no gradients."""
    plain = tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, args[:9])
    x, h0, c0, weights, *steps, packed = plain
    return (x, weights, Layer(*args[9:-1]).code + PACKED * packed, args[-1], h0, c0, *steps)


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "layers2"])
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form: str, setting: str) -> None:
    args = operands(form, setting)
    # A packed sequence's batch is in its batch sizes: no operator knows it while it is traced.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.rnnkern.scan, args, test_utils=utils)
    if setting in ("plain", "bidirectional", "lengths"):
        torch.library.opcheck(torch.ops.rnnkern.scan, args)
    x, h0, c0, weights, *rest = args
    with torch.no_grad():
        y, hn, cn, saved = torch.ops.rnnkern.scan(*args)
    flags = [True] * (1 + len(weights) + (h0 is not None) + (c0 is not None))
    flags[1] = False
    incoming = [torch.randn_like(z).requires_grad_() for z in (y, hn)]
    incoming.append(torch.randn_like(cn).requires_grad_() if cn.numel() else None)
    backward = (*incoming, x, h0, c0, weights, y, saved, *rest[:-1], flags)
    torch.library.opcheck(torch.ops.rnnkern.scan_backward, backward, test_utils=utils)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.rnnkern.scan_kernel, of_kernel(args), test_utils=utils)
    own_x, own_weights, code, _, *given = of_kernel(args)
    kept = saved if saved.numel() else None
    incoming = [None if z is None else z.detach() for z in incoming]
    backward = (own_x, own_weights, y, code, flags, *incoming, kept, *given)
    torch.library.opcheck(torch.ops.rnnkern.scan_backward_kernel, backward, test_utils=utils)


@pytest.mark.cpu_only
def test_opcheck_of_lengths() -> None:
    torch.library.opcheck(torch.ops.rnnkern.ranked, (torch.tensor([2, 0, 5]), 5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_operators_in_every_dtype(form: str, dtype: torch.dtype) -> None:
    """Through a mode that sees operators: what the kernels give, bit for bit."""
    module = build_form(form, 4, 6, dtype=dtype, batch_first=True)
    leaves = leaves_for(module, 5, 3)

    def watched(m: nn.Module, own: Any) -> Any:
        with Seen() as seen:
            result = plain(m, own)
        assert seen.names == ["scan_kernel"]
        return result

    assert_bitwise(evaluate(module, leaves, watched), evaluate(module, leaves))


@pytest.mark.parametrize("kind", LAYERS)
def test_make_fx(kind: str) -> None:
    module = build(kind, 4, 6)
    x = torch.randn(5, 3, 4)

    def loss(x: Tensor) -> Tensor:
        y, _ = module(x)
        return torch.autograd.grad(y.square().sum(), x)[0]

    graph = make_fx(loss, tracing_mode="symbolic", _allow_non_fake_inputs=True)(
        x.clone().requires_grad_()
    )
    names = [str(node.target) for node in graph.graph.nodes]
    assert [name for name in names if "rnnkern" in name] == [
        "rnnkern.scan_kernel.default",
        "rnnkern.scan_backward_kernel.default",
    ]
    other = torch.randn(7, 2, 4, requires_grad=True)
    assert torch.equal(graph(other), loss(other))


@pytest.mark.cpu_only
@pytest.mark.parametrize("form", FORMS)
def test_meta_tensors(form: str) -> None:
    """Shapes and strides without memory, forward and backward."""
    module = build_form(form, 4, 6, batch_first=True, bidirectional=True)
    real = flatten(module(torch.randn(3, 5, 4)))
    x = torch.randn(3, 5, 4, device="meta", requires_grad=True)
    meta = flatten(module.to("meta")(x))
    for name, tensor in meta.items():
        assert (tensor.shape, tensor.stride()) == (real[name].shape, real[name].stride())
    meta["out.0"].sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    y = flatten(module(x))["out.0"]
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    gradient.square().sum().backward()


def test_lazily_negated_input() -> None:
    module, x = build("GRU", 4, 6), torch.randn(5, 2, 4)
    negated = torch.complex(x, -x).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(module(negated)[0], module(x)[0], rtol=0, atol=0)


@pytest.mark.parametrize("kind", LAYERS)
def test_flops_are_counted(kind: str) -> None:
    module = build(kind, 4, 6)
    weights = sum(p.numel() for p in module.parameters() if p.dim() == 2)
    with FlopCounterMode(display=False) as counter:
        y, _ = module(torch.randn(5, 2, 4))
    assert counter.get_total_flops() == 2 * 5 * 2 * weights
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 4 * 5 * 2 * weights


# torch.func


# What torch.nn cannot do, for the table of docs/torch.md: rnnkern's part is tested above and in
# test_inspect.py, test_checkpoint.py. A test that fails here is good news, and a row to be changed.
