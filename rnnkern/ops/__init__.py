"""The scan of a layer and its backward pass as operators of torch.

``torch.ops.rnnkern.scan`` and ``scan_backward`` are differentiable: they are what Dynamo and
`torch.export` see (`rnnkern.ops.differentiable`). Inside, ``scan_kernel`` and
``scan_backward_kernel`` run the kernels: they are what compiled graphs call, and what dispatch
modes see (`rnnkern.ops.kernel_ops`).

Operators return no alias of what they take, and change nothing in place.
"""

from rnnkern.ops import with_options
from rnnkern.ops.differentiable import scan, scan_backward
from rnnkern.ops.kernel_ops import arguments
from rnnkern.ops.modes import (
    are_batches,
    function_mode,
    has_modes,
    in_batches,
    only_differentiated,
    transformed,
)

__all__ = [
    "are_batches",
    "arguments",
    "function_mode",
    "has_modes",
    "in_batches",
    "only_differentiated",
    "scan",
    "scan_backward",
    "transformed",
    "with_options",
]
