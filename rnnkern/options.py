"""What a call asks for besides torch.nn's arguments, ``lengths`` and ``reset``."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from rnnkern import autocast
from rnnkern.call import Call, has_cell_state, mode_of, state_shapes
from rnnkern.constructor import gains_of, option, options_besides_torchs, probability
from rnnkern.known_cells import CELLS, State, name_of
from rnnkern.layer import Maybe


class Options(NamedTuple):
    """The options of a call, of one layer or of a stack.

    It has no properties, because Dynamo of torch 2.10 cannot read one of a tuple that has
    tensors.

    Attributes:
        reset_h, reset_c: the states with which an episode begins, shaped as the initial states;
            None for zeros.
        cells: the cell states of all steps are a result.
        recurrent_dropout: probability of a unit of h to be hidden from the recurrent product, in
            all steps of a row. The others are scaled by ``1 / (1 - p)``.
        zoneout: probability of a state to stay as it is, in one step.
        draws: zoneout draws; else each state is its expectation.
        seed: int64 scalar of the random numbers, on the CPU; None if none are drawn.
        number: of the layer in its stack.
        gains: of layer normalisation, of each direction (`rnnkern.constructor.gains_of`); none if
            there is no normalisation.
    """

    reset_h: Maybe = None
    reset_c: Maybe = None
    cells: bool = False
    recurrent_dropout: float = 0.0
    zoneout: float = 0.0
    draws: bool = False
    seed: Maybe = None
    number: int = 0
    gains: tuple[tuple[Tensor, ...], ...] = ()

    def all_gains(self) -> list[Tensor]:
        """Those of all directions."""
        return [gain for own in self.gains for gain in own]

    def of_layer(self, i: int, directions: int) -> Options:
        """The options of layer i of a stack."""
        own = slice(i * directions, (i + 1) * directions)
        h, c = (None if z is None else z[own] for z in (self.reset_h, self.reset_c))
        return self._replace(reset_h=h, reset_c=c, number=i, gains=self.gains[own])


def asked_of(module: Any, reset: Any, reset_to: Any, return_cells: Any) -> Options | None:
    """What a call asks for, without the states of ``reset_to``; None if nothing.

    Raises:
        ValueError: the cell has no cell state to return, there is a ``reset_to`` without ``reset``,
            the module has a probability outside ``[0, 1)``, or `gains_of` raises it.
    """
    if return_cells and not has_cell_state(module):
        cell = name_of(module.mode)
        raise ValueError(f"return_cells needs a cell state, which {cell} does not have")
    if return_cells and CELLS[mode_of(module)].more_states:
        cell = name_of(module.mode)
        raise ValueError(f"return_cells is for cells with h and c, {cell} has more states")
    if reset_to is not None and reset is None:
        raise ValueError("reset_to says where a reset goes to: it needs reset, got reset=None")
    dropout = option(module, "recurrent_dropout") if module.training else 0
    zoneout = option(module, "zoneout")
    gains = gains_of(module)
    if reset_to is None and not (return_cells or dropout or zoneout or gains):
        return None
    return Options(
        cells=bool(return_cells),
        recurrent_dropout=probability("recurrent_dropout", dropout),
        zoneout=probability("zoneout", zoneout),
        draws=module.training,
        gains=gains,
    )


def asked_of_cell(module: Any) -> Options:
    """The options of a cell, such as `rnnkern.LSTMCell`."""
    return Options(gains=gains_of(module))


def options_of(call: Call, asked: Options, reset_to: Any) -> Options:
    """The options of a call that has been read, with a seed if they draw random numbers.

    Raises:
        TypeError, ValueError: ``reset_to`` has not the form, shapes, dtype or device of ``hx``.
    """
    if reset_to is not None:
        h, *c = _states(call, reset_to)
        asked = asked._replace(reset_h=h, reset_c=c[0] if c else None)
    if asked.recurrent_dropout or (asked.zoneout and asked.draws):
        from rnnkern.noise import draw_seed

        asked = asked._replace(seed=draw_seed())
    return asked


def _states(call: Call, reset_to: Any) -> State:
    """``(h,)`` or ``(h, c)`` of ``reset_to``, checked."""
    module, x = call.module, call.given.x
    cell = CELLS[mode_of(module)]
    names: Any = module.cell.states if cell.more_states else ("h", "c")[: 1 + cell.planes]
    if cell.planes == 0:
        reset_to, names = (reset_to,), ("",)
    elif not isinstance(reset_to, (tuple, list)) or len(reset_to) != len(names):
        form = ", ".join(names)
        raise TypeError(f"reset_to must be ({form}) as hx is, got {type(reset_to).__name__}")
    batched = call.input.dim() == 3
    h_shape, c_shape = state_shapes(module, call.N)
    found = []
    for name, state, shape in zip(
        names, reset_to, (h_shape, *[c_shape] * cell.planes), strict=True
    ):
        what = f"{name} of reset_to" if name else "reset_to"
        wanted = shape if batched else (shape[0], shape[2])
        if not isinstance(state, Tensor):
            raise TypeError(f"{what} must be a tensor, got {type(state).__name__}")
        if tuple(state.shape) != tuple(wanted):
            got = tuple(state.shape)
            raise ValueError(f"{what} must have shape {tuple(wanted)}, as hx, got {got}")
        if state.device != x.device:
            raise ValueError(f"{what} must be on {x.device}, as the input, got {state.device}")
        if state.dtype != x.dtype and (call.asked is None or not state.dtype.is_floating_point):
            raise TypeError(f"{what} must be of dtype {x.dtype}, as the input, got {state.dtype}")
        found.append(state if batched else state.unsqueeze(1))
    return cell.joined(tuple(found))


def computed(options: Options, call: Call, x: Tensor) -> Options:
    """The options with states in the dtype in which a call is computed, that of x."""
    if call.asked is None:
        return options
    h, c = autocast.cast(x.dtype, options.reset_h, options.reset_c)
    gains = tuple(tuple(autocast.cast(x.dtype, *own)) for own in options.gains)
    return options._replace(reset_h=h, reset_c=c, gains=gains)


def expect_none(module: Any, what: str) -> None:
    """Raises a ValueError if a module has an option that this function does not know."""
    for name, value in options_besides_torchs(module):
        if module.training or name != "recurrent_dropout":
            hint = "; call module.eval()" if name == "recurrent_dropout" else ""
            raise ValueError(f"{what} does not know {name}, got a module with {name}={value}{hint}")
