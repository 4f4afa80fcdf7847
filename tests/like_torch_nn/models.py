"""Optimizers, containers, and tools that take a whole model."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from support import CELLS
from torch import Tensor, nn

from like_torch_nn import (
    ROWS,
    H,
    I,
    Row,
    Side,
    attempt,
    first,
    loss_of,
    warned,
)

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "adam-fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
}


def trained(optimizer_of: Any) -> Row:
    def row(side: Side) -> Any:
        module = side.make()
        optimizer = optimizer_of(module.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(module(side.x())).backward()
            optimizer.step()
        state = optimizer.state_dict()["state"]
        return module.state_dict(), {key: list(value) for key, value in state.items()}

    return row


ROWS.add({f"trained-by-{name}": trained(make) for name, make in OPTIMIZERS.items()})


@ROWS.row()
def trained_by_lbfgs(side: Side) -> Any:
    module = side.make()
    optimizer = torch.optim.LBFGS(module.parameters(), 0.1, max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(module(side.x()))
        loss.backward()
        return loss

    return optimizer.step(closure), module.state_dict()


@ROWS.row()
def averaged_models(side: Side) -> Any:
    from torch.optim.swa_utils import AveragedModel

    module = side.make()
    averaged = AveragedModel(module)
    averaged.update_parameters(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    averaged.update_parameters(module)
    return list(averaged.state_dict()), averaged(side.x()), repr(averaged)


@ROWS.row()
def parameter_groups(side: Side) -> Any:
    """Weight decay for all but biases."""
    module = side.make()
    decayed = [p for name, p in module.named_parameters() if "bias" not in name]
    rest = [p for name, p in module.named_parameters() if "bias" in name]
    optimizer = torch.optim.SGD([{"params": decayed, "weight_decay": 1.0}, {"params": rest}], 0.1)
    loss_of(module(side.x())).backward()
    optimizer.step()
    return module.state_dict()


# Containers, and modules of which this one is a part.


@ROWS.row()
def containers(side: Side) -> Any:
    listed = nn.ModuleList([side.make(), side.make(bias=False)])
    named = nn.ModuleDict({"a": side.make(), "b": listed})
    chained = nn.Sequential(nn.Linear(I, I), side.make())
    return (
        [repr(each) for each in (listed, named, chained)],
        [list(each.state_dict()) for each in (listed, named, chained)],
        side.outcome(chained),
        [type(m).__name__ for m in named.modules()],
    )


@ROWS.row()
def lazy_neighbours(side: Side) -> Any:
    model = nn.Sequential(nn.LazyLinear(I), side.make())
    before = repr(model)
    return before, first(model(side.x())).shape, repr(model)


@ROWS.row()
def a_submodule_of_the_layer(side: Side) -> Any:
    class Mine(side.type):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            self.embed = nn.Linear(I, I)

        def forward(self, input: Tensor, hx: Any = None) -> Any:
            return super().forward(self.embed(input), hx)

    module = side.make(of=Mine)
    return side.outcome(module), repr(module), list(module.state_dict())


@ROWS.row()
def distributed_data_parallel_is_refused(side: Side) -> Any:
    return type(attempt(lambda: nn.parallel.DistributedDataParallel(side.make()))).__name__


@ROWS.row()
def wrapped_by_compile(side: Side) -> Any:
    """Not called: test_compile.py has calls."""
    module = side.make()
    wrapped = torch.compile(module, backend="eager")
    return list(wrapped.state_dict()), repr(wrapped), wrapped._orig_mod is module, wrapped.training


@ROWS.row(*CELLS)
def overrides_of_torch_function(side: Side) -> Any:
    seen: list[str] = []

    class Logged(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(getattr(func, "__name__", str(func)))
            return super().__torch_function__(func, types, args, kwargs or {})

    outputs = side.make()(side.x().as_subclass(Logged))
    return type(first(outputs)).__name__, f"{side.kind.lower()}" in " ".join(seen).replace("_", "")


# Tracing. test_compile.py, test_export.py and test_torch_func.py have the rest.


class Tagger(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class Stepper(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Any:
        return self.cell(x)


def _model(side: Side) -> nn.Module:
    model = Tagger(side.make()) if side.is_layer else Stepper(side.make())
    return model.eval()


@ROWS.row()
def fx_symbolic_trace(side: Side) -> Any:
    import torch.fx

    traced = torch.fx.symbolic_trace(_model(side))
    nodes = [(node.op, str(node.target)) for node in traced.graph.nodes]
    return nodes, traced(side.x()), traced.code


@ROWS.row("LSTM", "GRU", "GRUCell", "LSTMCell", "RNNCell")
def jit_script(side: Side) -> Any:
    scripted = torch.jit.script(_model(side))
    return scripted(side.x()), sorted(scripted.state_dict())


@ROWS.row()
def jit_trace(side: Side) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(_model(side), side.x())
        return traced(side.x()), sorted(traced.state_dict())


@ROWS.row("LSTM", "GRU", *CELLS)
def dynamic_quantization(side: Side) -> Any:
    from torch.ao.quantization import quantize_dynamic

    model = _model(side)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = quantize_dynamic(model, {side.type, nn.Linear}, dtype=torch.qint8)
    return [type(m).__module__.split(".")[:3] for m in small.children()]


@ROWS.row()
def quantization_aware_configuration(side: Side) -> Any:
    import torch.ao.quantization as quantization

    model = _model(side).train()
    model.qconfig = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = quantization.prepare_qat(model)
    return [type(m).__name__ for m in prepared.modules()]


@ROWS.row("LSTM", "GRU")
def gradients_through_a_model(side: Side) -> Any:
    model = Tagger(side.make())
    torch.manual_seed(1)
    nn.init.normal_(model.head.weight)
    nn.init.normal_(model.head.bias)
    return side.outcome(model)


@ROWS.row()
def warnings_of_a_plain_call(side: Side) -> Any:
    return warned(lambda: side.outcome(side.make()))


@ROWS.row()
def gradients_scaled(side: Side) -> Any:
    module = side.make()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(module(side.x()))).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    return module.state_dict(), scaler.get_scale()


@ROWS.row()
def optimizer_state_loaded(side: Side) -> Any:
    module = side.make()
    one, other = (torch.optim.Adam(module.parameters()) for _ in range(2))
    side.outcome(module)
    one.step()
    other.load_state_dict(one.state_dict())
    other.step()
    return module.state_dict()


@ROWS.row()
def compiled_in_place(side: Side) -> Any:
    module = side.make()
    module.compile(backend="eager")
    return list(module.state_dict()), repr(module), type(module).__name__
