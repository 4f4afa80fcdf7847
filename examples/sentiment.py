"""Sentiment of sentences: batches of unequal lengths, without padding's cost and without packing.

    python examples/sentiment.py [--fast] [--torch] [--cell RNN|LSTM|GRU] [--data FILE]
    torchrun --nproc-per-node 2 examples/sentiment.py

Word embeddings, a recurrent layer and a readout of its last state: negative, neutral or positive.
rnnkern's layers take ``lengths``, torch.nn's a PackedSequence. Those of rnnkern take that too, so
both ways are compared. ``--data`` is a file in UTF-8, a sentence on each line: trees as those of
the Stanford Sentiment Treebank, or a label, a tab and the sentence. Without it there are sentences
written for this project. Every fifth is held out, and the epoch that reads those best is kept.
"""

# %%
from __future__ import annotations

import argparse
import re
import statistics
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from common import Trainer, Workers, arguments, fail, parser, run_in_turn, workers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

import rnnkern
from rnnkern.timing import clock_of, time_in_turn
from rnnkern.workloads import CELLS

OWN = Path(__file__).parent / "data" / "sentences.tsv"
CLASSES = ("negative", "neutral", "positive")
# A node of a tree: a label of five, and a word or the nodes below, each read already.
NODE = re.compile(r"\([0-4]\s+([^\s()]+|\0(\s*\0)*)\)")
CLASS_OF_NODE = {"0": 0, "1": 0, "2": 1, "3": 2, "4": 2}
HELD_OUT = 5  # one of so many sentences
FAST = {"epochs": 8}
LEAST = 0.6  # accuracy on the project's own sentences; guessing has 1/3
SHOWN = 6


# %%
class Sentence(NamedTuple):
    label: int
    words: list[str]


def read_tree(line: str, place: str) -> Sentence:
    """Of ``(3 (2 It) (4 works))``; the label is that of the root."""
    before, left = "", line
    while left != before:
        before, left = left, NODE.sub("\0", left)
    if left != "\0":
        fail(f"{place}: no tree as (3 (2 It) (4 works)), labels 0 to 4")
    return Sentence(CLASS_OF_NODE[line[1]], re.findall(r"([^\s()]+)\)", line.lower()))


def read_row(line: str, place: str) -> Sentence:
    label, tab, sentence = line.partition("\t")
    if not tab:
        fail(f"{place}: no tab between a label and a sentence")
    if label not in CLASSES:
        fail(f"{place}: unknown label {label}: choose from {', '.join(CLASSES)}")
    words = re.findall(r"[\w'-]+|[^\w\s]", sentence.lower())
    if not words:
        fail(f"{place}: no words after the label")
    return Sentence(CLASSES.index(label), words)


