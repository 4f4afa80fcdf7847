"""A character language model: training, sampling, and what its neurons have learned.

    python examples/char_lm.py [--fast] [--torch] [--cell LSTM] [--text FILE]
    torchrun --nproc-per-node 2 examples/char_lm.py

Reads the text of a file, else Python's own help topics. Trains by truncated back-propagation
through time: several streams of the text side by side, each block begun from the state that the
block before ended in. The last tenth of the text is kept for validation.

Then draws a sample, and looks into the trained layer with one trace of held-out text. The pictures
are named after ``--out``: char_lm_neurons.png, the neurons that follow the text most closely;
char_lm_unit.png, one of them with its gates; char_lm_gates.png, how often gates are saturated;
char_lm_states.png, the path of the state. An RNN has no gates, and so only the first and the last.
The best model is kept beside them, in char_lm.pt.
"""

# %%
from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import Trainer, Workers, arguments, fail, parser, run_in_turn, workers
from torch import Tensor, nn

import rnnkern
from rnnkern import plot
from rnnkern.inspect import Trace
from rnnkern.workloads import CELLS

FAST = {"hidden": 64, "epochs": 8, "steps": 32, "rate": 0.01, "dropout": 0.0}
FAST_CHARACTERS = 100_000
EMBEDDING = 64
CLIP = 1.0
LAST_RATE = 0.05  # of the first
WARM_UP = 200  # characters read before sampling
SAMPLED = 2000  # characters drawn, to time one
PRINTED = 300
STRETCHES = 8  # of held-out text: half to choose neurons on, the first one to show
LENGTH = 1200  # characters in each, if the text is long enough
LEAST = 64  # characters in each
SHOWN = 500  # characters in a picture
DRAWN = 5  # neurons
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
    held_out: Tensor
    entropy: float  # of a single character, in bits

    def text(self, numbers: Tensor) -> str:
        return "".join(self.characters[i] for i in numbers.tolist())


def read(path: Path | None) -> str:
    if path is None:
        # Topics repeat one another. Each paragraph once: held-out text must be new.
        paragraphs = "".join(topics[name] for name in sorted(topics)).split("\n\n")
        return "\n\n".join(dict.fromkeys(paragraphs))
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8: {error.reason} at byte {error.start}")


def prepare(options: argparse.Namespace) -> Corpus:
    text = read(options.text)
    if options.fast:
        text = text[:FAST_CHARACTERS]
    needed = 10 * max(options.streams * (options.steps + 1), STRETCHES * LEAST)
    if len(text) < needed:
        name = options.text or "the text"
        wanted = f"{options.streams} streams in blocks of {options.steps} steps need {needed}"
        fail(f"{name} is too short: {len(text)} characters, where {wanted}")
    characters = sorted(set(text))
    number = {c: i for i, c in enumerate(characters)}
    numbers = torch.tensor([number[c] for c in text])
    held_out = len(text) // 10
    share = numbers.bincount() / len(text)
    entropy = -(share * share.log2()).sum().item()
    return Corpus(characters, numbers[:-held_out], numbers[-held_out:], entropy)


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
        logits = model.readout(output) / temperature
        drawn.append(torch.multinomial(logits.softmax(-1), 1).squeeze(-1))
        return model.embedding(drawn[-1])

    with torch.no_grad():
        x = model.embedding(given.unsqueeze(1))
        _, state = model.rnn(x[:-1])
    rnnkern.generate(model.rnn, feedback, x[-1], count, state)
    return torch.cat(drawn).cpu()


# %% The experiment
@dataclass
class Result:
    corpus: Corpus
    model: CharModel
    bits: float  # of validation, the best
    sample: str
    microseconds: float  # for each character of the sample


