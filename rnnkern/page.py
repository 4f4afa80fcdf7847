"""The page of `rnnkern.plot.string_heatmap`: where lines, characters and colour bars stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: Characters in a line of `string_heatmap`.
COLUMNS = 80
MARKS = {"\n": "↵", "\t": "→"}
MISSING = "·"  # for what the font lacks
WIDEST = 0.9  # of a cell, that a character may fill


def places(text: str) -> Tensor:
    """Row and column of each character, ``[len(text), 2]``: a row ends after a newline, and after
    `COLUMNS` characters.
    """
    found: list[tuple[int, int]] = []
    row, column = 0, 0
    for character in text:
        if column == COLUMNS:
            row, column = row + 1, 0
        found.append((row, column))
        row, column = (row + 1, 0) if character == "\n" else (row, column + 1)
    return torch.tensor(found)


class Page:
    """A figure for `string_heatmap` whose every part has its place in inches, whatever their
    number: a title, panels of cells one below the other, each under its name, and colour bars.
    """

    MARGIN, TITLE, NAME, GAP, BAR, SCALE, BETWEEN = 0.2, 0.45, 0.25, 0.12, 0.12, 0.5, 0.6
    CELL_WIDTH, CELL_HEIGHT, SHORTEST_BAR, LONGEST_BAR = 0.11, 0.22, 2.0, 4.0

    def __init__(self, names: Sequence[str], title: str, lines: int, columns: int) -> None:
        from matplotlib.figure import Figure
        from matplotlib.font_manager import FontProperties
        from matplotlib.textpath import text_to_path

        def inches(text: str, size: int) -> float:
            font = FontProperties(size=size)
            widths = [
                text_to_path.get_text_width_height_descent(line, font, False)[0]
                for line in text.split("\n")
            ]
            return float(max(widths)) / 72

        self.lines, self.columns = lines, columns
        self.name = self.NAME if any(names) else 0.0
        self.block = self.name + lines * self.CELL_HEIGHT + self.GAP
        self.top = self.TITLE + 0.17 * title.count("\n")
        widest = max(
            [columns * self.CELL_WIDTH, inches(title, 11), *(inches(n, 10) for n in names)]
        )
        self.width = 2 * self.MARGIN + max(widest, 2 * (self.SHORTEST_BAR + self.BETWEEN))
        self.height = self.top + len(names) * self.block + 2 * self.BAR + self.SCALE
        self.figure = Figure(figsize=(self.width, self.height))
        middle = 1 - (self.top - 0.1) / 2 / self.height
        self.figure.suptitle(title, fontsize=11, y=middle, va="center")

    def _axes(self, left: float, top: float, width: float, height: float) -> Any:
        bottom = self.height - top - height
        place = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(place)

    def panel(self, k: int) -> Any:
        top = self.top + k * self.block + self.name
        width, height = self.columns * self.CELL_WIDTH, self.lines * self.CELL_HEIGHT
        return self._axes(self.MARGIN, top, width, height)

    def bar(self, i: int, count: int) -> Any:
        share = (self.width - 2 * self.MARGIN) / count
        length = min(share - self.BETWEEN, self.LONGEST_BAR)
        left = self.MARGIN + i * share + (share - length) / 2
        return self._axes(left, self.height - self.SCALE - self.BAR, length, self.BAR)


def outlines(text: str, cells: Tensor) -> tuple[list[Any], list[int]]:
    """Characters as outlines in units of cells, and which those are that have any ink.

    Outlines and not text: a few thousand are drawn at once.
    """
    from matplotlib.font_manager import FontProperties, findfont, get_font
    from matplotlib.path import Path as Outline
    from matplotlib.textpath import text_to_path

    families = ["DejaVu Sans Mono", "DejaVu Sans"]
    font = FontProperties(family=families)
    known = [get_font(findfont(FontProperties(family=family))) for family in families]
    em = torch.tensor([1.5, -0.75]).numpy() / text_to_path.FONT_SCALE  # in cells

    def outline(character: str) -> Any:
        shown = MARKS.get(character, character if character.isprintable() else " ")
        if not any(face.get_char_index(ord(shown)) for face in known):
            shown = MISSING
        vertices, codes = text_to_path.get_text_path(font, shown)
        if not len(vertices):
            return vertices, codes
        vertices = vertices * em
        vertices[:, 0] *= WIDEST / max(WIDEST, vertices[:, 0].max())
        return vertices, codes

    shapes = {character: outline(character) for character in set(text)}
    inked = [at for at, character in enumerate(text) if len(shapes[character][0])]
    glyphs = []
    for at in inked:
        vertices, codes = shapes[text[at]]
        row, column = cells[at].tolist()
        place = (column - 0.45, row + 0.2)
        glyphs.append(Outline(vertices + place, codes))
    return glyphs, inked
