from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

GAPS: str
compiler: str

class RefusedError(RuntimeError): ...

class Layer:
    @property
    def mode(self) -> str: ...
    @property
    def directions(self) -> int: ...
    @property
    def out(self) -> int: ...
    @property
    def bias(self) -> bool: ...
    @property
    def batch_first(self) -> bool: ...
    @property
    def tensors(self) -> int: ...
    @property
    def has_cell_state(self) -> bool: ...
    def forward(
        self,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        weights: Sequence[Tensor],
        steps: tuple[Any, ...] | None,
        training: bool,
    ) -> tuple[tuple[Tensor, ...], Tensor | None]: ...
    def backward(
        self,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        weights: Sequence[Tensor],
        steps: tuple[Any, ...] | None,
        y: Tensor,
        saved: Tensor | None,
        dy: Tensor | None,
        dhn: Tensor | None,
        dcn: Tensor | None,
        wanted: Sequence[bool],
        overwrite: bool,
    ) -> list[Tensor | None]: ...

def layer(
    mode: str, directions: int, hidden: int, proj: int, bias: bool, batch_first: bool
) -> Layer: ...
def refusal(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor]
) -> str | None: ...
def mode_refusal() -> str | None: ...
def plain_call(module: Any, x: Tensor, record: Callable[..., tuple[Tensor, ...]]) -> Any: ...
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
