"""A character language model: training, sampling, and what its neurons have learned.

    python examples/char_lm.py [--fast] [--torch] [--cell LSTM] [--text FILE]
    torchrun --nproc-per-node 2 examples/char_lm.py

Reads the text of a file, else Python's own help topics. Trains by truncated back-propagation
through time: several streams of the text side by side, each block begun from the state that the
block before ended in. The last tenth of the text is for the test, the tenth before it for
validation: the epoch that predicts it best is chosen. Its model predicts the test text, once.

Freezes the model for inference, with weights in bfloat16 and in int8, and predicts the test text
with these, too. Then draws a sample, and looks into the trained layer with one trace of the test
text. The pictures are named after ``--out``: char_lm_neurons.png, the neurons that follow the text
most closely; char_lm_unit.png, one of them with its gates; char_lm_gates.png, how often gates are
saturated; char_lm_states.png, the path of the state. An RNN has no gates, and so only the first and
the last.
"""

# %%
from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import (
    Trainer,
    Workers,
    above_zero,
    arguments,
    expect,
    expect_files,
    fail,
    named,
    read_text,
    run_in_turn,
    training_parser,
    workers,
)
from features import FEATURES
from torch import Tensor, nn

import rnnkern
from rnnkern import plot
from rnnkern.bench.workloads import CELLS
from rnnkern.inspect import Trace

FAST = {"hidden": 64, "epochs": 3, "steps": 32, "rate": 0.01, "dropout": 0.0}
FAST_CHARACTERS = 100_000
EMBEDDING = 64
CLIP = 1.0
LAST_RATE = 0.05  # of the first
WARM_UP = 200  # characters read before sampling
SAMPLED = 2000  # characters drawn, to time one
PRINTED = 300
STRETCHES = 8  # of test text: half to choose neurons on, the first one to show
LENGTH = 1200  # characters in each, if the text is long enough
LEAST = 64  # characters in each
SHOWN = 500  # characters in a picture
DRAWN = 5  # neurons at most
WEAKEST = 0.2  # correlation of a neuron that is drawn
PARTS = {
    "h": "hidden state",
    "c": "cell state",
    "i": "input gate",
    "f": "forget gate",
    "g": "candidate",
    "o": "output gate",
    "r": "reset gate",
    "z": "update gate",
    "n": "candidate",
}


# %% The text
class Corpus(NamedTuple):
    """A text as numbers of its characters."""

    characters: list[str]
    train: Tensor
    validation: Tensor
    test: Tensor
    entropy: float  # of a single character, in bits

    def text(self, numbers: Tensor) -> str:
        return "".join(self.characters[i] for i in numbers.tolist())


def read(path: Path | None) -> str:
    if path is None:
        # Topics repeat one another. Each paragraph once: held-out text must be new.
        paragraphs = "".join(topics[name] for name in sorted(topics)).split("\n\n")
        return "\n\n".join(dict.fromkeys(paragraphs))
    return read_text(path)


def prepare(options: argparse.Namespace) -> Corpus:
    text = read(options.text)
    if options.fast:
        text = text[:FAST_CHARACTERS]
    needed = 10 * max(options.streams * (options.steps + 1), STRETCHES * LEAST)
    name = options.text or "the text"
    if len(text) < needed:
        wanted = f"{options.streams} streams in blocks of {options.steps} steps need {needed}"
        fail(f"{name} is too short: {len(text)} characters, where {wanted}")
    characters = sorted(set(text))
    if len(characters) < 2:
        fail(f"{name} has one character only, {characters[0]!r}: at least 2 are needed")
    number = {c: i for i, c in enumerate(characters)}
    numbers = torch.tensor([number[c] for c in text])
    share = numbers.bincount() / len(text)
    entropy = -(share * share.log2()).sum().item()
    tenth = len(text) // 10
    train, validation, test = numbers.split([len(text) - 2 * tenth, tenth, tenth])
    return Corpus(characters, train, validation, test, entropy)


