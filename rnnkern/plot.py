"""Pictures. They need matplotlib, the optional extra ``plot``: ``pip install "rnnkern[plot]"``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rnnkern.page import Page, outlines, places
from rnnkern.workloads import CELLS, PASSES

if TYPE_CHECKING:
    from rnnkern.compare import Row
    from rnnkern.inspect import DirectionTrace, Trace

# Told apart in grey and by colour-blind readers too.
COLOURS = {"RNN": "#0072b2", "LSTM": "#e69f00", "GRU": "#009e73"}
CYCLE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000", "#999933")
LINE_STYLES = ("-", "--", "-.", ":")

#: Gates that go through a sigmoid, in the order in which they are drawn.
SIGMOIDS = {
    "i": "input gate i",
    "f": "forget gate f",
    "o": "output gate o",
    "r": "reset gate r",
    "z": "update gate z",
}


def require_matplotlib(path: Path | str) -> None:
    """Makes sure that a picture can be drawn into ``path``, before the work that it is to show.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: the ending of ``path`` is none that matplotlib can write.
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


def speedup(rows: Sequence[Row], path: Path) -> None:
    """Draws the speed-up over torch.nn per workload, a panel for each dtype and pass and a bar for
    each cell.

    Args:
        rows: timings, at least one.
        path: the file to write; its ending says the format.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    # Figure and not pyplot: no display, and no state left behind in the process of whoever calls.
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(r.dtype for r in rows))
    shown = [
        (dtype, pass_name)
        for dtype in dtypes
        for pass_name in PASSES
        if any((r.dtype, r.pass_name) == (dtype, pass_name) for r in rows)
    ]
    cells = [c for c in CELLS if any(r.cell in (c, c + "Cell") for r in rows)]
    workloads = list(dict.fromkeys(r.workload for r in rows))
    size = (max(5.0, 1.5 + 0.85 * len(workloads)), 0.9 + 2.4 * len(shown))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    width = 0.8 / len(cells)
    for panel, (dtype, pass_name) in zip(panels, shown, strict=True):
        for i, cell in enumerate(cells):
            wanted = (dtype, pass_name, cell)
            found = [
                r for r in rows if (r.dtype, r.pass_name, r.cell.removesuffix("Cell")) == wanted
            ]
            places = [
                workloads.index(r.workload) + (i - (len(cells) - 1) / 2) * width for r in found
            ]
            # Bars grow from 1 and not from 0: a slow-down points downwards.
            heights = [r.speedup - 1 for r in found]
            panel.bar(places, heights, width, bottom=1, color=COLOURS[cell], label=cell)
        panel.axhline(1, color="black", linewidth=1)
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter("{x:g}x")
        title = pass_name if len(dtypes) == 1 else f"{dtype}, {pass_name}"
        panel.set_title(title, loc="left", fontsize=10)
        panel.grid(axis="y", alpha=0.3)
        panel.set_axisbelow(True)
    panels[-1].set_xticks(range(len(workloads)), workloads, rotation=30, ha="right")
    first = rows[0]
    figure.suptitle(
        f"Speed-up over torch.nn: {', '.join(dtypes)} on {first.device}, threads: {first.threads}",
        fontsize=11,
    )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(cells), frameon=False)
    figure.savefig(path, dpi=150)


def gradient_flow(
    curves: Mapping[str, Tensor],
    path: Path | str,
    *,
    title: str = "How far gradients reach: the flatter a curve, the longer the memory",
) -> None:
    """Draws how strongly the last state depends on each earlier one, a curve for each network.

    The axis of the norms is logarithmic: norms of 0 are triangles at its lower end, infinite ones
    at its upper end.

    Args:
        curves: by the name in the legend, ``[T]``, norms in the order of the steps, the last
            state's own last, such as ``h[layer, :, n]`` of `rnnkern.inspect.gradient_flow`. T may
            differ.
        path: the file to write; its ending says the format.
        title: of the picture.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: a curve that is no Tensor.
        ValueError: no curves; one that has another shape, is negative or NaN; or the ending of
            ``path``.
    """
    require_matplotlib(path)
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not curves:
        raise ValueError("curves is empty: give at least one")
    drawn = {name: _numbers(f"curve {name!r}", curve) for name, curve in curves.items()}
    for name, norms in drawn.items():
        if norms.dim() != 1 or not len(norms):
            raise ValueError(f"curve {name!r} must have the shape [T], got {list(norms.shape)}")
        if not (norms >= 0).all():
            raise ValueError(f"curve {name!r} must hold norms, got a negative number or NaN")
    figure = Figure(figsize=(8.5, 4.5), layout="constrained")
    panel = figure.subplots()
    panel.set_yscale("log")
    panel.grid(alpha=0.3)
    for i, (name, norms) in enumerate(drawn.items()):
        before = torch.arange(len(norms) - 1, -1, -1)
        shown = (norms > 0) & norms.isfinite()
        colour = CYCLE[i % len(CYCLE)]
        panel.plot(
            before.numpy(),
            norms.where(shown, torch.nan).numpy(),
            LINE_STYLES[i % len(LINE_STYLES)],
            color=colour,
            marker="." if len(norms) <= 30 else None,
            label=name,
        )
        for outside, height, marker in ((norms == 0, 0, "v"), (norms.isinf(), 1, "^")):
            at = before[outside]
            (triangles,) = panel.plot(
                at.numpy(),
                [height] * len(at),
                marker,
                color=colour,
                transform=panel.get_xaxis_transform(),
                clip_on=False,
            )
            triangles.set_in_layout(False)
    panel.invert_xaxis()
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlabel("steps before the last one")
    is_outside = any(((norms == 0) | norms.isinf()).any() for norms in drawn.values())
    note = "\n(triangles: 0, at the top infinite)" if is_outside else ""
    panel.set_ylabel(
        "norm of the gradient of the last state\n"
        f"with respect to the state so many steps before{note}"
    )
    panel.set_title(title, loc="left", fontsize=11)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150)


def saturation(part: DirectionTrace, low: float, high: float) -> dict[str, Tensor]:
    """How often each sigmoid gate of one layer and direction is saturated.

    Steps past the end of a sequence, at which a trace is 0, do not count.

    Args:
        part: of `rnnkern.inspect.trace`.
        low, high: a gate below ``low`` is left-saturated, one above ``high`` right-saturated.

    Returns:
        By the name of the gate, ``[2, H]``: the fraction of the steps, of all sequences, at which
        each unit is left-saturated, and right-saturated. Empty for an RNN.

    Raises:
        ValueError: the trace has no steps.
    """
    gates = {name: part.gates[name].detach() for name in SIGMOIDS if name in part.gates}
    if not gates:
        return {}
    # No sigmoid of a real step is 0 in all units of all gates.
    is_step = (torch.stack(list(gates.values())) != 0).any(-1).any(0)
    if not is_step.any():
        raise ValueError("the trace has no steps")
    rows = {name: gate[is_step] for name, gate in gates.items()}
    return {
        name: torch.stack([of_gate < low, of_gate > high]).double().mean(1).cpu()
        for name, of_gate in rows.items()
    }


def gate_saturation(trace: Trace, path: Path | str, *, low: float = 0.1, high: float = 0.9) -> None:
    """Draws how often gates are shut and open, a panel for each sigmoid gate: i, f, o of an LSTM,
    r, z of a GRU.

    Every point is a unit: the fraction of the steps at which its gate is below ``low``
    (left-saturated) against the fraction at which it is above ``high`` (right-saturated). Layers
    differ in colour, directions in marker. Steps past the end of a sequence do not count.

    Args:
        trace: of `rnnkern.inspect.trace`, of any layout.
        path: the file to write; its ending says the format.
        low, high: where saturation begins, ``0 <= low < high <= 1``.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: the trace is of an RNN, which has no gates, or has no steps; ``low`` and
            ``high``; the ending of ``path``.
    """
    require_matplotlib(path)
    from matplotlib.figure import Figure

    if not 0 <= low < high <= 1:
        raise ValueError(f"low and high must be 0 <= low < high <= 1, got {low} and {high}")
    layers = [[saturation(part, low, high) for part in layer] for layer in trace.layers]
    names = list(layers[0][0])
    if not names:
        raise ValueError("the trace must be of an LSTM or a GRU: an RNN has no gates")
    is_alone = len(layers) == len(layers[0]) == 1
    height = 4.6 if is_alone else 4.8
    figure = Figure(figsize=(1.2 + 3.2 * len(names), height), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        for i, layer in enumerate(layers):
            for d, fractions in enumerate(layer):
                direction = ("", ", backward")[d]
                panel.plot(
                    *fractions[name].numpy(),
                    "ox"[d],
                    color=CYCLE[i % len(CYCLE)],
                    alpha=0.6,
                    label=f"layer {i}{direction}",
                )
        panel.plot([0, 1], [1, 0], color="black", linewidth=0.8)  # the two add up to 1 at most
        panel.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), aspect="equal")
        panel.set_title(SIGMOIDS[name], fontsize=10)
        panel.set_xlabel(f"fraction of steps < {low:g}")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"fraction of steps > {high:g}")
    figure.suptitle(
        "Gate saturation, a point for each unit:\n"
        "always shut is at the lower right, always open at the upper left",
        fontsize=11,
    )
    if not is_alone:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


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

    Lines break after a newline, which is shown as a mark, and after 80 characters; a character that
    the font lacks is a dot. Colours are symmetric about 0 where a value is negative; else they go
    from 0 to 1, or to the largest value beyond it. All neurons share them but those that are gates,
    which have colours of their own, from 0 to 1.

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
    blocks = _finite("values", values)
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
    """The colours of some neurons, from which to which value they go, and what they mean."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    if is_gate:
        return colormaps["YlGnBu"], Normalize(0, 1), "gate: shut at 0, open at 1"
    largest = float(values.abs().max())
    if values.min() < 0:
        return colormaps["RdBu_r"], Normalize(-largest, largest), label
    return colormaps["YlGnBu"], Normalize(0, max(1.0, largest)), label


