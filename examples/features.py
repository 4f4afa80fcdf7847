"""What the neurons of a language model may follow: numbers for each character of a text, each made
of the text up to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise


def column(text: str) -> list[float]:
    """Characters since the newline, which is at 0."""
    found, place = [], 0
    for c in text:
        place = 0 if c == "\n" else place + 1
        found.append(place)
    return found


def indentation(text: str) -> list[float]:
    """Spaces that the line begins with, as far as it is read."""
    found, width, leading = [], 0, True
    for c in text:
        if c == "\n":
            width, leading = 0, True
        elif leading and c == " ":
            width += 1
        else:
            leading = False
        found.append(width)
    return found


def inside(text: str, pairs: dict[str, str]) -> list[float]:
    """How many opened marks are not closed yet. The end of a paragraph closes all.

    A mark that both opens and closes opens only if no letter comes before it, so an apostrophe does
    not.
    """
    found, opened = [], []
    for i, c in enumerate(text):
        if opened and c == opened[-1]:
            opened.pop()
        elif c in pairs and not (pairs[c] == c and (opened or text[i - 1 : i].isalnum())):
            opened.append(pairs[c])
        elif text[i - 1 : i + 1] == "\n\n":
            opened.clear()
        found.append(len(opened))
    return found


FEATURES: dict[str, Callable[[str], list[float]]] = {
    "position in the line": column,
    "log distance since newline": lambda text: [math.log1p(n) for n in column(text)],
    "indentation": indentation,
    "inside quotes": lambda text: inside(text, {"`": "`", "'": "'", '"': '"'}),
    "inside brackets": lambda text: inside(text, {"(": ")", "[": "]", "{": "}"}),
    "word start": lambda text: [
        c.isalnum() and not before.isalnum() for before, c in pairwise(f" {text}")
    ],
    "space": lambda text: [c == " " for c in text],
    "upper case": lambda text: [c.isupper() for c in text],
    "sentence end": lambda text: [c in ".!?" for c in text],
}
