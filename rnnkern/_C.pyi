from collections.abc import Sequence
from typing import Any

from torch import Tensor

GAPS: str
compiler: str

class Layer:
    def __init__(
        self, cell: int, directions: int, bias: bool, projected: bool, batch_first: bool
    ) -> None: ...

def refusal(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor]
) -> str | None: ...
def forward(
    layer: Layer,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    y: Tensor,
    hn: Tensor,
    cn: Tensor | None,
    saved: tuple[Tensor | None, ...],
    steps: tuple[Any, ...] | None,
    threads: int,
    deterministic: bool,
) -> None: ...
def backward(
    layer: Layer,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    y: Tensor,
    saved: tuple[Tensor | None, ...],
    incoming: tuple[Tensor | None, ...],
    workspace: tuple[Tensor | None, ...],
    outgoing: tuple[Tensor | None, ...],
    gradients: Sequence[Tensor | None],
    steps: tuple[Any, ...] | None,
    threads: int,
    deterministic: bool,
) -> None: ...
def describe_plan(
    layer: Layer,
    T: int,
    N: int,
    I: int,
    H: int,
    O: int,
    element_bytes: int,
    threads: int,
    deterministic: bool,
    backward: bool,
) -> str: ...
def compiled_sets() -> list[str]: ...
def instruction_set() -> str: ...
