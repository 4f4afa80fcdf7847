"""The recurrent parts of public models: stacks, both directions, packed batches, projections.

    python -m benchmarks.models [--model PART,...] [--threads N] [--seconds S]

Sizes of layers are those that the papers or the published code of the models name; lengths and
batches are ours, and short enough for a CPU. If a model has another variant of a cell, or if we are
not sure of its input, ``about`` says "in the manner of". Inference, and forward and backward of the
sum of the output, are compared with torch.nn in float32 and under autocast to bfloat16. A result in
float32 is checked before it is timed.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnkern
from benchmarks import rows
from benchmarks.rows import OURS, Call, Effort, Row
from rnnkern import tolerance
from rnnkern.bench import timing

INFERENCE, TRAINING = PASSES = ("inference", "forward and backward")


class Decoder(nn.Module):
    """Two cells in a loop over the steps, as a decoder with attention has them."""

    def __init__(self, I: int, context: int, H: int) -> None:
        super().__init__()
        self.attention, self.decoder = nn.LSTMCell(I + context, H), nn.LSTMCell(H + context, H)
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        first, second, outputs = None, None, []
        context = x.new_zeros(x.shape[1], self.context)
        for frame in x.unbind(0):
            first = self.attention(torch.cat([frame, context], -1), first)
            second = self.decoder(torch.cat([first[0], context], -1), second)
            outputs.append(second[0])
        return torch.stack(outputs)


class Layers(nn.Module):
    """Layers of different widths, one after the other."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(I, H) for I, H in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)[0]
        return x