def principal_components(states: Tensor) -> tuple[Tensor, Tensor]:
    """Where ``[T, H]`` states lie along the first two principal components.

    Returns:
        ``[T, 2]`` coordinates about the mean, and ``[2]``, the share of the variance that each
        component explains; 0 where there is no variance. Both are float64.
    """
    centred = states.double() - states.double().mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    total = s.square().sum().clamp_min(torch.finfo(s.dtype).tiny)
    return u[:, :2] * s[:2], s[:2].square() / total


def state_trajectory(
    states: Tensor,
    path: Path | str,
    *,
    colour: Tensor,
    label: str,
    title: str = "The path of the state through its first two principal components",
) -> None:
    """Draws the path of a state in the plane of its first two principal components.

    Args:
        states: ``[T, H]``, T and H at least 2, such as ``h[:, n]`` of a trace.
        path: the file to write; its ending says the format.
        colour: ``[T]``, a number for each step.
        label: what the colours mean, with the unit.
        title: of the picture.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: ``states`` or ``colour`` is no Tensor.
        ValueError: ``states`` or ``colour`` has another shape or is not finite; the ending of
            ``path``.
    """
    require_matplotlib(path)
    from matplotlib.figure import Figure

    states, colour = _finite("states", states), _finite("colour", colour)
    if states.dim() != 2 or min(states.shape) < 2:
        raise ValueError(
            f"states must have the shape [T, H], both at least 2, got {list(states.shape)}"
        )
    if colour.shape != states.shape[:1]:
        raise ValueError(
            f"colour must have the shape [{len(states)}], a number for each state, "
            f"got {list(colour.shape)}"
        )
    points, shares = principal_components(states)
    x, y = points.T.numpy()
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    panel = figure.subplots()
    panel.plot(x, y, color="0.7", linewidth=0.7, zorder=1)
    dots = panel.scatter(x, y, c=colour.numpy(), s=14, cmap="viridis", zorder=2)
    for name, marker, at in (("first state", "s", 0), ("last state", "D", -1)):
        panel.plot(
            x[at],
            y[at],
            marker,
            markersize=9,
            color="black",
            fillstyle="none",
            label=name,
            zorder=3,
        )
    panel.set_aspect("equal", adjustable="datalim")
    panel.grid(alpha=0.3)
    first, second = (100 * shares).tolist()
    panel.set_xlabel(f"first principal component ({first:.1f} % of the variance)")
    panel.set_ylabel(f"second principal component ({second:.1f} % of the variance)")
    panel.set_title(title, loc="left", fontsize=11)
    panel.legend(frameon=False)
    figure.colorbar(dots, label=label)
    figure.savefig(path, dpi=150)


def _numbers(name: str, given: object) -> Tensor:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(given).__name__}")
    return given.detach().double().cpu()


def _finite(name: str, given: object) -> Tensor:
    numbers = _numbers(name, given)
    if not numbers.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or an infinite number")
    return numbers
