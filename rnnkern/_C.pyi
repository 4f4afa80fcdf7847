from collections.abc import Sequence
from typing import Any

from torch import Tensor

GAPS: str
compiler: str

class RefusedError(RuntimeError): ...

class Layer:
    def __init__(
        self,
        cell: int,
        directions: int,
        hidden: int,
        out: int,
        bias: bool,
        projected: bool,
        batch_first: bool,
    ) -> None: ...

def refusal(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor]
) -> str | None: ...
def mode_refusal() -> str | None: ...
def forward(
    layer: Layer,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    steps: tuple[Any, ...] | None,
    training: bool,
    threads: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]: ...
def backward(
    layer: Layer,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    y: Tensor,
    saved: Tensor | None,
    dy: Tensor | None,
    dhn: Tensor | None,
    dcn: Tensor | None,
    wanted: Sequence[bool],
    overwrite: bool,
    steps: tuple[Any, ...] | None,
    threads: int,
    deterministic: bool,
) -> list[Tensor | None]: ...
def describe_plan(
    layer: Layer,
    T: int,
    N: int,
    total: int,
    I: int,
    element_bytes: int,
    threads: int,
    deterministic: bool,
    backward: bool,
) -> str: ...
def compiled_sets() -> list[str]: ...
def instruction_set() -> str: ...
