"""Several processes: torch's own engines around rnnkern's modules give what one process gives."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import LAYERS
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
ROOT = Path(__file__).parent.parent
WORLD = 2


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.rnn = getattr(rnnkern, kind)(4, 6, num_layers=2, bidirectional=True)
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


def run_process(rank: int, engine: str, kind: str, place: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=WORLD)
    train(
        rank, engine, kind
    )  # whose model must be gone before its process group is, see the example
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


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


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", LAYERS)
def test_two_processes_give_the_gradients_of_one(kind: str, engine: str, tmp_path: Path) -> None:
    context: Any = torch.multiprocessing.spawn(
        run_process, (engine, kind, str(tmp_path / "store")), nprocs=WORLD, join=False
    )
    deadline = time.monotonic() + 30
    while not context.join(timeout=1):  # raises what a process has raised
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the processes have not ended")


@pytest.mark.parametrize("options", [[], ["--shard"]], ids=["ddp", "fsdp"])
def test_the_example_under_torchrun(options: list[str]) -> None:
    """Its error falls to less than a third."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "examples" / "distributed.py"), "--iterations=150", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    errors = [float(found) for found in re.findall(r"error ([\d.]+)", result.stdout)]
    assert len(errors) >= 3
    assert errors[-1] < errors[0] / 3
