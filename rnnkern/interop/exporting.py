"""What a program of ``torch.export`` is made of: torch's own operators, or rnnkern's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_keeps_kernels = False


@contextmanager
def exporting_kernels() -> Iterator[None]:
    """Lets the programs that ``torch.export`` makes inside keep rnnkern's operators.

    Such a program runs on rnnkern's kernels, with ``reset`` too, and in Python processes that have
    imported rnnkern only. Without this, a program consists of torch's own operators and runs where
    rnnkern is not installed. `rnnkern.decompositions` turns the first into the second.

    ``torch.onnx.export`` takes no notice.

    Example::

        >>> with rnnkern.exporting_kernels():
        ...     program = torch.export.export(model, (x,))
    """
    global _keeps_kernels
    before, _keeps_kernels = _keeps_kernels, True
    try:
        yield
    finally:
        _keeps_kernels = before


def to_torch() -> bool:
    """Whether a program is being exported that must run where rnnkern is not installed."""
    # Not `torch.compiler.is_exporting()`, which torch 2.10 takes for true under torch.compile too.
    exporting: bool = torch.compiler._is_exporting_flag
    return exporting and (not _keeps_kernels or torch.onnx.is_in_onnx_export())
