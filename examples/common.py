"""What the examples share: arguments, processes, a training loop, both libraries in turn."""

from __future__ import annotations

import argparse
import gc
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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


def parser(description: str, picture: str | None = None) -> argparse.ArgumentParser:
    """With the arguments that all examples know; ``picture`` is the name of their PNG."""
    made = argparse.ArgumentParser(
        description=description.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("--fast", action="store_true", help="a small run, for tests")
    made.add_argument("--torch", action="store_true", help="the same on torch.nn, and both times")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--threads", type=int, help="of torch; as it is set unless given")
    if picture is not None:
        made.add_argument("--out", type=Path, default=Path(picture), help="the picture")
    return made


def arguments(
    made: argparse.ArgumentParser, fast: Mapping[str, Any] | None = None
) -> argparse.Namespace:
    """Of the command line; defaults where a notebook runs the script cell by cell.

    ``fast`` holds other defaults, for ``--fast``. Where there is to be a picture, it can be made.
    """
    given = [] if "ipykernel" in sys.modules else None
    options = made.parse_args(given)
    if options.fast and fast:
        made.set_defaults(**fast)
        options = made.parse_args(given)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if "out" in options:
        _expect_picture(options.out)
    return options


def _expect_picture(path: Path) -> None:
    """Ends the script where no picture can be drawn into ``path``, before the work for it."""
    try:
        require_matplotlib(path)
    except (ModuleNotFoundError, ValueError) as error:
        fail(str(error))
    if not path.parent.is_dir():
        fail(f"{path.parent} is no directory")


def fail(message: str) -> NoReturn:
    """Ends the script with a message and no traceback."""
    sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")


@dataclass(frozen=True)
class Workers:
    """The processes that train together, and which this one is: one alone without torchrun."""

    rank: int
    world: int
    device: torch.device

    @property
    def speaks(self) -> bool:
        return self.rank == 0

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
        """A temporary one, the same for all."""
        with tempfile.TemporaryDirectory() as own:
            shared = [own]
            if self.world > 1:
                dist.broadcast_object_list(shared, device=self.device)
            yield Path(shared[0])
            self.meet()  # nobody needs it any longer

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
        gc.collect()  # FSDP2's modules stand in cycles
        crew.meet()
        dist.destroy_process_group()


@dataclass
class Run:
    """What an experiment gave on one library, and the seconds it took."""

    library: str
    result: Any
    seconds: float


def run_in_turn(
    experiment: Callable[[ModuleType, argparse.Namespace, Workers], Any],
    options: argparse.Namespace,
    crew: Workers,
) -> list[Run]:
    """An experiment on rnnkern and, with ``--torch``, then on torch.nn; prints the times.

    The experiment computes and draws nothing. Both begin from the same seed.
    """
    torch.optim.SGD([torch.zeros(1)])  # the first one of a process takes a second to be made
    runs: list[Run] = []
    for name, library in (("rnnkern", rnnkern), ("torch.nn", nn))[: 1 + options.torch]:
        torch.manual_seed(options.seed)
        start = time.perf_counter()
        result = experiment(library, options, crew)
        runs.append(Run(name, result, time.perf_counter() - start))
    spent = ", ".join(f"{run.library} {run.seconds:.1f} s" for run in runs)
    ratio = f": {runs[1].seconds / runs[0].seconds:.2f}x" if options.torch else ""
    crew.say(f"time: {spent}{ratio}")
    return runs


@dataclass
class History:
    """Of a training: losses as logged, ``(step, loss)``, and scores, ``(epoch, score)``."""

    losses: list[tuple[int, float]] = field(default_factory=list)
    scores: list[tuple[int, float]] = field(default_factory=list)


class Trainer:
    """A small training loop: logs, validates after every epoch, keeps the best model in a file.

    Args:
        model: to train.
        optimizer: of its parameters.
        loss: of the model and a batch.
        score: of the model, higher is better; None keeps the last model.
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
        score: Callable[[nn.Module], float] | None,
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
                score = self.score(self.plain)
            self.history.scores.append((epoch + 1, score))
            self.crew.say(f"epoch {epoch + 1}  score {score:.4g}")
            if math.isnan(score):
                fail(f"the score of epoch {epoch + 1} is not a number")
            if score >= top:
                top = score
                if self.crew.speaks:
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