def streams(numbers: Tensor, count: int) -> Tensor:
    """Equal stretches of the text, ``[count, T]``."""
    return numbers[: len(numbers) // count * count].view(count, -1)


def blocks(side_by_side: Tensor, steps: int) -> list[Tensor]:
    """Of streams, ``[steps + 1, N]`` each: the last characters are the next block's first."""
    starts = range(0, side_by_side.shape[1] - steps, steps)
    return [side_by_side[:, i : i + steps + 1].t().contiguous() for i in starts]


# %% The model
class CharModel(nn.Module):
    """Reads characters, ``[T, N]``; gives the logits of those that follow, ``[T, N, V]``."""

    def __init__(self, library: ModuleType, options: argparse.Namespace, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, EMBEDDING)
        self.rnn = getattr(library, options.cell)(EMBEDDING, options.hidden, options.layers)
        self.dropout = nn.Dropout(options.dropout)
        self.readout = nn.Linear(options.hidden, characters)

    def forward(self, characters: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        output, state = self.rnn(self.embedding(characters), state)
        return self.readout(self.dropout(output)), state


class Truncated:
    """Cross entropy, block after block; the state goes on, gradients end at the block's first step.

    Args:
        blocks: of one epoch.
    """

    def __init__(self, blocks: Sequence[Tensor]) -> None:
        self.blocks = blocks
        self.state: Any = None

    def epoch(self) -> Sequence[Tensor]:
        self.state = None
        return self.blocks

    def loss(self, model: nn.Module, block: Tensor) -> Tensor:
        logits, state = model(block[:-1], self.state)
        is_pair = isinstance(state, tuple)
        self.state = tuple(z.detach() for z in state) if is_pair else state.detach()
        return F.cross_entropy(logits.flatten(0, 1), block[1:].flatten())

    def bits(self, model: nn.Module) -> float:
        """A character's mean cross entropy over the epoch."""
        losses = [self.loss(model, block) for block in self.epoch()]
        return torch.stack(losses).mean().item() / math.log(2)


def sample(model: CharModel, given: Tensor, count: int, temperature: float) -> Tensor:
    """Characters that follow those given, each drawn from what the model says, ``[count]``."""
    drawn = []

    def feedback(output: Tensor) -> Tensor:
        logits = model.readout(output)
        shares = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
        drawn.append(torch.multinomial(shares, 1).squeeze(-1))
        return model.embedding(drawn[-1])

    with torch.no_grad():
        x = model.embedding(given.unsqueeze(1))
        _, state = model.rnn(x[:-1])
    rnnkern.generate(model.rnn, feedback, x[-1], count, state)
    return torch.cat(drawn).cpu()


# %% The experiment
class Result(NamedTuple):
    corpus: Corpus
    model: CharModel
    bits: float  # a character of the test text


def shown_bits(bits: float) -> str:
    return f"perplexity {2**bits:.3f}, {bits:.3f} bits per character"


def experiment(library: ModuleType, options: argparse.Namespace, crew: Workers) -> Result:
    corpus = prepare(options)
    crew.say(
        f"{library.__name__}: {options.cell}, layers: {options.layers}, hidden: {options.hidden}; "
        f"{len(corpus.train)} characters to train on, {len(corpus.validation)} for validation, "
        f"{len(corpus.test)} for the test, {len(corpus.characters)} different ones"
    )
    model = CharModel(library, options, len(corpus.characters))

    def truncated(side_by_side: Tensor) -> Truncated:
        return Truncated(blocks(side_by_side.to(crew.device), options.steps))

    training = truncated(crew.own(streams(corpus.train, options.streams)))
    validation = truncated(streams(corpus.validation, options.streams))
    optimizer = torch.optim.Adam(model.parameters(), options.rate)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, LAST_RATE, options.epochs)

    def score(model: nn.Module) -> tuple[float, str]:
        bits = validation.bits(model)
        return -bits, f"validation: {shown_bits(bits)} (unigram entropy {corpus.entropy:.3f})"

    def epoch(number: int) -> Sequence[Tensor]:
        if number:
            decay.step()
        return training.epoch()

    with crew.best_file(library, options) as best:
        trainer = Trainer(crew, model, optimizer, training.loss, score, best, clip=CLIP)
        trainer.fit(options.epochs, epoch)
    with torch.no_grad():
        bits = truncated(streams(corpus.test, options.streams)).bits(model)
    return Result(corpus, model, bits)


FROZEN = {"bfloat16": (torch.bfloat16, 1.002), "int8": (torch.int8, 1.01)}
"""Weights of the model frozen for inference, and by what its perplexity may grow at most."""


def frozen_bits(result: Result, options: argparse.Namespace, weights: torch.dtype) -> float:
    """A character of the test text, of the model with weights of fewer bits."""
    test = Truncated(blocks(streams(result.corpus.test, options.streams), options.steps))
    with torch.no_grad():
        return test.bits(rnnkern.freeze(result.model, weights))


class Sample(NamedTuple):
    text: str
    microseconds: float  # for each character


def draw_sample(result: Result, temperature: float) -> Sample:
    """What the model writes after the first characters of the test text."""
    model, corpus = result.model, result.corpus
    given = corpus.test[:WARM_UP].to(model.readout.weight.device)
    start = time.perf_counter()
    drawn = sample(model, given, SAMPLED, temperature)
    spent = time.perf_counter() - start
    return Sample(corpus.text(drawn), 1e6 * spent / SAMPLED)


# %% The analysis
@dataclass
class Neuron:
    """The unit that follows a feature most closely."""

    feature: str
    layer: int
    kind: str  # h or c
    unit: int
    chosen: float  # its correlation with the feature on the text that it was chosen on
    new: float  # and on other text

    @property
    def name(self) -> str:
        return f"{PARTS[self.kind]} {self.unit} of layer {self.layer}"

    @property
    def sign(self) -> float:
        return math.copysign(1, self.chosen)

    @property
    def strength(self) -> float:
        """The smaller correlation; below 0 if the two have opposite signs."""
        return min(abs(self.chosen), self.sign * self.new)


def correlations(values: Tensor, features: Tensor) -> Tensor:
    """Of every column of values with every column of features, ``[K, F]``; 0 for a constant."""
    values, features = (
        F.normalize(z - z.mean(0), dim=0) for z in (values.double(), features.double())
    )
    return values.t() @ features


def best_neurons(seen: Trace, features: Tensor) -> list[Neuron]:
    """One for each of ``features``, ``[T, N, F]``; chosen on the second half of N alone."""
    places, states = [], []
    for number, (layer,) in enumerate(seen.layers):
        for kind, values in (("h", layer.h), ("c", layer.c)):
            if values is not None:
                places += [(number, kind, unit) for unit in range(values.shape[-1])]
                states.append(values)
    values = torch.cat(states, -1)
    new, chosen = (
        correlations(v.flatten(0, 1), f.flatten(0, 1))
        for v, f in zip(values.chunk(2, 1), features.chunk(2, 1), strict=True)
    )
    best = chosen.abs().argmax(0)
    return [
        Neuron(name, *places[k], chosen[k, i].item(), new[k, i].item())
        for i, (name, k) in enumerate(zip(FEATURES, best.tolist(), strict=True))
    ]


def pictures(options: argparse.Namespace) -> dict[str, Path]:
    """Their files, by what they show."""
    parts = (
        ("neurons", "states") if options.cell == "RNN" else ("neurons", "unit", "gates", "states")
    )
    return {part: named(options.out, part) for part in parts}


def scaled(values: Tensor) -> tuple[float, Tensor]:
    """The largest of the values, and the values divided by it."""
    largest = values.abs().max().clamp_min(1e-6)
    return largest.item(), values / largest


def draw_neurons(seen: Trace, best: Sequence[Neuron], text: str, shown: slice, path: Path) -> None:
    """``text[shown]``, coloured by several neurons, with signs such that red marks a feature."""
    names, values = [], []
    for n in best:
        states = getattr(seen.layers[n.layer][0], n.kind)[shown, 0, n.unit]
        largest, row = scaled(n.sign * (states - states.mean()))
        minus = "minus " if n.sign < 0 else ""
        names.append(
            f"{n.feature}: {minus}{n.name}, less its mean, divided by {largest:.2g}; "
            f"r = {n.sign * n.new:.2f} on other text"
        )
        values.append(row)
    plot.string_heatmap(
        text[shown],
        torch.stack(values),
        path,
        names=names,
        label="state, less its mean, divided by the largest such distance",
        title="Neurons that follow the text: red where the feature is there or large",
    )


def draw_unit(seen: Trace, n: Neuron, text: str, shown: slice, path: Path) -> None:
    """``text[shown]``, coloured by the states and the gates of one unit."""
    layer = seen.layers[n.layer][0]
    names, values, gates = [], [], []
    for part, states in {"c": layer.c, "h": layer.h, **layer.gates}.items():
        if states is not None:
            name, row = f"{PARTS[part]} {part}", states[shown, 0, n.unit]
            if part == "c":
                largest, row = scaled(row)
                name = f"{name}, divided by its largest value, {largest:.2g}"
            names.append(name)
            values.append(row)
            gates.append(part in plot.SIGMOIDS)
    plot.string_heatmap(
        text[shown],
        torch.stack(values),
        path,
        names=names,
        gates=gates,
        label="state or candidate",
        title=f"States and gates of unit {n.unit} of layer {n.layer}, "
        f"whose {PARTS[n.kind]} follows: {n.feature} (r = {n.new:.2f})",
    )


def draw_path(states: Tensor, column: Tensor, what: str, path: Path) -> None:
    points, _ = plot.principal_components(states)
    explained = correlations(points, column.unsqueeze(1)).square().sum()
    plot.state_trajectory(
        states,
        path,
        colour=column,
        label="characters since the newline",
        title=f"The path of the {what} along the same text. Its two main directions\n"
        f"explain {explained:.0%} of the variance of the place in the line",
    )


def analyse(result: Result, options: argparse.Namespace) -> None:
    """One trace of the test text, and what is to be seen in it."""
    model, corpus = result.model.cpu(), result.corpus
    length = min(LENGTH, len(corpus.test) // STRETCHES)
    numbers = corpus.test[: STRETCHES * length].view(STRETCHES, length)
    with torch.no_grad():
        seen = rnnkern.inspect.trace(model.rnn, model.embedding(numbers.t()))

    text = corpus.text(numbers.flatten())
    features = torch.tensor([feature(text) for feature in FEATURES.values()], dtype=torch.float64)
    features = features.t().view(STRETCHES, length, -1).transpose(0, 1)
    neurons = best_neurons(seen, features)
    print(f"correlations: {'closest neuron':>42}{'where chosen':>16}{'on other text':>16}")
    for n in neurons:
        print(f"  {n.feature:28}{n.name:>26}{n.chosen:16.2f}{n.new:16.2f}")

    paths = pictures(options)
    begin = text.find("\n", length // 6, length // 2) + 1  # a line's, after some to warm up on
    shown = slice(begin, min(begin + SHOWN, length))
    by_unit: dict[str, Neuron] = {}
    for neuron in sorted(neurons, key=lambda n: -n.strength):
        if neuron.strength >= WEAKEST:
            by_unit.setdefault(neuron.name, neuron)
    best = list(by_unit.values())[:DRAWN]
    if not best:
        print(f"no neuron follows the text: all correlations are below {WEAKEST}")
        paths = {part: path for part, path in paths.items() if part in ("gates", "states")}
    if "neurons" in paths:
        draw_neurons(seen, best, text, shown, paths["neurons"])
    if "unit" in paths:
        draw_unit(seen, best[0], text, shown, paths["unit"])
    if "gates" in paths:
        plot.gate_saturation(seen, paths["gates"])
    last = seen.layers[-1][0]
    kind = "h" if last.c is None else "c"
    states = getattr(last, kind)[shown, 0]
    draw_path(states, features[shown, 0, 0], PARTS[kind], paths["states"])
    print("pictures:", *paths.values())


# %%
def check(options: argparse.Namespace) -> None:
    """Ends the script where an option makes no sense, before any work."""
    above_zero(options, "layers", "epochs", "streams", "steps", "rate", "temperature")
    if options.hidden < 2:
        fail(f"--hidden must be at least 2, got {options.hidden}: a plane shows the states")
    if not 0 <= options.dropout < 1:
        fail(f"--dropout must be at least 0 and below 1, got {options.dropout}")
    expect_files(*pictures(options).values(), options.model)


def main() -> None:
    made = training_parser(__doc__, "char_lm.png")
    made.add_argument("--text", type=Path, help="a file in UTF-8; without it Python's help topics")
    made.add_argument("--cell", choices=CELLS, default="LSTM")
    made.add_argument("--layers", type=int, default=1)
    made.add_argument("--hidden", type=int, default=256)
    made.add_argument("--dropout", type=float, default=0.3, help="of the layer's output")
    made.add_argument("--epochs", type=int, default=10)
    made.add_argument("--streams", type=int, default=16, help="of all processes together")
    made.add_argument("--steps", type=int, default=64, help="of a block")
    made.add_argument("--rate", type=float, default=0.005, help="of Adam, at first")
    made.add_argument("--temperature", type=float, default=0.7, help="of the sample")
    options = arguments(made, FAST, judged_with=("temperature",))
    check(options)
    with workers() as crew:
        if options.streams % crew.world:
            fail(f"--streams {options.streams} do not divide among {crew.world} processes")
        measure = partial(draw_sample, temperature=options.temperature)
        runs = run_in_turn(experiment, options, crew, measure)
        for run in runs:
            us = run.measured.microseconds
            crew.say(
                f"{run.library}: test: {shown_bits(run.result.bits)}; {us:.0f} us each sampled"
            )
        result = runs[0].result
        for name, (weights, most) in FROZEN.items() if crew.device.type == "cpu" else ():
            bits = frozen_bits(result, options, weights)
            crew.say(f"frozen with weights in {name}: test: {shown_bits(bits)}")
            if options.judged:
                growth = 2 ** (bits - result.bits)
                expect(growth <= most, f"perplexity grew {growth:.4f} times in {name}")
        crew.say(f"sample at temperature {options.temperature}:\n{runs[0].measured.text[:PRINTED]}")
        if crew.speaks:
            analyse(runs[0].result, options)
        for run in runs if options.judged else ():
            limit = (0.9 if options.fast else 0.75) * run.result.corpus.entropy
            bits = run.result.bits
            expect(bits < limit, f"{run.library}: {bits:.3f} bits, not below {limit:.3f}")


# %%
if __name__ == "__main__":
    main()
