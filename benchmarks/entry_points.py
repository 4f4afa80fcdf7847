"""Every way to call a layer or a cell that is not the plain call, beside torch.nn.

    python -m benchmarks.entry_points [--threads N] [--seconds S] [--entry NAME,NAME]

A small layer (T=12, N=4, I=24, H=48) and a cell of the same sizes, because most of their time is
spent before the kernel. Both libraries are timed in turn, and a ratio is the median over pairs.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

import rnnkern
from benchmarks import rows
from benchmarks.rows import OURS, Effort, Row
from rnnkern.bench import timing

T, N, I, H = 12, 4, 24, 48
Call = Callable[[], object]
KINDS = ("RNN", "LSTM", "GRU")


class Place:
    """A layer and a cell of one library, with the same numbers for both libraries."""

    def __init__(self, library: ModuleType, kind: str) -> None:
        torch.manual_seed(0)
        self.is_ours = library is rnnkern
        self.layer = getattr(library, kind)(I, H)
        self.cell = getattr(library, f"{kind}Cell")(I, H)
        self.readout = nn.Linear(H, I)
        self.x, self.dy = torch.randn(T, N, I), torch.randn(T, N, H)
        self.step = torch.randn(N, I)
        state = torch.randn(N, H)
        self.state: Any = (state, state) if kind == "LSTM" else state

    def train(
        self, call: Callable[[], Tensor], *modules: nn.Module, dy: Tensor | None = None
    ) -> Call:
        parameters = [p for module in modules for p in module.parameters()]
        dy = self.dy if dy is None else dy

        def both() -> None:
            for parameter in parameters:
                parameter.grad = None
            call().backward(dy)

        return both


def no_grad(call: Call) -> Call:
    return torch.no_grad()(call)


def inference_mode(p: Place) -> Call:
    return torch.inference_mode()(lambda: p.layer(p.x))


def unbatched(p: Place) -> Call:
    return no_grad(lambda: p.layer(p.x[:, 0]))


def batch_first(p: Place) -> Call:
    layer, x = copy.deepcopy(p.layer), p.x.transpose(0, 1).contiguous()
    layer.batch_first = True
    return no_grad(lambda: layer(x))


def two_layers(p: Place) -> Call:
    kind = type(p.layer)
    layer = kind(I, H, num_layers=2, bidirectional=True)
    return no_grad(lambda: layer(p.x))


def gaps(p: Place) -> Call:
    x = torch.randn(T, N, 2 * I)[..., ::2]
    return no_grad(lambda: p.layer(x))


def packed(p: Place) -> Call:
    rows = pack_sequence([p.x[: T - 2 * n, n] for n in range(N)])
    return no_grad(lambda: p.layer(rows))


def packed_training(p: Place) -> Call:
    rows = pack_sequence([p.x[: T - 2 * n, n] for n in range(N)])
    dy = torch.randn(rows.data.shape[0], H)
    return p.train(lambda: p.layer(rows)[0].data, p.layer, dy=dy)


def autocast(p: Place) -> Call:
    def call() -> object:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return p.layer(p.x)

    return no_grad(call)


def autocast_training(p: Place) -> Call:
    def call() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return p.layer(p.x)[0].float()  # type: ignore[no-any-return]

    return p.train(call, p.layer)


def autocast_cell(p: Place) -> Call:
    def call() -> object:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return p.cell(p.step, p.state)

    return no_grad(call)


def weight_norm(p: Place) -> Call:
    layer = parametrizations.weight_norm(copy.deepcopy(p.layer), "weight_hh_l0")
    return p.train(lambda: layer(p.x)[0], layer)


def weight_norm_cell(p: Place) -> Call:
    cell = parametrizations.weight_norm(copy.deepcopy(p.cell), "weight_hh")
    return no_grad(lambda: cell(p.step, p.state))


def functional(p: Place) -> Call:
    parameters = dict(p.layer.named_parameters())
    return no_grad(lambda: functional_call(p.layer, parameters, (p.x,)))


def functional_cell(p: Place) -> Call:
    parameters = dict(p.cell.named_parameters())
    return no_grad(lambda: functional_call(p.cell, parameters, (p.step, p.state)))


def func_grad(p: Place) -> Call:
    parameters = {k: v.detach() for k, v in p.layer.named_parameters()}
    gradient = grad(lambda w: functional_call(p.layer, w, (p.x,))[0].sum())
    return lambda: gradient(parameters)


def func_grad_cell(p: Place) -> Call:
    parameters = {k: v.detach() for k, v in p.cell.named_parameters()}

    def loss(w: Any) -> Tensor:
        made = functional_call(p.cell, w, (p.step, p.state))
        return (made[0] if isinstance(made, tuple) else made).sum()

    gradient = grad(loss)
    return lambda: gradient(parameters)


def vmapped(p: Place) -> Call:
    x = torch.randn(3, T, N, I)
    call = vmap(lambda one: p.layer(one)[0])
    return no_grad(lambda: call(x))


def per_sample(p: Place) -> Call:
    parameters = {k: v.detach() for k, v in p.layer.named_parameters()}
    gradient = grad(lambda w, x: functional_call(p.layer, w, (x.unsqueeze(1),))[0].sum())
    each = vmap(gradient, (None, 1))
    return lambda: each(parameters, p.x)


def checkpointed(p: Place) -> Call:
    if p.is_ours:
        return p.train(lambda: rnnkern.checkpointed(p.layer, p.x, checkpoint_every=4)[0], p.layer)

    def segments() -> Tensor:
        state: Any = None
        made = []
        for part in p.x.split(4):
            y, state = checkpoint(p.layer, part, state, use_reentrant=False)
            made.append(y)
        return torch.cat(made)

    return p.train(segments, p.layer)


def generate(p: Place) -> Call:
    if p.is_ours:
        return no_grad(lambda: rnnkern.generate(p.layer, p.readout, p.x[0], T))

    def loop() -> object:
        x, state = p.x[:1], None
        made = []
        for _ in range(T):
            y, state = p.layer(x, state)
            x = p.readout(y)
            made.append(x)
        return torch.cat(made)

    return no_grad(loop)


def trace(p: Place) -> Call:
    """torch.nn shows no gates. So its side is its cell in a loop, which has the states."""
    if p.is_ours:
        return no_grad(lambda: rnnkern.inspect.trace(p.layer, p.x))

    def loop() -> object:
        state: Any = None
        made = []
        for x in p.x:
            state = p.cell(x, state)
            made.append(state)
        return made

    return no_grad(loop)


def hooked(p: Place) -> Call:
    layer = copy.deepcopy(p.layer)
    layer.register_forward_hook(lambda module, args, output: None)
    return no_grad(lambda: layer(p.x))


def saved_tensor_hooks(p: Place) -> Call:
    def call() -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            return p.layer(p.x)[0]  # type: ignore[no-any-return]

    return p.train(call, p.layer)


def deterministic(p: Place) -> Call:
    def call() -> None:
        torch.use_deterministic_algorithms(True)
        p.layer(p.x)
        torch.use_deterministic_algorithms(False)

    return no_grad(call)


def float64(p: Place) -> Call:
    layer, x = copy.deepcopy(p.layer).double(), p.x.double()
    return no_grad(lambda: layer(x))


def float16(p: Place) -> Call:
    layer, x = copy.deepcopy(p.layer).half(), p.x.half()
    return no_grad(lambda: layer(x))


def bfloat16_cell(p: Place) -> Call:
    cell, x = copy.deepcopy(p.cell).bfloat16(), p.step.bfloat16()
    return no_grad(lambda: cell(x))


ENTRIES: dict[str, Callable[[Place], Call]] = {
    entry.__name__: entry
    for entry in (
        inference_mode,
        unbatched,
        batch_first,
        two_layers,
        gaps,
        packed,
        packed_training,
        autocast,
        autocast_training,
        autocast_cell,
        weight_norm,
        weight_norm_cell,
        functional,
        functional_cell,
        func_grad,
        func_grad_cell,
        vmapped,
        per_sample,
        checkpointed,
        generate,
        trace,
        hooked,
        saved_tensor_hooks,
        deterministic,
        float64,
        float16,
        bfloat16_cell,
    )
}


def measure(name: str, effort: Effort) -> Row:
    """The row of one way to call. It has a time and a speed-up for each kind of module."""
    us, speedup = {}, {}
    for kind in KINDS:
        ours, theirs = (ENTRIES[name](Place(library, kind)) for library in (rnnkern, nn))
        samples = rows.in_turn(rows.without_refused({OURS: ours, "torch.nn": theirs}), effort)
        us[kind] = statistics.median(samples[OURS]) * 1e6
        if "torch.nn" in samples:
            speedup[f"{kind} over torch.nn"] = rows.ratio(samples, OURS, "torch.nn")
    table = f"ways to call, threads: {torch.get_num_threads()}"
    return {"table": table, "case": name, "us": us, "shown": [*us], "speedup": speedup}


def entry_points(effort: Effort, names: Iterable[str] = ENTRIES) -> Iterator[Row]:
    """Every way to call."""
    for name in list(names)[: 3 if effort.quick else None]:
        yield measure(name, effort)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each kind of module")
    parser.add_argument("--entry", default=",".join(ENTRIES))
    options = parser.parse_args()
    unknown = set(options.entry.split(",")) - set(ENTRIES)
    if unknown:
        parser.error(f"--entry: some of {','.join(ENTRIES)}, got {', '.join(sorted(unknown))}")
    print(f"{timing.cpu_name()}, torch {torch.__version__}")
    with timing.threads_set(options.threads):
        for made in entry_points(Effort(options.seconds), options.entry.split(",")):
            print(rows.line(made), flush=True)


if __name__ == "__main__":
    main()