@dataclass(frozen=True)
class Model:
    """The recurrent part of a model, and its input: T steps of N rows.

    ``kind`` is a class of torch.nn with its arguments ``sizes`` and ``options``, or one of this
    file. Packed batches have lengths from T down to a third of it.
    """

    name: str
    about: str
    kind: type[nn.Module]
    sizes: tuple[int, ...]
    T: int
    N: int
    options: dict[str, Any] = field(default_factory=dict)
    packed: bool = False
    passes: tuple[str, ...] = PASSES

    @property
    def case(self) -> str:
        """Its name, layers and input in words."""
        kind = {Decoder: "LSTMCell", Layers: "LSTM"}.get(self.kind, self.kind.__name__)
        own = [f"{name}={value}" for name, value in self.options.items()]
        sizes = "-".join(map(str, self.sizes))
        return ", ".join([f"{self.name}: {kind} {sizes}", *own, f"T{self.T} N{self.N}"]) + (
            ", packed" * self.packed
        )

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.kind(*self.sizes, **self.options)

    def input(self) -> Tensor | PackedSequence:
        torch.manual_seed(1)
        batch_first = self.options.get("batch_first", False)
        rows_of_batch = (self.N, self.T) if batch_first else (self.T, self.N)
        x = torch.randn(*rows_of_batch, self.sizes[0])
        if not self.packed:
            return x
        lengths = torch.linspace(self.T, max(1, self.T // 3), self.N).long()
        return pack_padded_sequence(x, lengths, batch_first=batch_first)


BOTH = {"bidirectional": True}
BATCH_FIRST = {"batch_first": True}
MODELS = (
    Model("Silero VAD", "in the manner of its version 5: one frame, 128 units", nn.LSTM, (128, 128),
          1, 1, passes=(INFERENCE,)),
    Model("DeepAR", "the default of GluonTS: 2 layers of 40 units; 40 features are ours", nn.LSTM,
          (40, 40), 96, 32, {"num_layers": 2} | BATCH_FIRST),
    Model("RecurrentPPO", "the default of Stable-Baselines3 Contrib: one layer of 256 units; 64 "
          "features are ours", nn.LSTM, (64, 256), 128, 8),
    Model("DPRNN", "Luo et al. 2020: 64 features, 128 units in each direction; rows are chunks",
          nn.LSTM, (64, 128), 100, 64, BOTH | BATCH_FIRST),
    Model("CRNN", "Shi et al. 2015: 2 layers of 256 units in each direction over 512 features",
          nn.LSTM, (512, 256), 26, 64, {"num_layers": 2} | BOTH),
    Model("Stanza tagger", "in the manner of its tagger: 2 layers of 200 units in each direction",
          nn.LSTM, (325, 200), 40, 32, {"num_layers": 2} | BOTH | BATCH_FIRST, packed=True),
    Model("Open-Unmix", "Stöter et al. 2019: 3 layers of 256 units in each direction",
          nn.LSTM, (512, 256), 128, 8, {"num_layers": 3} | BOTH),
    Model("pyannote", "the segmentation model: 4 layers of 128 units in each direction over 60 "
          "features of SincNet, 10 s of sound", nn.LSTM, (60, 128), 589, 4,
          {"num_layers": 4} | BOTH | BATCH_FIRST),
    Model("Tacotron 2 encoder", "Shen et al. 2018: 256 units in each direction over 512 features",
          nn.LSTM, (512, 256), 120, 16, BOTH | BATCH_FIRST, packed=True),
    Model("Tacotron 2 decoder", "Shen et al. 2018: two layers of 1024 units, cells in a loop",
          Decoder, (256, 512, 1024), 20, 16),
    Model("Denoiser", "Defossez et al. 2020, dns48: 2 layers of 768 units", nn.LSTM, (768, 768),
          62, 4, {"num_layers": 2}),
    Model("RNN-T prediction", "He et al. 2018: 2 layers of 2048 units, each with a projection to "
          "640", nn.LSTM, (640, 2048), 20, 16, {"num_layers": 2, "proj_size": 640}),
    Model("DeepSpeech 2", "in the manner of Amodei et al. 2016: layers of GRUs in both directions "
          "over 1312 features, here 6 of 400 units", nn.GRU, (1312, 400), 60, 8,
          {"num_layers": 6} | BOTH, packed=True),
    Model("AWD-LSTM", "Merity et al. 2017: 400-1150-1150-400", Layers, (400, 1150, 1150, 400), 35,
          20),
)  # fmt: skip


def _output(made: Any) -> Tensor:
    """Of a layer or of a module of this file, the output as a tensor."""
    first = made[0] if isinstance(made, tuple) and not isinstance(made, PackedSequence) else made
    return first.data if isinstance(first, PackedSequence) else first  # type: ignore[no-any-return]


def call_of(module: nn.Module, x: Any, pass_name: str, autocast: bool) -> Call:
    """A pass of a module."""

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return _output(module(x))

    def both() -> None:
        module.zero_grad()
        forward().float().sum().backward()

    return both if pass_name == TRAINING else forward


def check(model: Model, theirs: nn.Module, ours: nn.Module, x: Any) -> None:
    with torch.no_grad():
        exact = _output(copy.deepcopy(theirs).double()(x.double()))
        verdict = tolerance.check(_output(ours(x)), _output(theirs(x)), exact)
    if not verdict:
        raise SystemExit(f"{model.name}: wrong results: {verdict}")


def measure(model: Model, effort: Effort) -> Iterator[Row]:
    """A row of each pass, in float32 and under autocast."""
    theirs, x = model.build(), model.input()
    ours = rnnkern.convert(copy.deepcopy(theirs))
    check(model, theirs, ours, x)
    for pass_name, autocast in product(model.passes, (False, True)):
        with torch.set_grad_enabled(pass_name == TRAINING):
            calls = {
                name: call_of(module, x, pass_name, autocast)
                for name, module in ((OURS, ours), ("torch.nn", theirs))
            }
            samples = rows.in_turn(rows.without_refused(calls), effort)
        kind = "autocast to bfloat16" if autocast else "float32"
        threads = torch.get_num_threads()
        yield rows.row(f"models, {pass_name}, {kind}, threads: {threads}", model.case, samples)


def models(effort: Effort) -> Iterator[Row]:
    """All of them."""
    for model in MODELS[: 2 if effort.quick else None]:
        yield from measure(model, effort)


def main(arguments: list[str] | None = None) -> None:
    names = [model.name for model in MODELS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=",".join(names), help=f"some of {', '.join(names)}")
    parser.add_argument("--threads", type=int, help="of torch; as it is set unless given")
    parser.add_argument("--seconds", type=float, default=1.0, help="for a row")
    options = parser.parse_args(arguments)
    unknown = set(options.model.split(",")) - set(names)
    if unknown:
        parser.error(f"--model: some of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    print(f"{timing.cpu_name()}, torch {torch.__version__}")
    with timing.threads_set(options.threads):
        for model in MODELS:
            if model.name in options.model.split(","):
                print(f"{model.name}: {model.about}")
                for made in measure(model, Effort(options.seconds)):
                    print(f"  {rows.line(made)}", flush=True)


if __name__ == "__main__":
    main()
