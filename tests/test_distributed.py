"""Several processes: torch's own engines around rnnkern's modules give what one process gives."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import subprocesses
import torch
import torch.distributed as dist
from support import LAYERS, in_two_processes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import rnnkern

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo"),
]
EXAMPLE = str(Path(__file__).parent.parent / "examples" / "distributed.py")
WORLD = 2


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        own = [rnnkern.cells.peephole_lstm] if kind == "Recurrent" else []
        self.rnn = getattr(rnnkern, kind)(*own, 4, 6, num_layers=2, bidirectional=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.head(self.rnn(x, lengths=lengths)[0]).square().mean((0, 2))


def task(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Model(kind), torch.randn(5, 4, 4), torch.tensor([5, 2, 4, 0])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    own = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {
        name: grad.full_tensor() if isinstance(grad, DTensor) else grad
        for name, grad in own.items()
        if grad is not None
    }


CASES = [(engine, kind) for engine in ("ddp", "fsdp") for kind in (*LAYERS, "Recurrent")]


def train_all() -> list[tuple[str, str]]:
    """The cases in which this process, one of two, has found the gradients that it should."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=100))
    agreed = []
    for engine, kind in CASES:
        try:
            train(dist.get_rank(), engine, kind)
        except Exception as error:
            raise AssertionError(f"{engine} {kind}") from error
        agreed.append((engine, kind))
    gc.collect()  # the models must be gone before their process group is, see the example
    dist.barrier()
    dist.destroy_process_group()
    return agreed


def train(rank: int, engine: str, kind: str) -> None:
    """Two steps, after each of which a process must have the gradients of one process alone."""
    alone, x, lengths = task(kind)
    shared, _, _ = task(kind)
    own = slice(2 * rank, 2 * rank + 2)
    if engine == "ddp":
        shared = DistributedDataParallel(shared)
    else:
        mesh = init_device_mesh("cpu", (WORLD,))
        fully_shard(shared.rnn, mesh=mesh)
        fully_shard(shared, mesh=mesh)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (alone, shared)]
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        alone(x, lengths).mean().backward()
        shared(x[:, own], lengths[own]).mean().backward()
        expected, found = gradients(alone), gradients(shared)
        assert expected.keys() == found.keys()
        assert expected
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, msg=lambda m, n=name: f"{n}: {m}")
        for optimizer in optimizers:
            optimizer.step()


@pytest.fixture(scope="module")
def agreed() -> list[list[tuple[str, str]]]:
    """By process."""
    return in_two_processes(train_all)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_two_processes_give_the_gradients_of_one(
    agreed: list[list[tuple[str, str]]], case: tuple[str, str]
) -> None:
    assert all(case in own for own in agreed)


def falls_to_a_third(said: str) -> bool:
    errors = [float(found) for found in re.findall(r"error ([\d.]+)", said)]
    assert len(errors) >= 3
    return errors[-1] < errors[0] / 3


@pytest.fixture
def needs_tqdm() -> None:
    pytest.importorskip("tqdm", reason="pip install 'rnnkern[progress]'")


@pytest.mark.usefixtures("needs_tqdm")
def test_the_example_in_two_processes() -> None:
    said = in_two_processes(subprocesses.script, EXAMPLE, "--iterations=150")
    assert falls_to_a_third(said[0])
    assert said[1] == ""


@pytest.mark.usefixtures("needs_tqdm")
def test_the_example_under_torchrun() -> None:
    """With parameters in shards."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [EXAMPLE, "--iterations=150", "--shard"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    assert falls_to_a_third(result.stdout)
