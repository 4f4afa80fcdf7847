"""Digits read row by row: an image is a sequence, and each of its rows is a step.

    python examples/digits_rows.py [--recipes lstm64 relu100 tanh128 lstm128] [--fast] [--torch]
    python examples/digits_rows.py --data DIR
    torchrun --nproc-per-node 2 examples/digits_rows.py

The classifiers of three teaching notebooks: an LSTM of 64 trained by Adam, an RNN with relu of 100
trained by SGD, and an RNN with tanh and an LSTM of 128, which must pass 90 % and 97 %. DIR has the
four files of MNIST, plain or ``.gz``; without it, the digits are those of 8 x 8 pixels that come
with scikit-learn. There are few of these, so they are seen more often.

A sixth of the images to train with is kept for validation. The best epoch is the one that gives
their right digits the highest probability, on average: among few images, many epochs are equal in
accuracy. The model of that epoch reads the test images, once. Gradients are clipped where ``clip``
is given: without that, the RNN with relu diverges from some seeds. ``--model x.pt`` keeps the best
models in x_lstm64.pt and so on.
"""

# %%
from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from common import (
    Trainer,
    Workers,
    arguments,
    expect,
    expect_files,
    fail,
    named,
    run_in_turn,
    shown_seconds,
    training_parser,
    workers,
)
from idx import read_mnist
from torch import Tensor, nn

from rnnkern.plot import CYCLE, LINE_STYLES

FEW = 10_000  # images to train with: MNIST leaves 50000, the digits of scikit-learn 1199
MNIST = ((60_000, 28, 28), (10_000, 28, 28))  # to train with and to test with
FAST_IMAGES = 18_000  # of MNIST, with --fast
SHOWN = 8  # digits in the picture
SPAN = 17  # percent in the picture below the best of the worst model


# %%
@dataclass(frozen=True)
class Recipe:
    """A model and its training; ``limit`` is the share of test digits that it must get right."""

    title: str
    layer: Callable[[ModuleType, int], nn.RNNBase]
    optimizer: Callable[..., torch.optim.Optimizer]
    rate: float
    batch: int
    epochs: int  # of MNIST
    epochs_of_few: int
    limit: float
    fast_limit: float
    clip: float | None = None

    def epochs_for(self, images: int, fast: bool) -> int:
        if images >= FEW:
            return self.epochs
        return self.epochs_of_few // 4 if fast else self.epochs_of_few


RECIPES = {
    "lstm64": Recipe(
        "LSTM of 64, Adam with rate 0.01, batches of 64",
        lambda library, size: library.LSTM(size, 64, batch_first=True),
        torch.optim.Adam,
        rate=0.01,
        batch=64,
        epochs=1,
        epochs_of_few=30,
        limit=0.94,
        fast_limit=0.75,
    ),
    "relu100": Recipe(
        "RNN with relu of 100, SGD with rate 0.1, batches of 100",
        lambda library, size: library.RNN(size, 100, nonlinearity="relu", batch_first=True),
        torch.optim.SGD,
        rate=0.1,
        batch=100,
        epochs=6,  # 3000 steps
        epochs_of_few=100,
        limit=0.85,
        fast_limit=0.3,
        clip=3.0,
    ),
    "tanh128": Recipe(
        "RNN with tanh of 128, Adam with rate 0.001, batches of 32",
        lambda library, size: library.RNN(size, 128, batch_first=True),
        torch.optim.Adam,
        rate=0.001,
        batch=32,
        epochs=5,
        epochs_of_few=30,
        limit=0.9,
        fast_limit=0.7,
        clip=1.0,
    ),
    "lstm128": Recipe(
        "LSTM of 128, Adam with rate 0.005, batches of 32",
        lambda library, size: library.LSTM(size, 128, batch_first=True),
        torch.optim.Adam,
        rate=0.005,
        batch=32,
        epochs=5,
        epochs_of_few=40,
        limit=0.97,
        fast_limit=0.85,
        clip=1.0,
    ),
}


