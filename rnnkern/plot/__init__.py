"""Pictures. They need matplotlib, the optional extra ``plot``: ``pip install "rnnkern[plot]"``."""

from rnnkern.plot.heatmap import string_heatmap
from rnnkern.plot.speedups import speedup
from rnnkern.plot.style import CYCLE, LINE_STYLES, require_matplotlib
from rnnkern.plot.traces import (
    SIGMOIDS,
    gate_saturation,
    gradient_flow,
    principal_components,
    saturation,
    state_trajectory,
)

__all__ = [
    "CYCLE",
    "LINE_STYLES",
    "SIGMOIDS",
    "gate_saturation",
    "gradient_flow",
    "principal_components",
    "require_matplotlib",
    "saturation",
    "speedup",
    "state_trajectory",
    "string_heatmap",
]