def experiment(library: ModuleType, options: argparse.Namespace, crew: Workers) -> Result:
    corpus = prepare(options)
    crew.say(
        f"{library.__name__}: {options.cell}, layers: {options.layers}, hidden: {options.hidden}; "
        f"{len(corpus.train)} characters to train on, {len(corpus.held_out)} held out, "
        f"{len(corpus.characters)} different ones"
    )
    model = CharModel(library, options, len(corpus.characters))
    own = crew.own(streams(corpus.train, options.streams)).to(crew.device)
    training = Truncated(blocks(own, options.steps))
    held_out = streams(corpus.held_out, options.streams).to(crew.device)
    validation = Truncated(blocks(held_out, options.steps))
    tried = []

    def score(model: nn.Module) -> float:
        tried.append(validation.bits(model))
        crew.say(
            f"validation: perplexity {2 ** tried[-1]:.3f}, {tried[-1]:.3f} bits per character "
            f"(unigram entropy {corpus.entropy:.3f})"
        )
        return -tried[-1]

    optimizer = torch.optim.Adam(model.parameters(), options.rate)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, LAST_RATE, options.epochs)

    def epoch(number: int) -> Sequence[Tensor]:
        if number:
            decay.step()
        return training.epoch()

    best = options.out.with_suffix(".pt")
    trainer = Trainer(crew, model, optimizer, training.loss, score, best, clip=CLIP)
    trainer.fit(options.epochs, epoch)
    given = corpus.held_out[:WARM_UP].to(crew.device)
    start = time.perf_counter()
    drawn = sample(model, given, SAMPLED, options.temperature)
    spent = time.perf_counter() - start
    return Result(corpus, model, min(tried), corpus.text(drawn), 1e6 * spent / SAMPLED)


# %% What neurons may follow: for every character, with the text up to it
def column(text: str) -> list[float]:
    """Characters since the newline, which is at 0."""
    found, place = [], 0
    for c in text:
        place = 0 if c == "\n" else place + 1
        found.append(place)
    return found


def indentation(text: str) -> list[float]:
    """Spaces that the line begins with, as far as it is read."""
    found, width, leading = [], 0, True
    for c in text:
        if c == "\n":
            width, leading = 0, True
        elif leading and c == " ":
            width += 1
        else:
            leading = False
        found.append(width)
    return found


def inside(text: str, pairs: dict[str, str]) -> list[float]:
    """How many opened ones are not closed yet; all are by the end of a paragraph.

    A mark that both opens and closes opens only where no letter comes before: an apostrophe does
    not.
    """
    found, opened = [], []
    for i, c in enumerate(text):
        if opened and c == opened[-1]:
            opened.pop()
        elif c in pairs and not (pairs[c] == c and (opened or text[i - 1 : i].isalnum())):
            opened.append(pairs[c])
        elif text[i - 1 : i + 1] == "\n\n":
            opened.clear()
        found.append(len(opened))
    return found


FEATURES: dict[str, Callable[[str], list[float]]] = {
    "position in the line": column,
    "log distance since newline": lambda text: [math.log1p(n) for n in column(text)],
    "indentation": indentation,
    "inside quotes": lambda text: inside(text, {"`": "`", "'": "'", '"': '"'}),
    "inside brackets": lambda text: inside(text, {"(": ")", "[": "]", "{": "}"}),
    "word start": lambda text: [
        c.isalnum() and not before.isalnum() for before, c in pairwise(f" {text}")
    ],
    "space": lambda text: [c == " " for c in text],
    "upper case": lambda text: [c.isupper() for c in text],
    "sentence end": lambda text: [c in ".!?" for c in text],
}


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
        return f"layer {self.layer}, {self.kind}[{self.unit}]"


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


def scaled(name: str, values: Tensor) -> tuple[str, Tensor]:
    """Values divided by the largest, and a name that says so."""
    largest = values.abs().max().clamp_min(1e-6)
    return f"{name} / {largest:.2g}", values / largest


def named(out: Path, what: str) -> Path:
    return out.with_stem(f"{out.stem}_{what}")