class Classifier(nn.Module):
    """Reads ``[N, rows, columns]``; gives ``[N, 10]``, from the output after the last row."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = layer
        self.head = nn.Linear(layer.hidden_size, 10)

    def forward(self, images: Tensor) -> Tensor:
        output, _ = self.rnn(images)
        return self.head(output[:, -1])


# %%
@dataclass(frozen=True)
class Images:
    """Images ``[N, rows, columns]`` from 0 to 1, and the digits that they are, ``[N]``."""

    pixels: Tensor
    digits: Tensor

    def __getitem__(self, rows: Tensor | slice) -> Images:
        return Images(self.pixels[rows], self.digits[rows])

    def __len__(self) -> int:
        return len(self.digits)

    def to(self, device: torch.device) -> Images:
        return Images(self.pixels.to(device), self.digits.to(device))


@dataclass(frozen=True)
class Parts:
    """To train with, to choose the best epoch by, and to test the chosen model with."""

    train: Images
    validation: Images
    test: Images
    is_judged: bool  # the limits are meant for MNIST and for the bundled digits


def load(options: argparse.Namespace) -> Parts:
    """The same parts whatever the seed."""
    shuffles = torch.Generator().manual_seed(0)
    if options.data is None:
        found = bundled_digits()
        found = found[torch.randperm(len(found), generator=shuffles)]
        test, found = found[: len(found) // 5], found[len(found) // 5 :]
        is_judged = True
    else:
        found, test = mnist(options.data, "train"), mnist(options.data, "t10k")
        if found.pixels.shape[1:] != test.pixels.shape[1:]:
            fail(f"{options.data}: the images of train and t10k differ in size")
        is_judged = (tuple(found.pixels.shape), tuple(test.pixels.shape)) == MNIST
        found = found[torch.randperm(len(found), generator=shuffles)]
    if options.fast:
        found = found[:FAST_IMAGES]
    parts = Parts(found[len(found) // 6 :], found[: len(found) // 6], test, is_judged)
    fewest = max(RECIPES[name].batch for name in options.recipes)
    if len(parts.train) < fewest or len(parts.validation) == 0 or len(test) == 0:
        fail(
            f"too few images: {len(found)} to train with in batches of {fewest}, "
            f"{len(test)} to test with"
        )
    return parts


def bundled_digits() -> Images:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        fail(
            "the digits of 8 x 8 pixels come with scikit-learn, which is not installed: "
            "pip install scikit-learn, or give --data DIR with the files of MNIST"
        )
    found = load_digits()
    return Images(torch.tensor(found.images).float() / 16, torch.tensor(found.target))


def mnist(folder: Path, part: str) -> Images:
    try:
        pixels, digits = read_mnist(folder, part)
    except (OSError, ValueError) as error:
        fail(f"{error}; --data must be a folder with the files of MNIST, plain or .gz")
    if len(digits) and digits.max() > 9:
        fail(f"{folder}: {part} has a label {digits.max()}, which is no digit")
    return Images(torch.tensor(pixels).float() / 255, torch.tensor(digits).long())


# %%
@dataclass(frozen=True)
class Outcome:
    """Of one model."""

    accuracies: list[float]  # on the validation images, after each epoch
    best: int  # epoch, from 1
    read: Tensor  # what the model of that epoch takes the test images for
    accuracy: float  # of that
    limit: float  # of that accuracy


@torch.no_grad()
def probabilities(model: nn.Module, pixels: Tensor) -> Tensor:
    return torch.cat([model(part).softmax(1) for part in pixels.split(1000)])


def accuracy(read: Tensor, digits: Tensor) -> float:
    return (read == digits).double().mean().item()


def train(
    name: str, library: ModuleType, options: argparse.Namespace, crew: Workers, parts: Parts
) -> Outcome:
    recipe = RECIPES[name]
    torch.manual_seed(options.seed)  # each model is the same alone and after the others
    model = Classifier(recipe.layer(library, parts.train.pixels.shape[2])).to(crew.device)
    shuffles = torch.Generator().manual_seed(options.seed)
    whole = len(parts.train) // recipe.batch * recipe.batch
    accuracies: list[float] = []

    def batches(epoch: int) -> list[Tensor]:
        order = torch.randperm(len(parts.train), generator=shuffles)[:whole]
        return [crew.own(rows) for rows in order.split(recipe.batch)]

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        batch = parts.train[rows]
        return nn.functional.cross_entropy(model(batch.pixels), batch.digits)

    def score(model: nn.Module) -> tuple[float, str]:
        found = probabilities(model, parts.validation.pixels)
        accuracies.append(accuracy(found.argmax(1), parts.validation.digits))
        mean = found.gather(1, parts.validation.digits[:, None]).mean().item()
        return mean, f"accuracy {accuracies[-1]:.2%}, probability of the right digit {mean:.4f}"

    epochs = recipe.epochs_for(len(parts.train), options.fast)
    with crew.best_file(library, options, name) as best_file:
        trainer = Trainer(
            crew,
            model,
            recipe.optimizer(model.parameters(), lr=recipe.rate),
            loss,
            score,
            best_file,
            clip=recipe.clip,
            log_every=500,
        )
        history = trainer.fit(epochs, batches)
    read = probabilities(model, parts.test.pixels).argmax(1)
    limit = recipe.fast_limit if options.fast else recipe.limit
    return Outcome(accuracies, history.best, read.cpu(), accuracy(read, parts.test.digits), limit)


def experiment(
    library: ModuleType, options: argparse.Namespace, crew: Workers, parts: Parts
) -> dict[str, Outcome]:
    on_device = {
        name: getattr(parts, name).to(crew.device) for name in ("train", "validation", "test")
    }
    parts = replace(parts, **on_device)
    outcomes = {}
    for name in options.recipes:
        recipe = RECIPES[name]
        images = len(parts.train)
        instead = f", because there are few; of MNIST's 50000 it is {recipe.epochs}"
        crew.say(f"\n{name} of {library.__name__}: {recipe.title}")
        crew.say(
            f"epochs: {recipe.epochs_for(images, options.fast)} of {images} images"
            f"{instead if images < FEW else ''}"
        )
        start = time.perf_counter()
        found = outcomes[name] = train(name, library, options, crew, parts)
        crew.say(
            f"{name}: {found.accuracy:.2%} of {len(found.read)} test digits right, "
            f"{shown_seconds(time.perf_counter() - start)}"
        )
    crew.say()
    return outcomes


# %%
def draw(outcomes: dict[str, Outcome], test: Images, path: Path) -> None:
    """Accuracy by epoch, and digits that the best of the models reads wrongly."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 7), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(8, 2))
    panel = above.subplots()
    for i, (name, found) in enumerate(outcomes.items()):
        panel.plot(
            range(1, len(found.accuracies) + 1),
            [100 * part for part in found.accuracies],
            LINE_STYLES[i],
            color=CYCLE[i],
            marker="o",
            markevery=[found.best - 1],
            label=f"{name}, {RECIPES[name].title}: {found.accuracy:.1%} of the test digits",
        )
    worst = min(max(found.accuracies) for found in outcomes.values())
    last = max(len(found.accuracies) for found in outcomes.values())
    panel.set_xscale("log")
    panel.set_xticks([epoch for epoch in (1, 2, 5, 10, 20, 50, 100) if epoch <= last])
    panel.xaxis.set_major_formatter("{x:g}")
    panel.minorticks_off()
    panel.set_ylim(max(0, 100 * worst - SPAN), 101)
    panel.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True))
    panel.set_xlabel("epoch")
    panel.set_ylabel("validation digits read right, %")
    panel.grid(alpha=0.3)
    above.legend(loc="outside lower center", frameon=False)
    panel.set_title(
        f"Digits read row by row, in {test.pixels.shape[1]} steps: what each classifier learns\n"
        "Dot: the best epoch. Below: how many test digits its model reads rightly",
        fontsize=11,
    )

    name, found = max(outcomes.items(), key=lambda item: item[1].accuracy)
    wrong = (found.read != test.digits).nonzero()[:, 0]
    below.suptitle(f"{name} reads {len(wrong)} of {len(test)} test digits wrongly", fontsize=11)
    for panel in (panels := below.subplots(1, SHOWN)):
        panel.axis("off")
    for panel, row in zip(panels, wrong.tolist(), strict=False):
        panel.imshow(test.pixels[row].numpy(), cmap="gray_r")
        panel.set_title(f"{test.digits[row]} read as {found.read[row]}", fontsize=9)
    figure.savefig(path, dpi=150)


