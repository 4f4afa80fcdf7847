"""`rnnkern.plot`: the numbers drawn, a file for each picture, and clear errors before any file."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern
from rnnkern import inspect, plot
from rnnkern.plot import heatmap

pytest.importorskip("matplotlib", reason="pip install 'rnnkern[plot]'")
pytestmark = pytest.mark.cpu_only
LENGTHS = torch.tensor([9, 4])


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved."""
    from matplotlib.figure import Figure

    saved: list[Any] = []
    save = Figure.savefig

    def savefig(figure: Any, *arguments: Any, **options: Any) -> None:
        saved.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "picture.png"


def is_picture(path: Path) -> bool:
    content = path.read_bytes()
    return content.startswith(b"\x89PNG") and len(content) > 5000


def traced(kind: str, layout: str = "padded", **options: Any) -> inspect.Trace:
    """Weights are large, so that some gates are saturated."""
    torch.manual_seed(0)
    module = getattr(rnnkern, kind)(3, 5, batch_first=layout == "batch first", **options)
    for weight in module.parameters():
        weight.data.mul_(6)
    x = torch.randn(9, 2, 3)
    if layout == "packed":
        return inspect.trace(module, pack_padded_sequence(x, LENGTHS))
    return inspect.trace(
        module, x.transpose(0, 1) if layout == "batch first" else x, lengths=LENGTHS
    )


# gradient_flow


