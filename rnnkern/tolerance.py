"""The one place that says when a result is right.

Errors are counted in *eps*, the spacing of the numbers just above one in the result's own dtype, so
that one rule serves every dtype: **the error of ours is at most twice the error of torch.nn in the
same dtype, plus a small floor.** Both errors are measured against torch.nn (or the reference step)
in float64.

The factor of two allows for another order of summation, which moves rounding errors about but does
not make them larger. Because the limit follows torch.nn's own error, it also fits gradients that
are sums over many thousand rows, for which a fixed tolerance would be too tight or too loose.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: How much larger than torch.nn's own error ours may be.
FACTOR = 2.0

#: What is allowed even if torch.nn happens to be exact, in eps. With few and small terms
#: torch.nn is often right to the last bit by luck, while each of our activations may be off by 2
#: ulp; a step multiplies and adds up to four of them, and the gates' slopes (at most 1) carry what
#: is wrong on to a few steps more. That makes about 16. A mistake in a kernel (a wrong gate, a
#: missing row, a stale state) is thousands of times that. The 16-bit types are computed in float32
#: and rounded when they are stored, so that 2 eps is enough.
FLOOR_EPS = {torch.float64: 16.0, torch.float32: 16.0, torch.bfloat16: 2.0, torch.float16: 2.0}

#: The notebook's own criterion: a sum of squared differences below this counts as equal.
NOTEBOOK_LIMIT = 1e-10


@dataclass(frozen=True)
class Verdict:
    """The outcome of one check. In a condition it is true if the check passed.

    Attributes:
        ok: whether ``error <= limit``.
        error: the error of ours, in eps of its dtype; ``inf`` if shapes, dtypes or
            non-finite values differ.
        torch_error: the error of torch.nn, in eps of its dtype.
        limit: the largest error allowed, in eps.
        problem: what is wrong, if it is not rounding; otherwise empty.
    """

    ok: bool
    error: float
    torch_error: float
    limit: float
    problem: str = ""

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        if self.problem:
            return self.problem
        return (
            f"error {self.error:.3g} eps, limit {self.limit:.3g} (torch.nn: {self.torch_error:.3g})"
        )


def yardstick_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which torch.nn's own error is measured for results of ``dtype``.

    Its own, except for float64: there the reference is torch.nn itself and its error would read as
    zero. Counted in eps, rounding errors are the same in float32, so float32 takes its place.
    """
    return torch.float32 if dtype == torch.float64 else dtype


def error_eps(actual: Tensor, reference: Tensor) -> float:
    """The largest difference, relative to ``max(1, max|reference|)``, in eps of ``actual.dtype``.

    Relative to the largest element and not element by element: a small element is often the
    difference of large terms, and no order of summation gets more than eps of those terms right.

    Args:
        actual: result of any shape, floating point.
        reference: float64, same shape.

    Returns:
        0 for empty tensors; ``inf`` if a NaN or an infinity is not where the reference has one.
    """
    expected = reference.to(
        actual.dtype
    )  # what is infinite in this dtype need not be so in float64
    special = ~torch.isfinite(expected)
    if not torch.equal(special, ~torch.isfinite(actual)):
        return float("inf")
    if not torch.allclose(actual[special], expected[special], rtol=0, atol=0, equal_nan=True):
        return float("inf")
    wide = reference.double()
    difference = (actual.double() - wide).masked_fill_(special, 0)
    if difference.numel() == 0:
        return 0.0
    scale = max(1.0, float(wide.masked_fill(special, 0).abs().max()))
    return float(difference.abs().max()) / scale / torch.finfo(actual.dtype).eps


def check(ours: Tensor, theirs: Tensor, reference: Tensor) -> Verdict:
    """Judges ``ours`` by the rule at the top of this file.

    Args:
        ours: the result in question, float64, float32, bfloat16 or float16.
        theirs: torch.nn's result from the same numbers, in ``yardstick_dtype(ours.dtype)``.
        reference: the result in float64 from the same numbers.

    Returns:
        The verdict. A difference of shape or dtype is a failed verdict and not an exception.

    Raises:
        ValueError: ``theirs`` and ``reference`` do not fit each other.
    """
    if theirs.shape != reference.shape or reference.dtype != torch.float64:
        raise ValueError(
            "want theirs and the reference in one shape and the reference in float64, got "
            f"{tuple(theirs.shape)} and {reference.dtype} {tuple(reference.shape)}"
        )
    if ours.dtype not in FLOOR_EPS or yardstick_dtype(ours.dtype) != theirs.dtype:
        return wrong(f"dtype {ours.dtype} where torch.nn has {theirs.dtype}")
    if ours.shape != reference.shape:
        return wrong(f"shape {tuple(ours.shape)}, should be {tuple(reference.shape)}")
    torch_error = error_eps(theirs, reference)
    # If torch.nn itself goes wrong it is no yardstick: only the floor is left.
    usable = torch_error if torch_error < float("inf") else 0.0
    limit = FACTOR * usable + FLOOR_EPS[ours.dtype]
    error = error_eps(ours, reference)
    if error == float("inf"):
        return wrong("NaN or infinity at other places than it should be")
    return Verdict(error <= limit, error, torch_error, limit)


def wrong(problem: str) -> Verdict:
    """The verdict on a result that is wrong in another way than by rounding."""
    return Verdict(False, float("inf"), 0.0, 0.0, problem)


def squared_difference(a: Tensor, b: Tensor) -> float:
    """Sum of squared differences, the notebook's measure; ``inf`` if the shapes differ."""
    if a.shape != b.shape:
        return float("inf")
    return float((a.double() - b.double()).square().sum())
