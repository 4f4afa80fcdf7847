"""A text on cells that are coloured by a value at each character."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rnnkern.plot.style import finite, require_matplotlib

#: Characters in a line of `string_heatmap`.
COLUMNS = 80
MARKS = {"\n": "↵", "\t": "→"}
MISSING = "·"  # for characters that the font lacks
WIDEST = 0.9  # the part of a cell's width that a character may fill


def string_heatmap(
    text: str,
    values: Tensor,
    path: Path | str,
    *,
    names: Sequence[str] | None = None,
    gates: Sequence[bool] | None = None,
    label: str = "activation",
    title: str = "What a neuron reacts to: its value at each character",
) -> None:
    """Draws a text on cells coloured by the value at each character.

    Lines break after a newline, which is shown as a mark, and after 80 characters. A character that
    the font lacks is a dot. Colours are symmetric about 0 if a value is negative. Otherwise they go
    from 0 to 1, or to the largest value if that is larger. All neurons share one scale, except
    gates, whose scale goes from 0 to 1.

    Args:
        text: at least one character.
        values: ``[len(text)]``, or ``[K, len(text)]``, a block of lines for each of K neurons.
        path: the file to write; its ending says the format.
        names: of the K neurons; their numbers unless given.
        gates: whether each of the K is a gate, which holds a sigmoid; none is unless given.
        label: of the colour bar.
        title: of the picture.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: ``values`` is no Tensor.
        ValueError: the text is empty; ``values``, ``names`` or ``gates`` do not fit, values are not
            finite, or those of a gate not from 0 to 1; the ending of ``path``.
    """
    require_matplotlib(path)
    from matplotlib.collections import PathCollection
    from matplotlib.ticker import MaxNLocator

    if not text:
        raise ValueError("text is empty: give at least one character")
    blocks = finite("values", values)
    if blocks.dim() not in (1, 2) or blocks.shape[-1] != len(text) or not len(blocks):
        raise ValueError(
            f"values must have the shape [{len(text)}] or [K, {len(text)}], as long as the text, "
            f"got {list(blocks.shape)}"
        )
    if names is None:
        names = [f"neuron {k}" for k in range(len(blocks))] if blocks.dim() == 2 else [""]
    blocks = blocks.reshape(-1, len(text))
    gates = [False] * len(blocks) if gates is None else gates
    for what, given in (("names", names), ("gates", gates)):
        if len(given) != len(blocks):
            raise ValueError(f"{what} must have one for each of {len(blocks)}, got {len(given)}")
    is_gate = torch.tensor(gates)
    if is_gate.any() and (blocks[is_gate] != blocks[is_gate].clamp(0, 1)).any():
        raise ValueError("values of a gate must be from 0 to 1")

    scales = {kind: _colours(blocks[is_gate == kind], label, kind) for kind in sorted(set(gates))}
    cells = places(text)
    page = Page(names, title, *(cells.amax(0) + 1).tolist())
    glyphs, inked = outlines(text, cells)
    images = {}
    for k, block in enumerate(blocks):
        panel = page.panel(k)
        grid = torch.full((page.lines, page.columns), torch.nan, dtype=torch.float64)
        grid[cells[:, 0], cells[:, 1]] = block
        colours, scale, _ = scales[gates[k]]
        images[gates[k]] = panel.imshow(grid.numpy(), cmap=colours, norm=scale, aspect="auto")
        brightness = colours(scale(block[inked].numpy()))[:, :3] @ (0.299, 0.587, 0.114)
        inks = ["white" if b < 0.5 else "black" for b in brightness]
        panel.add_collection(PathCollection(glyphs, facecolors=inks, linewidths=0), autolim=False)
        panel.set(xticks=[], yticks=[])
        panel.set_title(names[k], loc="left", fontsize=10)
        panel.spines[:].set_visible(False)
    for i, (kind, (_, _, named)) in enumerate(scales.items()):
        bar = page.bar(i, len(scales))
        page.figure.colorbar(
            images[kind], cax=bar, label=named, orientation="horizontal", ticks=MaxNLocator(4)
        )
    page.figure.savefig(path, dpi=150)


def _colours(values: Tensor, label: str, is_gate: bool) -> tuple[Any, Any, str]:
    """The colours of some neurons, their range, and the label of the colour bar."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    if is_gate:
        return colormaps["YlGnBu"], Normalize(0, 1), "gate: shut at 0, open at 1"
    largest = float(values.abs().max())
    if values.min() < 0:
        return colormaps["RdBu_r"], Normalize(-largest, largest), label
    return colormaps["YlGnBu"], Normalize(0, max(1.0, largest)), label


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
    """The figure of `string_heatmap`, whose parts have places in inches.

    They are a title, panels of cells one below the other, each under its name, and colour bars.
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
    """Characters as outlines in units of cells, and the indices of those that have any ink.

    Outlines and not text, because a few thousand are drawn at once.
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