def draw_neurons(
    seen: Trace, neurons: Sequence[Neuron], text: str, shown: slice, options: argparse.Namespace
) -> list[Path]:
    """Two pictures of ``text[shown]``: several neurons; one, with its gates."""
    paths = [named(options.out, "neurons"), named(options.out, "unit")]
    by_unit: dict[str, Neuron] = {}
    for neuron in sorted(neurons, key=lambda n: -min(abs(n.chosen), abs(n.new))):
        by_unit.setdefault(neuron.name, neuron)
    best = list(by_unit.values())[:DRAWN]
    names, values = [], []
    for n in best:
        states = getattr(seen.layers[n.layer][0], n.kind)[shown, 0, n.unit]
        name, row = scaled(n.name, states)
        names.append(f"{name}: {n.feature}, correlation {n.new:.2f}")
        values.append(row)
    plot.string_heatmap(
        text[shown],
        torch.stack(values),
        paths[0],
        names=names,
        label="state, divided by its largest",
        title=f"{options.cell}: neurons that follow the text, on held-out text",
    )
    layer = seen.layers[best[0].layer][0]
    if not layer.gates:
        return paths[:1]
    names, values = [], []
    for part, states in {"c": layer.c, "h": layer.h, **layer.gates}.items():
        if states is not None:
            name, row = f"{part}, {PARTS[part]}", states[shown, 0, best[0].unit]
            name, row = scaled(name, row) if part == "c" else (name, row)
            names.append(name)
            values.append(row)
    plot.string_heatmap(
        text[shown],
        torch.stack(values),
        paths[1],
        names=names,
        title=f"{options.cell}: state and gates of unit {best[0].unit} of layer {best[0].layer} "
        f"({best[0].feature})",
    )
    return paths


def analyse(result: Result, options: argparse.Namespace) -> None:
    """One trace of held-out text, and what is to be seen in it."""
    model, corpus = result.model.cpu(), result.corpus
    length = min(LENGTH, len(corpus.held_out) // STRETCHES)
    numbers = corpus.held_out[: STRETCHES * length].view(STRETCHES, length)
    with torch.no_grad():
        seen = rnnkern.inspect.trace(model.rnn, model.embedding(numbers.t()))

    text = corpus.text(numbers.flatten())
    features = torch.tensor([feature(text) for feature in FEATURES.values()], dtype=torch.float64)
    features = features.t().view(STRETCHES, length, -1).transpose(0, 1)
    neurons = best_neurons(seen, features)
    print(f"correlations: {'closest neuron':>32}{'where chosen':>16}{'on other text':>16}")
    for n in neurons:
        print(f"  {n.feature:28}{n.name:>16}{n.chosen:16.2f}{n.new:16.2f}")

    begin = text.find("\n", length // 6, length // 2) + 1  # a line's, after some to warm up on
    shown = slice(begin, min(begin + SHOWN, length))
    paths = draw_neurons(seen, neurons, text, shown, options)
    last = seen.layers[-1][0]
    if last.gates:
        paths.append(named(options.out, "gates"))
        plot.gate_saturation(seen, paths[-1])
    paths.append(named(options.out, "states"))
    plot.state_trajectory(
        (last.h if last.c is None else last.c)[shown, 0],
        paths[-1],
        colour=features[shown, 0, 0],
        label="characters since the newline",
        title=f"{options.cell}: the path of the {'hidden' if last.c is None else 'cell'} state "
        "along the same text",
    )
    print("pictures:", *paths)


# %%
def check(options: argparse.Namespace) -> None:
    """Ends the script where an option makes no sense, before any work."""
    for name in ("layers", "hidden", "epochs", "streams", "steps", "rate", "temperature"):
        if not getattr(options, name) > 0:
            fail(f"--{name} must be above 0, got {getattr(options, name)}")
    if not 0 <= options.dropout < 1:
        fail(f"--dropout must be at least 0 and below 1, got {options.dropout}")


def main() -> None:
    made = parser(__doc__, "char_lm.png")
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
    options = arguments(made, FAST)
    check(options)
    with workers() as crew:
        if options.streams % crew.world:
            fail(f"--streams {options.streams} do not divide among {crew.world} processes")
        runs = run_in_turn(experiment, options, crew)
        for run in runs:
            crew.say(f"{run.library}: {run.result.microseconds:.0f} us for each character sampled")
            limit = (0.9 if options.fast else 0.75) * run.result.corpus.entropy
            assert run.result.bits < limit, f"{run.result.bits:.3f} bits, not below {limit:.3f}"
        result = runs[0].result
        crew.say(f"sample at temperature {options.temperature}:\n{result.sample[:PRINTED]}")
        if crew.speaks:
            analyse(result, options)


# %%
if __name__ == "__main__":
    main()
