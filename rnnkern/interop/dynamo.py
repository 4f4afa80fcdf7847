"""Lets ``torch.compile`` into rnnkern's modules.

Dynamo breaks the graph at every module that is a ``torch.nn.RNN``, ``LSTM`` or ``GRU``, as
rnnkern's are, unless ``torch._dynamo.config.allow_rnn`` is true. This module makes the flag an
object that is true for rnnkern's modules alone. Nothing changes for those of ``torch.nn``, and a
program that sets the flag has the last word. A Dynamo that has no such flag, or whose flag is true,
needs nothing. The function that writes torch's operators into exported programs is left for the
stage of an export that traces operators.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from torch import nn

from rnnkern.interop.on_import import on_import
from rnnkern.modules import GRU, LSTM, RNN, OwnRNN


class _OfRnnkern(int):
    """True if Dynamo asks about one of rnnkern's modules.

    Where Dynamo reads the flag, the module in question is a local variable, or the ``value`` of
    one. For code that copies or stores the configuration, the flag is the number 0.
    """

    def __bool__(self) -> bool:
        frame = sys._getframe(1)
        place = frame.f_globals.get("__name__", "")
        if not place.startswith("torch._dynamo."):
            return False
        own = list(frame.f_locals.values())
        asked = [each for each in [*own, *map(_value, own)] if isinstance(each, nn.Module)]
        traces = place.startswith(("torch._dynamo.variables", "torch._dynamo.symbolic_convert"))
        if traces and not asked and "value" not in frame.f_locals:
            raise RuntimeError(
                "rnnkern cannot tell which module Dynamo asks about in "
                f"{place}.{frame.f_code.co_name}, because this version of "
                "torch is not known to it. Set torch._dynamo.config.allow_rnn to True, and the "
                "modules of rnnkern and of torch.nn are compiled, or to False, and neither are"
            )
        recurrent = [each for each in asked if isinstance(each, nn.RNNBase)]
        return bool(recurrent) and all(
            isinstance(each, (RNN, LSTM, GRU, OwnRNN)) for each in recurrent
        )

    def __repr__(self) -> str:
        return "False"  # what torch writes as source code, for programs that reproduce a failure


def _value(variable: Any) -> Any:
    """The value of one of Dynamo's variables."""
    return vars(variable).get("value") if hasattr(variable, "__dict__") else None


def _allow(config: ModuleType) -> None:
    if getattr(config, "allow_rnn", None) is False:
        config.allow_rnn = _OfRnnkern()  # type: ignore[attr-defined]


def _leave(dynamo: Any) -> None:
    """Marks what Dynamo must not trace."""
    from rnnkern import autocast, call, run, traced
    from rnnkern.interop import aten

    dynamo.allow_in_graph(aten.exported)
    for function in (autocast.knows, call.own_method, run.is_covered, *traced.CONSTANT):
        dynamo.assume_constant_result(function)


def open_to_rnnkern() -> None:
    """Acts at once if Dynamo is imported already, or when it is: importing it takes a second."""
    on_import("torch._dynamo.config", _allow)
    on_import("torch._dynamo", _leave)
