"""The flag by which Dynamo is let into rnnkern's modules, in Dynamos that read it elsewhere."""

from __future__ import annotations

import ast
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import LAYERS, build
from torch import Tensor, nn

from rnnkern.interop.dynamo import _allow, _OfRnnkern

pytestmark = pytest.mark.cpu_only

# How a Dynamo may ask, as the body of a function of its own that is given a module.
ASKING = {
    "as today": "value = module; return isinstance(value, RNNs) and not config.allow_rnn",
    "another name": "mod = module; return not config.allow_rnn",
    "a variable": "self = Variable(module); return not config.allow_rnn",
    "flag first": "value = module; return not config.allow_rnn and isinstance(value, RNNs)",
}


def asks(body: str, module: Any, place: str = "torch._dynamo.variables.builder") -> bool:
    class Variable:
        def __init__(self, value: Any) -> None:
            self.value = value

    config = types.SimpleNamespace(allow_rnn=_OfRnnkern())
    space: dict[str, Any] = {
        "__name__": place,
        "config": config,
        "RNNs": nn.RNNBase,
        "Variable": Variable,
    }
    exec(f"def breaks(module):\n    given, module = module, module\n    {body}", space)
    return space["breaks"](module)  # type: ignore[no-any-return]


@pytest.mark.parametrize("place", ["variables.builder", "symbolic_convert"])
@pytest.mark.parametrize("way", ASKING)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_graph_breaks_at_torch_nns_modules_alone(kind: str, way: str, place: str) -> None:
    assert asks(ASKING[way], getattr(nn, kind)(3, 4), f"torch._dynamo.{place}")
    assert not asks(ASKING[way], build(kind, 3, 4), f"torch._dynamo.{place}")


def test_other_modules_do_not_matter() -> None:
    assert not asks(ASKING["flag first"], nn.Linear(3, 4))


@pytest.mark.parametrize("place", ["variables.builder", "symbolic_convert"])
def test_a_dynamo_that_does_not_tell_is_named(place: str) -> None:
    body = "del module, given; return not config.allow_rnn"
    with pytest.raises(RuntimeError, match=rf"{place}\.breaks.*Set torch\._dynamo\.config\.allow_"):
        asks(body, nn.LSTM(3, 4), f"torch._dynamo.{place}")


def test_who_copies_the_configuration_gets_a_false_number() -> None:
    assert asks("return not config.allow_rnn", None, "torch._dynamo.utils")
    assert _OfRnnkern() == 0
    assert ast.literal_eval(repr(_OfRnnkern())) is False


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of flags that torch no longer has
def test_the_configuration_can_be_written_and_stored() -> None:
    import torch._dynamo

    config = torch._dynamo.config
    ast.parse(config.codegen_config())
    config.load_config(config.save_config())
    assert graphs_of(Between(build("LSTM", 4, 6)), fullgraph=True) == 1


@pytest.mark.parametrize("flag", [True, "absent"])
def test_nothing_is_done_where_nothing_is_needed(flag: Any) -> None:
    config = types.ModuleType("config")
    if flag != "absent":
        config.allow_rnn = flag  # type: ignore[attr-defined]
    _allow(config)
    assert getattr(config, "allow_rnn", "absent") is flag


class Between(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.first, self.rnn, self.last = nn.Linear(4, 4), rnn, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rnn(self.first(x).tanh())[0]).tanh()


def graphs_of(model: nn.Module, *, fullgraph: bool) -> int:
    """How many graphs a call is compiled into; its result is that of the call itself."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward  # type: ignore[no-any-return]

    x = torch.randn(5, 3, 4)
    compiled = torch.compile(model, backend=backend, fullgraph=fullgraph)
    torch.testing.assert_close(compiled(x), model(x))
    return len(graphs)


def break_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a Dynamo that wraps the module and breaks the graph at its call."""
    from torch._dynamo.variables import builder, misc

    space = vars(builder)
    own = {"delayed": misc.DelayGraphBreakVariable, "wrapped": builder.VariableBuilder.wrap_module}
    for name, value in own.items():
        monkeypatch.setitem(space, name, value)
    exec(
        "def wrap_module_later(self, value):\n"
        "    if isinstance(value, torch.nn.RNNBase) and not config.allow_rnn:\n"
        "        return delayed(source=self.source, msg='a recurrent module is called')\n"
        "    return wrapped(self, value)\n",
        space,
    )
    monkeypatch.setattr(builder.VariableBuilder, "wrap_module", space.pop("wrap_module_later"))


@pytest.mark.parametrize("kind", LAYERS)
def test_a_dynamo_that_breaks_the_graph_later(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:

    break_later(monkeypatch)
    assert graphs_of(Between(build(kind, 4, 6)), fullgraph=True) == 1
    assert graphs_of(Between(getattr(nn, kind)(4, 6)), fullgraph=False) == 2


def test_a_dynamo_that_allows_all() -> None:
    import torch._dynamo

    with torch._dynamo.config.patch(allow_rnn=True):
        assert graphs_of(Between(build("LSTM", 4, 6)), fullgraph=True) == 1
        assert graphs_of(Between(nn.LSTM(4, 6)), fullgraph=True) == 1
