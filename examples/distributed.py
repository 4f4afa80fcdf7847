"""Several processes train one model: rnnkern under torch's DistributedDataParallel or FSDP2.

    torchrun --nproc-per-node 2 examples/distributed.py
    torchrun --nproc-per-node 2 examples/distributed.py --shard

Each process draws its own part of the batch; the task is to add up the marked numbers of a
sequence. Works the same in one process, without torchrun.
"""

# %%
from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from common import Workers, above_zero, fail, workers
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import rnnkern


# %%
class Adder(nn.Module):
    """Reads ``[T, N, 2]``, numbers and marks; gives the sum of the marked numbers, ``[N]``."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.rnn = rnnkern.LSTM(2, hidden)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        _, (h, _) = self.rnn(x)
        return self.head(h[-1]).squeeze(-1)


def draw(steps: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    numbers = torch.rand(steps, rows, generator=generator)
    marks = (torch.rand(steps, rows, generator=generator) < 2 / steps).float()
    return torch.stack((numbers, marks), -1), (numbers * marks).sum(0)


# %%
def train(options: argparse.Namespace, crew: Workers) -> None:
    torch.manual_seed(0)  # the same start everywhere
    model: nn.Module = Adder(options.hidden)
    if crew.world > 1 and options.shard:
        mesh = dist.device_mesh.init_device_mesh(crew.device.type, (crew.world,))
        model = model.to(crew.device)
        fully_shard(model.rnn, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = crew.copies(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(1 + crew.rank)
    for iteration in range(options.iterations):
        x, wanted = draw(options.steps, options.rows // crew.world, generator)
        loss = nn.functional.mse_loss(model(x.to(crew.device)), wanted.to(crew.device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if iteration % 50 == 49 or iteration == 0:
            crew.say(f"iteration {iteration + 1:4d}  mean squared error {loss.item():.4f}")


# %%
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shard", action="store_true", help="FSDP2: parameters in shards")
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--rows", type=int, default=64, help="of all processes together")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=32)
    options = parser.parse_args()
    above_zero(options, "iterations", "rows", "steps", "hidden")
    with workers() as crew:
        if options.rows % crew.world:
            fail(f"--rows {options.rows} do not divide among {crew.world} processes")
        train(options, crew)


if __name__ == "__main__":
    main()