def read(path: Path) -> list[Sentence]:
    """The sentences of a file. Lines that are empty or begin with # are none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8: {error.reason} at byte {error.start}")
    numbered = [(i, line.strip()) for i, line in enumerate(lines, 1)]
    numbered = [(i, line) for i, line in numbered if line and not line.startswith("#")]
    if len(numbered) < HELD_OUT:
        fail(f"{path} has {len(numbered)} sentences, at least {HELD_OUT} are needed")
    parse = read_tree if numbered[0][1].startswith("(") else read_row
    return [parse(line, f"{path}, line {i}") for i, line in numbered]


class Batch(NamedTuple):
    tokens: Tensor  # [T, N]
    lengths: Tensor  # [N], on the CPU
    labels: Tensor  # [N]


class Data(NamedTuple):
    train: list[Sentence]
    held_out: list[Sentence]
    number: dict[str, int]  # of a word, from 1 on; all others are 0, as padding is


def split(sentences: list[Sentence]) -> Data:
    held_out = sentences[HELD_OUT - 1 :: HELD_OUT]
    train = [s for i, s in enumerate(sentences, 1) if i % HELD_OUT]
    # Words met once count as unknown, so that the model learns what to make of those.
    counts = Counter(word for sentence in train for word in sentence.words)
    known = [word for word, count in counts.items() if count > 1]
    return Data(train, held_out, {word: i for i, word in enumerate(known, 1)})


def batch_of(sentences: list[Sentence], number: dict[str, int], device: torch.device) -> Batch:
    rows = [torch.tensor([number.get(word, 0) for word in s.words]) for s in sentences]
    labels = torch.tensor([s.label for s in sentences])
    lengths = torch.tensor([len(row) for row in rows])
    return Batch(pad_sequence(rows).to(device), lengths, labels.to(device))


# %%
def likelihood_loss(y: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(y.clamp_min(1e-12).log(), labels)


def each_class_loss(y: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy(y, F.one_hot(labels, len(CLASSES)).to(y.dtype))


def distance_loss(y: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(y, 2.0 * F.one_hot(labels, len(CLASSES)) - 1)


class Output(NamedTuple):
    """A non-linearity of the readout, and the loss that goes with it."""

    of: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]


OUTPUTS = {
    "identity": Output(nn.Identity(), F.cross_entropy),
    "softmax": Output(nn.Softmax(-1), likelihood_loss),
    "sigmoid": Output(torch.sigmoid, each_class_loss),
    "tanh": Output(torch.tanh, distance_loss),  # 1 for the class, -1 for the others
}


class Classifier(nn.Module):
    """Embedding, a recurrent layer and a readout of its state after the last word.

    Args:
        library: whose layer it is, rnnkern or torch.nn.
        words: how many the embedding knows.
        phi_h: non-linearity of an RNN's state, tanh or relu.
        phi_y: non-linearity of the readout, a name of ``OUTPUTS``.
    """

    def __init__(
        self,
        library: ModuleType,
        cell: str,
        words: int,
        embedding: int,
        hidden: int,
        phi_h: str = "tanh",
        phi_y: str = "softmax",
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, embedding)
        nonlinearity = {"nonlinearity": phi_h} if cell == "RNN" else {}
        self.rnn = getattr(library, cell)(embedding, hidden, **nonlinearity)
        self.readout = nn.Linear(hidden, len(CLASSES))
        self.output = OUTPUTS[phi_y]
        self.packed = library is not rnnkern

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """For ``[T, N]`` gives ``[N, 3]``."""
        x = self.embedding(tokens)
        if self.packed:
            _, state = self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
        else:
            _, state = self.rnn(x, lengths=lengths)
        h = state[0] if isinstance(state, tuple) else state
        return self.output.of(self.readout(h[-1]))


# %%
def time_of_ways(model: Classifier, batch: Batch) -> dict[str, float]:
    """Microseconds of forward and backward in each way that the layer knows.

    Their outputs and gradients must agree.
    """

    def run(packed: bool) -> tuple[Tensor, ...]:
        model.packed = packed
        y = model(batch.tokens, batch.lengths)
        loss = model.output.loss(y, batch.labels)
        return (y, *torch.autograd.grad(loss, list(model.parameters())))

    before = model.packed
    ways = {"lengths": partial(run, False), "PackedSequence": partial(run, True)}
    if before:
        del ways["lengths"]
    else:
        torch.testing.assert_close(run(False), run(True), rtol=1e-4, atol=1e-5)
    samples = time_in_turn(
        list(ways.values()), budget_s=1.0, min_rounds=5, clock=clock_of(batch.tokens.device)
    )
    model.packed = before
    return {way: statistics.median(s) * 1e6 for way, s in zip(ways, samples, strict=True)}


class Result(NamedTuple):
    found: list[int]  # classes of the held-out sentences
    us: dict[str, float]
    padding: float  # share of all steps of padded batches


def experiment(library: ModuleType, options: argparse.Namespace, crew: Workers) -> Result:
    data = options.sentences
    sizes = (len(data.number) + 1, options.embedding, options.hidden)
    model = Classifier(library, options.cell, *sizes, options.phi_h or "tanh", options.phi_y)
    generator = torch.Generator().manual_seed(options.seed)
    held_out = batch_of(data.held_out, data.number, crew.device)

    def batches(epoch: int) -> list[Batch]:
        order = torch.randperm(len(data.train), generator=generator).split(options.rows)
        return [
            batch_of([data.train[i] for i in crew.own(rows)], data.number, crew.device)
            for rows in order
            if len(rows) >= crew.world
        ]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return OUTPUTS[options.phi_y].loss(model(batch.tokens, batch.lengths), batch.labels)

    def read(model: nn.Module) -> Tensor:
        return model(held_out.tokens, held_out.lengths).argmax(1)

    def score(model: nn.Module) -> float:
        return (read(model) == held_out.labels).float().mean().item()

    steps = [batch.lengths for batch in batches(0)]
    padding = 1 - sum(map(Tensor.sum, steps)) / sum(len(n) * n.max() for n in steps)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.rate)
    with crew.folder() as folder:
        best = (options.model if library is rnnkern else None) or folder / "best.pt"
        trainer = Trainer(crew, model, optimizer, loss, score, best, clip=1.0)
        trainer.fit(options.epochs, batches)
    with torch.no_grad():
        found = read(model).tolist()
    return Result(found, time_of_ways(model, batches(0)[0]), float(padding))


# %%
def report(result: Result, sentences: list[Sentence], crew: Workers) -> float:
    """Prints a result and gives the accuracy."""
    both = Counter(zip((s.label for s in sentences), result.found, strict=True))
    accuracy = sum(both[i, i] for i in range(len(CLASSES))) / len(sentences)
    crew.say(f"{accuracy:.1%} of {len(sentences)} held-out sentences right; rows: true, found:")
    crew.say(" " * 10, *(f"{name:>9}" for name in CLASSES))
    for i, name in enumerate(CLASSES):
        crew.say(f"{name:>10}", *(f"{both[i, k]:9d}" for k in range(len(CLASSES))))
    for sentence, k in list(zip(sentences, result.found, strict=True))[:SHOWN]:
        mark = "" if sentence.label == k else f" (is {CLASSES[sentence.label]})"
        crew.say(f"    {CLASSES[k]}{mark}: {' '.join(sentence.words)}")
    return accuracy


def check(options: argparse.Namespace) -> None:
    """Ends the script where an option makes no sense, before any work."""
    if options.cell not in CELLS:
        fail(f"unknown cell {options.cell}: choose from {', '.join(CELLS)}")
    if options.phi_h is not None and options.cell != "RNN":
        fail(f"--phi-h is for RNN, {options.cell} has its own non-linearities")
    if options.phi_h not in (None, "tanh", "relu"):
        fail(f"unknown --phi-h {options.phi_h}: choose from tanh, relu")
    if options.phi_y not in OUTPUTS:
        fail(f"unknown --phi-y {options.phi_y}: choose from {', '.join(OUTPUTS)}")
    for name in ("embedding", "hidden", "rows", "epochs", "rate"):
        if getattr(options, name) <= 0:
            fail(f"--{name} must be above 0, got {getattr(options, name)}")
    if options.model is not None and not options.model.parent.is_dir():
        fail(f"{options.model.parent} is no directory")


# %%
def main() -> None:
    made = parser(__doc__)
    made.add_argument("--data", type=Path, help="trees, or labels and sentences")
    made.add_argument("--cell", default="RNN", help=f"one of {', '.join(CELLS)}")
    made.add_argument("--phi-h", help="of an RNN's state: tanh, relu; tanh unless given")
    made.add_argument("--phi-y", default="softmax", help=f"of the readout: {', '.join(OUTPUTS)}")
    made.add_argument("--embedding", type=int, default=100)
    made.add_argument("--hidden", type=int, default=256)
    made.add_argument("--epochs", type=int, default=20)
    made.add_argument("--rows", type=int, default=8, help="of all processes together")
    made.add_argument("--rate", type=float, default=0.001, help="of Adam")
    made.add_argument("--model", type=Path, help="where to keep the best one; nowhere unless given")
    options = arguments(made, FAST)
    check(options)
    data = options.sentences = split(read(options.data or OWN))

    with workers() as crew:
        if options.rows < crew.world:
            fail(f"--rows {options.rows} are fewer than {crew.world} processes")
        crew.say(
            f"{len(data.train)} sentences to train with, {len(data.held_out)} held out, "
            f"{len(data.number)} words met more than once"
        )
        crew.say("score: the share of held-out sentences read rightly")
        runs = run_in_turn(experiment, options, crew)
        padding = runs[0].result.padding
        crew.say(f"padding is {padding:.0%} of the steps of a padded batch, and not computed")
        for run in runs:
            times = ", ".join(f"by {way} {us:.0f} us" for way, us in run.result.us.items())
            crew.say(f"{run.library}: a batch forward and backward {times}")
        for run in runs:
            crew.say(f"{run.library}:")
            accuracy = report(run.result, data.held_out, crew)
            assert options.data or accuracy > LEAST, f"{accuracy:.1%} right, too few"


# %%
if __name__ == "__main__":
    main()