def test_gradient_flow(path: Path, figures: list[Any]) -> None:
    """Curves of two lengths end at the last step; 0 and infinity are at the ends of the axis."""
    long = torch.tensor([0.0, 1e-30, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    short = torch.tensor([math.inf, 3.0])
    plot.gradient_flow({"long": long, "short": short}, path)
    assert is_picture(path)
    (panel,) = figures[0].axes
    assert panel.get_yscale() == "log"
    assert panel.xaxis_inverted()
    curve, zeros, _, other, _, infinite = panel.get_lines()
    assert curve.get_xdata().tolist() == [3, 2, 1, 0]
    torch.testing.assert_close(
        torch.tensor(curve.get_ydata()),
        torch.tensor([math.nan, 1e-30, 0.5, 2.0], dtype=torch.float64),
        equal_nan=True,
    )
    assert (zeros.get_xdata().tolist(), list(zeros.get_ydata())) == ([3], [0])
    assert other.get_xdata().tolist() == [1, 0]
    assert (infinite.get_xdata().tolist(), list(infinite.get_ydata())) == ([1], [1])
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["long", "short"]
    assert "0" in panel.get_ylabel()  # what the triangles mean


def test_gradient_flow_of_zeros_alone(path: Path) -> None:
    plot.gradient_flow({"nothing": torch.zeros(4)}, path)
    assert is_picture(path)


# gate_saturation


@pytest.mark.parametrize("layout", ["padded", "batch first", "packed"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_saturation(kind: str, layout: str) -> None:
    """Counted sequence by sequence and step by step."""
    part = traced(kind, layout, bidirectional=True).layers[0][1]
    with torch.no_grad():
        padded = traced(kind, bidirectional=True).layers[0][1]
    found = plot.saturation(part, 0.2, 0.7)
    assert list(found) == {"LSTM": ["i", "f", "o"], "GRU": ["r", "z"]}[kind]
    for name, fractions in found.items():
        steps = [
            padded.gates[name][t, n] for n, length in enumerate(LENGTHS) for t in range(length)
        ]
        left = sum((step < 0.2).double() for step in steps) / len(steps)
        right = sum((step > 0.7).double() for step in steps) / len(steps)
        assert 0 < left.max() <= 1
        assert 0 < right.max() <= 1
        torch.testing.assert_close(fractions, torch.stack([left, right]))


def test_gate_saturation(path: Path, figures: list[Any]) -> None:
    seen = traced("LSTM", num_layers=2, bidirectional=True)
    plot.gate_saturation(seen, path, low=0.2, high=0.7)
    assert is_picture(path)
    panels = figures[0].axes
    assert [panel.get_title() for panel in panels] == [plot.SIGMOIDS[name] for name in "ifo"]
    for panel, name in zip(panels, "ifo", strict=True):
        *points, _ = panel.get_lines()
        for drawn, (i, d) in zip(points, [(0, 0), (0, 1), (1, 0), (1, 1)], strict=True):
            wanted = plot.saturation(seen.layers[i][d], 0.2, 0.7)[name]
            torch.testing.assert_close(torch.tensor(drawn.get_xydata()).T, wanted)
        colours = [drawn.get_color() for drawn in points]
        assert colours[0] == colours[1] != colours[2] == colours[3]
    assert len(figures[0].legends[0].get_texts()) == 4


def test_gate_saturation_of_one_layer_needs_no_legend(path: Path, figures: list[Any]) -> None:
    plot.gate_saturation(traced("GRU"), path)
    assert not figures[0].legends


def test_plot_is_there_without_another_import() -> None:
    code = "import rnnkern, sys; rnnkern.plot.gradient_flow; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# string_heatmap


def test_lines_break_after_a_newline_and_at_full_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heatmap, "COLUMNS", 3)
    wanted = [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [3, 0]]
    assert heatmap.places("a\nbcde\nf").tolist() == wanted
    assert heatmap.places("\n\na").tolist() == [[0, 0], [1, 0], [2, 0]]


@pytest.mark.parametrize(
    ("values", "lowest", "highest"),
    [
        ([-0.25, 0.0, 0.5, 0.1], -0.5, 0.5),
        ([0.25, 0.0, 0.5, 0.1], 0, 1),
        ([0.25, 0.0, 3.0, 0.1], 0, 3),
        ([0.0, 0.0, 0.0, 0.0], 0, 1),
    ],
    ids=["signed", "gate", "large", "zeros"],
)
def test_string_heatmap(
    values: list[float], lowest: float, highest: float, path: Path, figures: list[Any]
) -> None:
    plot.string_heatmap("a\n$ ", torch.tensor(values), path)
    assert is_picture(path)
    panel, bar = figures[0].axes
    (image,) = panel.get_images()
    assert image.get_clim() == (lowest, highest)
    drawn = torch.tensor(image.get_array().filled(math.nan))
    wanted = torch.tensor([values[:2], values[2:]]).double()
    torch.testing.assert_close(drawn, wanted)
    assert bar.get_xlabel() == "activation"


def test_string_heatmap_of_characters(path: Path, figures: list[Any]) -> None:
    """Each on its cell, newlines as a mark, none for a blank; ink that can be read."""
    plot.string_heatmap("l \nM", torch.tensor([-1.0, 0.0, 0.0, 1.0]), path)
    (glyphs,) = figures[0].axes[0].collections
    centres = []
    for outline in glyphs.get_paths():
        box = outline.get_extents()
        assert box.width < 1
        assert box.height < 1
        centres.append(((box.y0 + box.y1) / 2, (box.x0 + box.x1) / 2))
    assert [tuple(map(round, centre)) for centre in centres] == [(0, 0), (0, 2), (1, 0)]
    assert glyphs.get_facecolors()[:, 0].tolist() == [1, 0, 1]


def test_string_heatmap_of_several_neurons(path: Path, figures: list[Any]) -> None:
    text = "twelve words" * 125
    values = torch.randn(2, len(text))
    plot.string_heatmap(text, values, path, names=["first", "second"])
    assert is_picture(path)
    first, second, _ = figures[0].axes
    for panel, row, name in ((first, values[0], "first"), (second, values[1], "second")):
        assert panel.get_title("left") == name
        (image,) = panel.get_images()
        drawn = torch.tensor(image.get_array().filled(math.nan))
        assert drawn.shape == (19, heatmap.COLUMNS)
        torch.testing.assert_close(drawn.flatten()[: len(text)], row.double())
        assert drawn.flatten()[len(text) :].isnan().all()
        assert image.get_clim() == (-values.abs().max().item(), values.abs().max().item())


def test_string_heatmap_of_gates(path: Path, figures: list[Any]) -> None:
    """They have a scale and a colour bar of their own."""
    values = torch.tensor([[-2.0, 1.0], [0.25, 0.5], [0.5, 3.0]])
    plot.string_heatmap("ab", values, path, gates=[False, True, False], label="state")
    *panels, signed, gate = figures[0].axes
    limits = [panel.get_images()[0].get_clim() for panel in panels]
    assert limits == [(-3, 3), (0, 1), (-3, 3)]
    assert signed.get_xlabel() == "state"
    assert "0" in gate.get_xlabel()
    assert "1" in gate.get_xlabel()


def test_string_heatmap_is_as_wide_as_its_names(path: Path, figures: list[Any]) -> None:
    """And nothing of it overlaps: bars below the panels, all within the figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    name = "a name that is a good deal longer than the lines of the text that it stands above"
    plot.string_heatmap("ab", torch.zeros(3, 2), path, names=[name] * 3)
    figure = figures[0]
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [panel.get_tightbbox(renderer) for panel in figure.axes]
    assert all(box.x0 > 0 and box.x1 < figure.bbox.width for box in boxes)
    assert boxes[-1].y0 > 0
    for above, below in pairwise(boxes):
        assert 0 < above.y0 - below.y1 < 0.3 * figure.dpi


@pytest.mark.filterwarnings("error")
def test_string_heatmap_of_what_the_font_lacks(path: Path, figures: list[Any]) -> None:
    """A dot; what it has fits its cell."""
    plot.string_heatmap("\u4e2d\U0001f600", torch.zeros(2), path)
    (glyphs,) = figures[0].axes[0].collections
    dot, face = (outline.get_extents() for outline in glyphs.get_paths())
    assert dot.width < 0.3
    assert dot.height < 0.3
    assert 0.5 < face.x0 < face.x1 < 1.5


def test_string_heatmap_of_blanks(path: Path) -> None:
    plot.string_heatmap("  ", torch.zeros(2), path)
    assert is_picture(path)


# state_trajectory


def test_principal_components() -> None:
    """Beside the eigenvectors of the covariance."""
    states = torch.randn(20, 4, dtype=torch.float64) * torch.tensor([1.0, 5, 2, 0.1]) + 3
    points, shares = plot.principal_components(states)
    variances, axes = torch.linalg.eigh(torch.cov(states.T))
    torch.testing.assert_close(shares, variances.flip(0)[:2] / variances.sum())
    wanted = (states - states.mean(0)) @ axes.flip(1)[:, :2]
    torch.testing.assert_close(points * (points[0] * wanted[0]).sign(), wanted)


def test_principal_components_without_variance() -> None:
    points, shares = plot.principal_components(torch.ones(3, 2))
    assert not points.any()
    assert not shares.any()


def test_state_trajectory(path: Path, figures: list[Any]) -> None:
    states, colour = torch.randn(20, 4, requires_grad=True), torch.arange(20)
    plot.state_trajectory(states, path, colour=colour, label="step")
    assert is_picture(path)
    points, shares = plot.principal_components(states.detach())
    panel, bar = figures[0].axes
    line, first, last = panel.get_lines()
    for place in (torch.tensor(line.get_xydata()), panel.collections[0].get_offsets()):
        torch.testing.assert_close(torch.as_tensor(place), points)
    assert panel.collections[0].get_array().tolist() == colour.tolist()
    assert first.get_xydata()[0].tolist() == points[0].tolist()
    assert last.get_xydata()[0].tolist() == points[-1].tolist()
    assert f"{100 * shares[0]:.1f} %" in panel.get_xlabel()
    assert f"{100 * shares[1]:.1f} %" in panel.get_ylabel()
    assert bar.get_ylabel() == "step"


# Errors

Draw = Callable[[Path], None]


def flow(**curves: Any) -> Draw:
    return lambda path: plot.gradient_flow(curves, path)


def gates(seen: Callable[[], inspect.Trace], **options: float) -> Draw:
    return lambda path: plot.gate_saturation(seen(), path, **options)


def heat(text: str, values: Any, **options: Any) -> Draw:
    return lambda path: plot.string_heatmap(text, values, path, **options)


def trajectory(states: Tensor, colour: Any) -> Draw:
    return lambda path: plot.state_trajectory(states, path, colour=colour, label="step")


def without_steps() -> inspect.Trace:
    (part,) = traced("GRU").layers[0]
    empty = part._replace(gates={name: torch.zeros(4, 2, 5) for name in part.gates})
    return inspect.Trace(None, None, [[empty]])


NAN = torch.tensor([1.0, math.nan])
WRONG: dict[str, tuple[Draw, str]] = {
    "no curves": (flow(), "at least one"),
    "curve of two axes": (flow(a=torch.ones(2, 3)), r"'a' must have the shape \[T\].*\[2, 3\]"),
    "curve without steps": (flow(a=torch.ones(0)), r"'a' must have the shape \[T\], got \[0\]"),
    "negative curve": (flow(a=torch.tensor([1.0, -1.0])), "'a' must hold norms"),
    "curve of NaN": (flow(a=NAN), "'a' must hold norms"),
    "curve of a list": (flow(a=[1.0]), "'a' must be a Tensor, got list"),
    "gates of an RNN": (gates(lambda: traced("RNN")), "an RNN has no gates"),
    "gates of no steps": (gates(without_steps), "no steps"),
    "low above high": (gates(lambda: traced("GRU"), low=0.9, high=0.1), "got 0.9 and 0.1"),
    "high above 1": (gates(lambda: traced("GRU"), high=1.5), "got 0.1 and 1.5"),
    "no text": (heat("", torch.ones(0)), "at least one character"),
    "short values": (heat("abc", torch.ones(2)), r"\[3\] or \[K, 3\].*got \[2\]"),
    "values of three axes": (heat("abc", torch.ones(1, 1, 3)), r"got \[1, 1, 3\]"),
    "no neurons": (heat("abc", torch.ones(0, 3)), r"got \[0, 3\]"),
    "values of NaN": (heat("ab", NAN), "values must be finite"),
    "values of a list": (heat("ab", [0, 1]), "values must be a Tensor, got list"),
    "too few gates": (heat("ab", torch.ones(2, 2), gates=[True]), "gates .* each of 2, got 1"),
    "a gate above 1": (heat("ab", torch.tensor([0.0, 1.5]), gates=[True]), "from 0 to 1"),
    "too few names": (heat("ab", torch.ones(2, 2), names=["a"]), "each of 2, got 1"),
    "states of one axis": (trajectory(torch.ones(3), torch.ones(3)), r"\[T, H\].*got \[3\]"),
    "one state": (trajectory(torch.ones(1, 3), torch.ones(1)), r"at least 2, got \[1, 3\]"),
    "one unit": (trajectory(torch.ones(3, 1), torch.ones(3)), r"at least 2, got \[3, 1\]"),
    "states of NaN": (trajectory(NAN.expand(3, 2), torch.ones(3)), "states must be finite"),
    "short colour": (trajectory(torch.ones(3, 2), torch.ones(2)), r"shape \[3\].*got \[2\]"),
    "colour of a list": (trajectory(torch.ones(2, 2), [1, 2]), "colour must be a Tensor"),
}


@pytest.mark.parametrize("case", WRONG)
def test_clear_errors(case: str, path: Path) -> None:
    draw, message = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=message):
        draw(path)
    assert not path.exists()


@pytest.mark.parametrize(
    "draw",
    [
        flow(a=torch.ones(2)),
        gates(lambda: traced("GRU")),
        heat("ab", torch.ones(2)),
        trajectory(torch.eye(2), torch.ones(2)),
    ],
    ids=["gradient_flow", "gate_saturation", "string_heatmap", "state_trajectory"],
)
def test_unknown_format(draw: Draw, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"picture.xyz: the name must end in one of.* png"):
        draw(tmp_path / "picture.xyz")
