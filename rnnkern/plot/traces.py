"""Pictures of what `rnnkern.inspect` finds: gradients, gates and states over the steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rnnkern.plot.style import CYCLE, LINE_STYLES, finite, numbers, require_matplotlib

if TYPE_CHECKING:
    from rnnkern.inspect import DirectionTrace, Trace

#: Gates that go through a sigmoid, in the order in which they are drawn.
SIGMOIDS = {
    "i": "input gate i",
    "f": "forget gate f",
    "o": "output gate o",
    "r": "reset gate r",
    "z": "update gate z",
}


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
    drawn = {name: numbers(f"curve {name!r}", curve) for name, curve in curves.items()}
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


def principal_components(states: Tensor) -> tuple[Tensor, Tensor]:
    """The coordinates of ``[T, H]`` states along the first two principal components.

    Returns:
        ``[T, 2]`` coordinates about the mean, and ``[2]``, the share of the variance that each
        component explains; 0 if there is no variance. Both are float64.
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

    states, colour = finite("states", states), finite("colour", colour)
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