# %%
def main() -> None:
    made = training_parser(__doc__, "digits_rows.png")
    made.add_argument(
        "--recipes",
        nargs="+",
        choices=RECIPES,
        default=list(RECIPES),
        metavar="NAME",
        help=f"what to train, of {', '.join(RECIPES)}",
    )
    made.add_argument("--data", type=Path, metavar="DIR", help="the files of MNIST")
    options = arguments(made, judged_with=("recipes", "data"))
    models = [named(options.model, name) for name in options.recipes] if options.model else []
    expect_files(options.out, *models)
    parts = load(options)
    options.judged = parts.is_judged
    with workers() as crew:
        pixels = " x ".join(map(str, parts.test.pixels.shape[1:]))
        crew.say(
            f"{len(parts.train)} images to train with, {len(parts.validation)} for validation, "
            f"{len(parts.test)} to test; {pixels} pixels"
        )
        runs = run_in_turn(partial(experiment, parts=parts), options, crew)
    if not crew.speaks:  # the best model is with the process that speaks
        return
    draw(runs[0].result, parts.test, options.out)
    print(f"picture: {options.out}")
    for run in runs if options.judged else ():
        for name, found in run.result.items():
            expect(
                found.accuracy >= found.limit,
                f"{name} of {run.library}: {found.accuracy:.1%} is below {found.limit:.0%}",
            )


# %%
if __name__ == "__main__":
    main()
