"""What the examples share: arguments, processes, a training loop, both libraries in turn."""

from __future__ import annotations

import argparse
import gc
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

import rnnkern
from rnnkern.plot import require_matplotlib

EXAMPLES = Path(__file__).parent
# What neither the data nor the hyperparameters of an experiment depend on.
NEUTRAL = {"fast", "torch", "seed", "threads", "repeats", "out", "model"}
MOST_THREADS = 1024


def parser(description: str, picture: str | None = None) -> argparse.ArgumentParser:
    """With the arguments that all experiments know; ``picture`` is the name of their PNG."""
    made = plain_parser(description)
    made.add_argument("--torch", action="store_true", help="the same on torch.nn, and both times")
    made.add_argument("--repeats", type=int, default=1, help="of the experiment, for its time")
    made.add_argument("--seed", type=int, default=0)
    if picture is not None:
        made.add_argument("--out", type=Path, default=Path(picture), help="the picture")
    return made


def plain_parser(description: str) -> argparse.ArgumentParser:
    """With the arguments that every script knows."""
    made = argparse.ArgumentParser(
        description=description.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("--fast", action="store_true", help="a small run, for tests")
    made.add_argument("--threads", type=int, help="of torch; as it is set unless given")
    return made


def training_parser(description: str, picture: str | None = None) -> argparse.ArgumentParser:
    """The same for an experiment that trains."""
    made = parser(description, picture)
    made.add_argument(
        "--model", type=Path, metavar="FILE", help="where to keep rnnkern's best; nowhere otherwise"
    )
    return made


def arguments(
    made: argparse.ArgumentParser,
    fast: Mapping[str, Any] | None = None,
    judged_with: Sequence[str] = (),
) -> argparse.Namespace:
    """The arguments of the command line; the defaults if a notebook runs the script cell by cell.

    ``fast`` holds other defaults, for ``--fast``. If there is to be a picture, it is checked that
    matplotlib can make it.

    The rule for results: a run on the project's own data and hyperparameters is judged, and ends
    the script if it is wrong. A run on the user's own is only reported. ``judged`` says which it
    is; ``judged_with`` are the options that may be given all the same.
    """
    given = [] if "ipykernel" in sys.modules else None
    options = made.parse_args(given)
    if options.fast and fast:
        made.set_defaults(**fast)
        options = made.parse_args(given)
    if not 0 <= getattr(options, "seed", 0) < 2**64:
        fail(f"--seed must be from 0 to 2**64 - 1, got {options.seed}")
    if "repeats" in options:
        above_zero(options, "repeats")
    if options.threads is not None:
        if not 1 <= options.threads <= MOST_THREADS:
            fail(f"--threads must be from 1 to {MOST_THREADS}, got {options.threads}")
        torch.set_num_threads(options.threads)
    if "out" in options:
        try:
            require_matplotlib(options.out)
        except (ModuleNotFoundError, ValueError) as error:
            fail(str(error))
    own = vars(options).keys() - NEUTRAL - set(judged_with)
    options.judged = all(getattr(options, name) == made.get_default(name) for name in own)
    return options


def above_zero(options: argparse.Namespace, *names: str) -> None:
    """Ends the script if one of the options is not."""
    for name in names:
        if not 0 < getattr(options, name) < math.inf:
            fail(f"--{name} must be above 0 and finite, got {getattr(options, name)}")


def named(path: Path, part: object) -> Path:
    """``x.png`` and a part of it: ``x_part.png``."""
    return path.with_stem(f"{path.stem}_{part}")


def expect_files(*paths: Path | None) -> None:
    """Ends the script if one of the files cannot be written, before the work for it."""
    for path in filter(None, paths):
        if not path.parent.is_dir():
            fail(f"{path.parent} is no directory")
        if path.is_dir():
            fail(f"{path} is a directory, no file can be written there")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            fail(f"{path} cannot be written")


def read_text(path: Path) -> str:
    """Of a file in UTF-8, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8: {error.reason} at byte {error.start}")


def fail(message: str) -> NoReturn:
    """Ends the script with a message and no traceback."""
    sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")


def expect(ok: bool, message: str) -> None:
    """Ends the script where its result is wrong: as assert, but under ``python -O`` too."""
    if not ok:
        fail(message)


@dataclass(frozen=True)
class Workers:
    """The processes that train together, and which this one is: one alone without torchrun."""

    rank: int
    world: int
    device: torch.device
    silent: bool = False

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def speaks(self) -> bool:
        return self.is_first and not self.silent

    def say(self, *words: object) -> None:
        if self.speaks:
            tqdm.write(" ".join(map(str, words)), file=sys.stdout)

    def copies(self, model: nn.Module) -> nn.Module:
        """The model on this process's device, its gradients averaged over all processes."""
        model = model.to(self.device)
        return DistributedDataParallel(model) if self.world > 1 else model

    def meet(self) -> None:
        """Waits for the others."""
        if self.world > 1:
            dist.barrier()

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A temporary folder, the same for all processes."""
        with tempfile.TemporaryDirectory() as own:
            shared = [own]
            if self.world > 1:
                dist.broadcast_object_list(shared, device=self.device)
            yield Path(shared[0])
            self.meet()  # no process needs the folder any longer

    @contextmanager
    def best_file(
        self, library: ModuleType, options: argparse.Namespace, part: str = ""
    ) -> Iterator[Path]:
        """Where to keep the best model of a training: ``--model`` is for rnnkern's, without it and
        for torch.nn's there is a temporary file. ``part`` names one of several models.
        """
        with self.folder() as folder:
            if library is rnnkern and options.model is not None:
                yield named(options.model, part) if part else options.model
            else:
                yield folder / "best.pt"

    def own(self, rows: Sequence[Any] | Tensor) -> Any:
        """This process's part of a batch: as many rows as every other has."""
        each = len(rows) // self.world
        return rows[self.rank * each : (self.rank + 1) * each]

    def progress(self, steps: Iterable[Any], title: str, **options: Any) -> Any:
        return tqdm(steps, desc=title, leave=False, disable=not self.speaks or None, **options)


@contextmanager
def workers() -> Iterator[Workers]:
    """Joins the processes that torchrun has started, and leaves them.

    Models must be gone by then: DistributedDataParallel as the last owner of a process group waits
    for threads that wait for Python's lock. So train in a function.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    use_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= world
    device = torch.device("cuda", rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if use_gpu else "gloo")
    crew = Workers(rank, world, device)
    yield crew
    if world > 1:
        gc.collect()  # FSDP2's modules are in reference cycles
        crew.meet()
        dist.destroy_process_group()


Experiment = Callable[[ModuleType, argparse.Namespace, Workers], Any]


@dataclass
class Run:
    """What an experiment gave on one library, the seconds it took, and what measuring found."""

    library: str
    result: Any
    seconds: float
    measured: Any = None


def run_in_turn(
    experiment: Experiment,
    options: argparse.Namespace,
    crew: Workers,
    measure: Callable[[Any], Any] | None = None,
) -> list[Run]:
    """An experiment on rnnkern and, with ``--torch``, on torch.nn; as often as ``--repeats`` says,
    in turn. Prints the medians of the times and of their ratios.

    The experiment computes and draws nothing; all begin from the same seed. ``measure`` is called
    with what it has given, when the clock has stopped. The first repeat alone is measured, prints
    and writes, and is what comes back.
    """
    if not options.judged:
        crew.say("own data or hyperparameters: the result is reported, not judged")
    torch.optim.SGD([torch.zeros(1)])  # the first one of a process takes a second to be made
    libraries = (("rnnkern", rnnkern), ("torch.nn", nn))[: 1 + options.torch]
    runs: list[Run] = []
    seconds: list[list[float]] = [[] for _ in libraries]
    for repeat in range(options.repeats):
        if repeat == 1:
            crew = replace(crew, silent=True)
            options = argparse.Namespace(**vars(options) | {"model": None})
        for (name, library), spent in zip(libraries, seconds, strict=True):
            torch.manual_seed(options.seed)
            start = time.perf_counter()
            result = experiment(library, options, crew)
            spent.append(time.perf_counter() - start)
            if repeat == 0:
                runs.append(Run(name, result, spent[0], measure(result) if measure else None))
    for run, spent in zip(runs, seconds, strict=True):
        run.seconds = statistics.median(spent)
    times = ", ".join(f"{run.library} {shown_seconds(run.seconds)}" for run in runs)
    ratios = [theirs / ours for ours, theirs in zip(*seconds, strict=True)] if options.torch else []
    ratio = f": {statistics.median(ratios):.2f}x" if ratios else ""
    of = f", medians of {options.repeats} runs" if options.repeats > 1 else ""
    replace(crew, silent=False).say(f"time: {times}{ratio}{of}")
    return runs


def shown_seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s"


@dataclass
class History:
    """Of a training: losses as logged, ``(step, loss)``, and scores, ``(epoch, score)``; the best
    epoch, of equal ones the last.
    """

    losses: list[tuple[int, float]] = field(default_factory=list)
    scores: list[tuple[int, float]] = field(default_factory=list)
    best: int = 0


class Trainer:
    """A small training loop: logs, validates after every epoch, keeps the best model in a file.

    Args:
        model: to train.
        optimizer: of its parameters.
        loss: of the model and a batch.
        score: of the model, higher is better, and what to say of it; None keeps the last model.
        best: where the best model is saved.
        clip: largest norm of all gradients together.
        log_every: steps between two lines.
    """

    def __init__(
        self,
        crew: Workers,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[nn.Module, Any], Tensor],
        score: Callable[[nn.Module], tuple[float, str]] | None,
        best: Path,
        *,
        clip: float | None = None,
        log_every: int = 100,
    ) -> None:
        self.crew, self.optimizer, self.loss, self.score = crew, optimizer, loss, score
        self.plain, self.model = model, crew.copies(model)
        self.best, self.clip, self.log_every = best, clip, log_every
        self.history = History()
        self.step = 0

    def fit(self, epochs: int, batches: Callable[[int], Sequence[Any]]) -> History:
        """Trains on ``batches(epoch)``, and ends with the best model."""
        top = -float("inf")
        for epoch in range(epochs):
            self.plain.train()
            for batch in self.crew.progress(batches(epoch), f"epoch {epoch + 1}"):
                self._train(batch)
            if self.score is None:
                continue
            self.plain.eval()
            with torch.no_grad():
                score, words = self.score(self.plain)
            self.history.scores.append((epoch + 1, score))
            self.crew.say(f"epoch {epoch + 1}  {words}")
            if not math.isfinite(score):
                fail(f"the score of epoch {epoch + 1} is {score}: the training has diverged")
            if score >= top:
                top, self.history.best = score, epoch + 1
                if self.crew.is_first:
                    torch.save(self.plain.state_dict(), self.best)
        if self.score is not None:
            self.crew.meet()  # the file is written
            self.plain.load_state_dict(torch.load(self.best, weights_only=True))
        self.plain.eval()
        return self.history

    def _train(self, batch: Any) -> None:
        self.optimizer.zero_grad()
        loss = self.loss(self.model, batch)
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.step += 1
        if self.step % self.log_every == 0 or self.step == 1:
            self.history.losses.append((self.step, loss.item()))
            self.crew.say(f"step {self.step:5d}  loss {loss.item():.4g}")
