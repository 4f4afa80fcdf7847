from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

from torch import Tensor

CELLS: dict[str, dict[str, Any]]
GAPS: str
CALLED_BY_FORWARD: tuple[str, ...]
IS_STAND_IN: bool
HEADERS: str
compiler: str

class RefusedError(RuntimeError): ...

class Kernel:
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
    def proj(self) -> bool: ...
    @property
    def by_bfloat16(self) -> bool: ...
    @property
    def is_cell(self) -> bool: ...
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
        training: bool | None = None,
        keeps_y: bool = False,
        cells: bool = False,
        options: tuple[Any, ...] | None = None,
        packed_weights: Frozen | None = None,
    ) -> tuple[tuple[Tensor, ...], bool, Tensor | None, Tensor | None]: ...
    def closed_loop(
        self,
        inputs: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        weights: Sequence[Tensor],
        readout: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]: ...
    def backward(
        self,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        weights: Sequence[Tensor],
        steps: tuple[Any, ...] | None,
        y: Tensor | None,
        saved: Tensor | None,
        dy: Tensor | None,
        dhn: Tensor | None,
        dcn: Tensor | None,
        wanted: Sequence[bool],
        overwrite: bool,
        sums: Sequence[Tensor | None] = (),
        options: tuple[Any, ...] | None = None,
        dcells: Tensor | None = None,
    ) -> tuple[list[Tensor | None], Tensor]: ...
    def second_order(
        self, point: tuple[Any, ...], direction: tuple[Any, ...], wanted: Sequence[bool]
    ) -> tuple[tuple[Tensor, Tensor, Tensor | None], list[Tensor | None], Tensor]: ...

class Frozen:
    def __init__(
        self,
        kernel: Kernel,
        input_size: int,
        layers: int,
        numbers: str,
        weights: Sequence[Tensor],
        scales: Sequence[Tensor],
    ) -> None: ...
    @property
    def number(self) -> int: ...
    @property
    def kernel(self) -> Kernel: ...
    @property
    def hidden(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def plain_call(self, x: Tensor, hx: Any) -> Any: ...
    def forward(
        self,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        steps: tuple[Any, ...] | None,
    ) -> tuple[Tensor, ...]: ...
    def step(self, x: Tensor, hx: Any) -> Tensor | None: ...
    def unpack(self, tensors: Sequence[Tensor]) -> None: ...

def kernel(
    mode: str,
    directions: int,
    hidden: int,
    proj: int,
    bias: bool,
    batch_first: bool,
    by_bfloat16: bool = False,
    is_cell: bool = False,
) -> Kernel: ...
def add_cell(
    *,
    mode: str,
    gates: list[str],
    slots: int,
    cell_state: bool,
    saves_slots: bool,
    reads_h: bool,
    parameters: list[str],
    recurrent: bool,
    more_states: int,
) -> dict[str, Any]: ...
def load_library(path: str, mode: str, element: str) -> None: ...
def load_cuda_library(path: str, mode: str, element: str, device: int) -> None: ...
def set_loader(load: Callable[[str, str, int], str | None]) -> None: ...
def refusal(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor]
) -> str | None: ...
def mode_refusal() -> str | None: ...
def plain_call(
    module: Any, x: Tensor, hx: Any, record: Callable[..., tuple[Tensor, ...]]
) -> Any: ...
def multiplies_as_bfloat16(kernel: Kernel, x: Tensor) -> bool: ...
def are_worth_sums(kernel: Kernel, x: Tensor) -> bool: ...
def plain_cell(
    module: Any,
    x: Tensor,
    hx: Any,
    record: Callable[..., tuple[Tensor, ...]],
    record_in_loop: Callable[..., tuple[Tensor, ...]],
) -> Any: ...
def plain_backward(
    ctx: Any, dy: Tensor | None, dhn: Tensor | None, dcn: Tensor | None
) -> tuple[Tensor | None, ...] | None: ...

class Machine:
    @property
    def rounded_for_products(self) -> bool: ...
    def __init__(
        self,
        *,
        threads: int,
        lanes: int,
        tile_rows: int,
        element_bytes: int,
        group: int,
        multiplies_in_place: bool,
        converts: bool,
        rounded_for_products: bool,
        by_tiles: bool,
        l2_bytes: int,
    ) -> None: ...

class Plan:
    @property
    def threads(self) -> int: ...
    @property
    def row_blocks(self) -> int: ...
    @property
    def unit_blocks(self) -> int: ...
    @property
    def input(self) -> Literal["packed", "dots", "broadcast", "in place"]: ...
    @property
    def recurrent(self) -> Literal["packed", "dots", "broadcast", "in place"]: ...
    @property
    def by_dots(self) -> tuple[int, int]: ...
    @property
    def block_steps(self) -> int: ...

def machine(kernel: Kernel, threads: int, x: Tensor) -> Machine: ...
def multiplied_as(kernel: Kernel, x: Tensor) -> str: ...
def plan(
    kernel: Kernel,
    machine: Machine,
    *,
    T: int,
    N: int,
    I: int,
    total: int,
    deterministic: bool,
    backward: bool,
    frozen: bool = False,
    from_zeros: bool = False,
) -> tuple[Plan, str]: ...

class CudaDevice:
    def __init__(
        self, *, capability: tuple[int, int], multiprocessors: int, shared_bytes: int
    ) -> None: ...

class CudaPlan:
    @property
    def resident(self) -> bool: ...
    @property
    def row_tiles(self) -> int: ...
    @property
    def column_tiles(self) -> int: ...
    @property
    def row_teams(self) -> int: ...
    @property
    def unit_blocks(self) -> int: ...
    @property
    def passes(self) -> int: ...
    @property
    def groups(self) -> int: ...
    @property
    def units(self) -> int: ...
    @property
    def chunks(self) -> int: ...
    @property
    def warp_chunks(self) -> int: ...
    @property
    def held_chunks(self) -> int: ...
    @property
    def shared_chunks(self) -> int: ...
    @property
    def shared_bytes(self) -> int: ...
    @property
    def bytes_per_step(self) -> int: ...
    @property
    def us_per_step(self) -> float: ...

def cuda_plan(
    kernel: Kernel,
    device: CudaDevice,
    x: Tensor,
    *,
    T: int,
    N: int,
    I: int,
    tf32: bool,
    backward: bool,
    deterministic: bool = False,
    has_library: bool = True,
) -> tuple[CudaPlan, str]: ...
def cuda_describe(kernel: Kernel, x: Tensor, *, T: int, N: int, I: int, backward: bool) -> str: ...
def compiled_sets() -> list[str]: ...
def cuda_version() -> str | None: ...
def cuda_architectures() -> str | None: ...
def cuda_driver() -> str | None: ...
@overload
def cuda_driver_refusal() -> str | None: ...
@overload
def cuda_driver_refusal(driver: int, built: int) -> str | None: ...
def instruction_set() -> str: ...
