"""Sentiment of sentences: batches of unequal lengths, without padding's cost and without packing.

    python examples/sentiment.py [--fast] [--torch] [--cell RNN|LSTM|GRU] [--data FILE]
    torchrun --nproc-per-node 2 examples/sentiment.py

Word embeddings, a recurrent layer and a readout of its last state: negative, neutral or positive.
rnnkern's layers take ``lengths``, torch.nn's a PackedSequence. Those of rnnkern take that too, so
both ways are compared. ``--data`` is a file in UTF-8, a sentence on each line: trees as those of
the Stanford Sentiment Treebank, or a label, a tab and the sentence. Without it there are sentences
written for this project.

Every fifth sentence is held out. Of the others, every fifth is for validation: the epoch that reads
those best is chosen. Its model reads the held-out sentences, once, and so does naive Bayes, which
knows nothing of the order of words.
"""

# %%
from __future__ import annotations

import argparse
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from common import (
    EXAMPLES,
    Run,
    Trainer,
    Workers,
    above_zero,
    arguments,
    expect,
    expect_files,
    fail,
    read_text,
    run_in_turn,
    training_parser,
    workers,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

import rnnkern
from rnnkern.bench.timing import clock_of, time_in_turn
from rnnkern.bench.workloads import CELLS

OWN = EXAMPLES / "data" / "sentences.tsv"
CLASSES = ("negative", "neutral", "positive")
# A node of a tree: a label of five, and a word or the nodes below, each read already.
NODE = re.compile(r"\([0-4]\s+([^\s()]+|\0(\s*\0)*)\)")
CLASS_OF_NODE = {"0": 0, "1": 0, "2": 1, "3": 2, "4": 2}
PART = 5  # one of so many sentences is held out, one of so many others for validation
FEWEST = 10  # sentences
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
    if "\t" in sentence:
        fail(f"{place}: {sentence.count(tab) + 2} columns, 2 expected: a label and a sentence")
    if label not in CLASSES:
        fail(f"{place}: unknown label {label}: choose from {', '.join(CLASSES)}")
    words = re.findall(r"[\w'-]+|[^\w\s]", sentence.lower())
    if not words:
        fail(f"{place}: no words after the label")
    return Sentence(CLASSES.index(label), words)


def read(path: Path) -> list[Sentence]:
    """The sentences of a file. Lines that are empty or begin with # are none."""
    lines = read_text(path).split("\n")
    numbered = [(i, line.strip()) for i, line in enumerate(lines, 1)]
    numbered = [(i, line) for i, line in numbered if line and not line.startswith("#")]
    if len(numbered) < FEWEST:
        fail(f"{path} has {len(numbered)} sentences, at least {FEWEST} are needed")
    parse = read_tree if numbered[0][1].startswith("(") else read_row
    return [parse(line, f"{path}, line {i}") for i, line in numbered]


class Batch(NamedTuple):
    tokens: Tensor  # [T, N]
    lengths: Tensor  # [N], on the CPU
    labels: Tensor  # [N]


class Data(NamedTuple):
    train: list[Sentence]
    validation: list[Sentence]
    held_out: list[Sentence]
    number: dict[str, int]  # of a word, from 1 on; all others are 0, as padding is


def without(sentences: list[Sentence], part: int) -> tuple[list[Sentence], list[Sentence]]:
    """All but each ``part``-th, and those."""
    return [s for i, s in enumerate(sentences, 1) if i % part], sentences[part - 1 :: part]


def split(sentences: list[Sentence]) -> Data:
    others, held_out = without(sentences, PART)
    train, validation = without(others, PART)
    # Words met once count as unknown, so that the model learns what to make of those.
    counts = Counter(word for sentence in train for word in sentence.words)
    known = [word for word, count in counts.items() if count > 1]
    return Data(train, validation, held_out, {word: i for i, word in enumerate(known, 1)})


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
        *,
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
def time_of_ways(result: Result, budget_s: float) -> dict[str, float]:
    """Microseconds of forward and backward in each way that the layer knows.

    Their outputs and gradients must agree.
    """
    model, batch = result.model, result.batch

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
        pairs = zip(run(False), run(True), strict=True)
        same = all(torch.allclose(ours, theirs, 1e-4, 1e-5) for ours, theirs in pairs)
        expect(same, "by lengths and by PackedSequence the results differ")
    samples = time_in_turn(
        list(ways.values()), budget_s=budget_s, min_rounds=5, clock=clock_of(batch.tokens.device)
    )
    model.packed = before
    return {way: statistics.median(s) * 1e6 for way, s in zip(ways, samples, strict=True)}


class Result(NamedTuple):
    found: list[int]  # classes of the held-out sentences
    model: Classifier
    batch: Batch  # one of those to train with
    padding: float  # share of all steps of padded batches


# %%
def experiment(
    library: ModuleType, options: argparse.Namespace, crew: Workers, data: Data
) -> Result:
    model = Classifier(
        library,
        options.cell,
        len(data.number) + 1,
        options.embedding,
        options.hidden,
        phi_h=options.phi_h or "tanh",
        phi_y=options.phi_y,
    )
    generator = torch.Generator().manual_seed(options.seed)
    validation = batch_of(data.validation, data.number, crew.device)

    def batches(epoch: int) -> list[Batch]:
        order = torch.randperm(len(data.train), generator=generator).split(options.rows)
        return [
            batch_of([data.train[i] for i in crew.own(rows)], data.number, crew.device)
            for rows in order
            if len(rows) >= crew.world
        ]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return OUTPUTS[options.phi_y].loss(model(batch.tokens, batch.lengths), batch.labels)

    def read(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch.tokens, batch.lengths).argmax(1)

    def score(model: nn.Module) -> tuple[float, str]:
        right = (read(model, validation) == validation.labels).float().mean().item()
        return right, f"{right:.1%} of the validation sentences read rightly"

    first = batches(0)
    lengths = [batch.lengths for batch in first]
    padding = 1 - sum(map(Tensor.sum, lengths)) / sum(len(n) * n.max() for n in lengths)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.rate)
    with crew.best_file(library, options) as best:
        trainer = Trainer(crew, model, optimizer, loss, score, best, clip=1.0)
        trainer.fit(options.epochs, batches)
    with torch.no_grad():
        found = read(model, batch_of(data.held_out, data.number, crew.device)).tolist()
    return Result(found, model, first[0], float(padding))


