"""What second derivatives cost: a Hessian-vector product, in calls of forward+backward.

    python -m benchmarks.second_order [--threads N] [--seconds S]

The product: forward, backward with ``create_graph``, and the gradients of those gradients times a
vector, by the input and all parameters. Timed in turn, one call after the other: forward+backward,
the product, the same product in torch.nn. Medians of pairwise ratios.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn

import rnnkern
from rnnkern.bench.timing import PairTiming, threads_set, time_in_turn
from rnnkern.bench.workloads import CELLS, FORWARD_BACKWARD, Side, draw_case, load_workloads


def hessian_product(side: Side) -> Callable[[], object]:
    module, x, dy = side.module, side.x, side.dy
    leaves = [x, *module.parameters()]
    vectors = [torch.randn_like(leaf) for leaf in leaves]

    def product() -> object:
        y, _ = module(x)
        gradients = torch.autograd.grad(y, leaves, dy, create_graph=True)
        return torch.autograd.grad(gradients, leaves, vectors)

    return product


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="of torch; as it is set unless given")
    parser.add_argument("--seconds", type=float, default=2.0, help="for a row")
    options = parser.parse_args()
    with threads_set(options.threads):
        print(f"float32, {torch.get_num_threads()} threads, torch {torch.__version__}; us a call")
        print(f"{'':24}{'fwd+bwd':>10}{'product':>10}{'ratio':>7}{'torch.nn':>10}{'speedup':>9}")
        for name, workload in load_workloads().items():
            for cell in CELLS:
                case = draw_case(cell, workload)
                ours, theirs = (case.side(library, torch.float32) for library in (rnnkern, nn))
                calls = [
                    ours.call(FORWARD_BACKWARD),
                    hessian_product(ours),
                    hessian_product(theirs),
                ]
                rounds = time_in_turn(calls, budget_s=options.seconds, min_rounds=5)
                cost, peer = PairTiming(*rounds[:2]), PairTiming(*rounds[1:])
                row = f"{name + ' ' + cell:24}{cost.us:10.0f}{peer.us:10.0f}{cost.speedup:7.1f}"
                print(f"{row}{peer.their_us:10.0f}{peer.speedup:9.1f}", flush=True)


if __name__ == "__main__":
    main()
