"""Wrong `lengths` and `reset`: ValueError or TypeError that names what was given and what was
wanted.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support import LAYERS, build
from torch.nn.utils.rnn import pack_padded_sequence
from wrong_calls import H, I, N, T, x

# On the CPU, on whatever device the input is: values on a GPU are not looked at.
LENGTHS: dict[str, tuple[Any, tuple[str, str]]] = {
    "float": (torch.tensor([2.0, 3.0]), ("int64", "float32")),
    "bool": (torch.tensor([True, False]), ("int64", "bool")),
    "complex": (torch.tensor([1j, 2j]), ("int64", "complex64")),
    "too-many": (torch.tensor([2, 3, 4]), ("2", "3")),
    "too-few": (torch.tensor([3]), ("2", "1")),
    "none": (torch.tensor([], dtype=torch.int64), ("2", "0")),
    "0-D": (torch.tensor(3), ("2", "()")),
    "2-D": (torch.tensor([[2, 3]]), ("2", "(1, 2)")),
    "negative": (torch.tensor([2, -1]), ("0", "-1")),
    "too-long": (torch.tensor([2, 6]), ("5", "6")),
    "huge": (torch.tensor([2, 2**62]), ("5", str(2**62))),
    "very-negative": (torch.tensor([-(2**63), 1]), ("0", str(-(2**63)))),
    "string": ("ab", ("tensor", "str")),
    "number": (3, ("tensor", "int")),
}


@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("kind", LAYERS)
def test_wrong_lengths(kind: str, case: str) -> None:
    lengths, (wanted, given) = LENGTHS[case]
    module = build(kind, I, H)
    with pytest.raises((ValueError, TypeError)) as caught:
        module(x(), lengths=lengths)
    message = str(caught.value)
    assert "lengths" in message
    assert wanted in re.sub(r"(?i)\blengths\b", "", message)
    assert given in message


MASK = torch.zeros(T, N, dtype=torch.bool)
RESETS: dict[str, tuple[Any, tuple[str, str]]] = {
    "float": (MASK.float(), ("bool", "float32")),
    "int64": (MASK.long(), ("bool", "int64")),
    "uint8": (MASK.byte(), ("bool", "uint8")),
    "transposed": (MASK.t(), ("(5, 2)", "(2, 5)")),
    "1-D": (MASK[:, 0], ("(5, 2)", "(5,)")),
    "3-D": (MASK.unsqueeze(2), ("(5, 2)", "(5, 2, 1)")),
    "more-steps": (torch.zeros(T + 1, N, dtype=torch.bool), ("(5, 2)", "(6, 2)")),
    "one-row": (MASK[:, :1], ("(5, 2)", "(5, 1)")),
    "string": ("ab", ("tensor", "str")),
    "bool-itself": (True, ("tensor", "bool")),
}


@pytest.mark.parametrize("case", RESETS)
@pytest.mark.parametrize("kind", LAYERS)
def test_wrong_resets(kind: str, case: str) -> None:
    reset, (wanted, given) = RESETS[case]
    module = build(kind, I, H)
    with pytest.raises((ValueError, TypeError)) as caught:
        module(x(), reset=reset)
    for word in ("reset", wanted, given):
        assert word in str(caught.value)


@pytest.mark.parametrize("kind", LAYERS)
def test_wrong_resets_of_other_layouts(kind: str) -> None:
    with pytest.raises(ValueError, match=re.escape("(2, 5)")):
        build(kind, I, H, batch_first=True)(x(N, T, I), reset=MASK)
    with pytest.raises(ValueError, match="reset"):
        build(kind, I, H)(x(T, I), reset=MASK)
    with pytest.raises(ValueError, match="lengths"):
        build(kind, I, H)(x(T, I), lengths=torch.tensor([1, 2]))


@pytest.mark.parametrize("argument", ["lengths", "reset"])
@pytest.mark.parametrize("kind", LAYERS)
def test_lengths_of_what_is_packed(kind: str, argument: str) -> None:
    sequence = pack_padded_sequence(x(), [5, 2])
    value = {"lengths": torch.tensor([5, 2]), "reset": MASK}[argument]
    with pytest.raises(ValueError, match="PackedSequence"):
        build(kind, I, H)(sequence, **{argument: value})


@pytest.mark.parametrize("argument", ["lengths", "reset"])
@pytest.mark.parametrize("kind", LAYERS)
def test_lengths_without_values(kind: str, argument: str) -> None:
    value = {"lengths": torch.tensor([5, 2]), "reset": MASK}[argument].to("meta")
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        build(kind, I, H)(x(), **{argument: value})