def naive_bayes(data: Data) -> list[int]:
    """Classes of the held-out sentences by the words alone, from all other sentences.

    Every word counts one more than it is met.
    """
    words = [Counter[str]() for _ in CLASSES]
    classes = Counter(s.label for s in data.train + data.validation)
    for sentence in data.train + data.validation:
        words[sentence.label].update(sentence.words)
    different = len(set().union(*words))

    def likelihood(sentence: Sentence, k: int) -> float:
        total = words[k].total() + different
        each = (math.log((words[k][word] + 1) / total) for word in sentence.words)
        return math.log(classes[k] + 1) + sum(each)

    return [max(range(len(CLASSES)), key=partial(likelihood, s)) for s in data.held_out]


# %%
def count_right(found: list[int], sentences: list[Sentence]) -> int:
    return sum(k == s.label for k, s in zip(found, sentences, strict=True))


def report(run: Run, data: Data, crew: Workers) -> float:
    """Prints a result and gives the accuracy."""
    found, sentences = run.result.found, data.held_out
    right = count_right(found, sentences)
    by_words = count_right(naive_bayes(data), sentences)
    crew.say(
        f"{run.library}: {right} of {len(sentences)} held-out sentences read rightly, "
        f"{right / len(sentences):.1%}; by naive Bayes {by_words}, a difference of "
        f"{right - by_words:+d}; rows: true, found:"
    )
    both = Counter(zip((s.label for s in sentences), found, strict=True))
    crew.say(" " * 10, *(f"{name:>9}" for name in CLASSES))
    for i, name in enumerate(CLASSES):
        crew.say(f"{name:>10}", *(f"{both[i, k]:9d}" for k in range(len(CLASSES))))
    for sentence, k in list(zip(sentences, found, strict=True))[:SHOWN]:
        mark = "" if sentence.label == k else f" (is {CLASSES[sentence.label]})"
        crew.say(f"    {CLASSES[k]}{mark}: {' '.join(sentence.words)}")
    return right / len(sentences)


def check(options: argparse.Namespace) -> None:
    """Ends the script where an option makes no sense, before any work."""
    if options.phi_h is not None and options.cell != "RNN":
        fail(f"--phi-h is for RNN, {options.cell} has its own non-linearities")
    above_zero(options, "embedding", "hidden", "rows", "epochs", "rate")
    expect_files(options.model)


# %%
def main() -> None:
    made = training_parser(__doc__)
    made.add_argument("--data", type=Path, help="trees, or labels and sentences")
    made.add_argument("--cell", choices=CELLS, default="RNN")
    made.add_argument("--phi-h", choices=("tanh", "relu"), help="of an RNN's state; tanh if none")
    made.add_argument("--phi-y", choices=OUTPUTS, default="softmax", help="of the readout")
    made.add_argument("--embedding", type=int, default=100)
    made.add_argument("--hidden", type=int, default=256)
    made.add_argument("--epochs", type=int, default=20)
    made.add_argument("--rows", type=int, default=8, help="of all processes together")
    made.add_argument("--rate", type=float, default=0.001, help="of Adam")
    options = arguments(made, FAST)
    check(options)
    data = split(read(options.data or OWN))

    with workers() as crew:
        if options.rows < crew.world:
            fail(f"--rows {options.rows} are fewer than {crew.world} processes")
        crew.say(
            f"{len(data.train)} sentences to train with, {len(data.validation)} for validation, "
            f"{len(data.held_out)} held out, {len(data.number)} words met more than once"
        )
        measure = partial(time_of_ways, budget_s=0.1 if options.fast else 1.0)
        runs = run_in_turn(partial(experiment, data=data), options, crew, measure)
        padding = runs[0].result.padding
        crew.say(f"padding is {padding:.0%} of the steps of a padded batch, and not computed")
        for run in runs:
            times = ", ".join(f"by {way} {us:.0f} us" for way, us in run.measured.items())
            crew.say(f"{run.library}: a batch forward and backward {times}")
        for run in runs:
            accuracy = report(run, data, crew)
            if options.judged:
                expect(accuracy > LEAST, f"{run.library}: {accuracy:.1%} right, too few")


# %%
if __name__ == "__main__":
    main()
