"""What all pictures share: colours, line styles, and checks of the data."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

# Distinct in grey, and for colour-blind readers.
COLOURS = {"RNN": "#0072b2", "LSTM": "#e69f00", "GRU": "#009e73"}
CYCLE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000", "#999933")
LINE_STYLES = ("-", "--", "-.", ":")


def require_matplotlib(path: Path | str) -> None:
    """Makes sure that a picture can be written to ``path``, before the work that it shows.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: matplotlib cannot write a file with the ending of ``path``.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'a plot needs matplotlib: install it with pip install "rnnkern[plot]"'
        ) from error
    known = sorted(Figure().canvas.get_supported_filetypes())
    if Path(path).suffix.lstrip(".").lower() not in known:
        raise ValueError(f"{path}: the name must end in one of: {', '.join(known)}")


def numbers(name: str, given: object) -> Tensor:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(given).__name__}")
    return given.detach().double().cpu()


def finite(name: str, given: object) -> Tensor:
    found = numbers(name, given)
    if not found.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or an infinite number")
    return found
