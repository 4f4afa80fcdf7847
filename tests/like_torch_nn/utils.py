"""torch.nn.utils, torch.func and torch.autograd.functional."""

from __future__ import annotations

import copy
import functools
import io
import warnings
from collections import OrderedDict
from typing import Any

import torch
from support import CELLS, LAYERS, Halved, flatten
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, stateless

from like_torch_nn import (
    ROWS,
    I,
    Row,
    Side,
    attempt,
    drawn,
    first,
    gradients,
    loss_of,
)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


# torch.nn.utils that change a module in place: what is changed, and the module afterwards.
CHANGES: dict[str, Any] = {
    "parametrized": lambda m, name: parametrize.register_parametrization(m, name, Halved()),
    "parametrized-twice": lambda m, name: [
        parametrize.register_parametrization(m, name, each) for each in (Halved(), Doubled())
    ],
    "parametrized-and-removed": lambda m, name: (
        parametrize.register_parametrization(m, name, Halved()),
        parametrize.remove_parametrizations(m, name),
    ),
    "parametrized-and-left": lambda m, name: (
        parametrize.register_parametrization(m, name, Doubled(), unsafe=True),
        parametrize.remove_parametrizations(m, name, leave_parametrized=True),
    ),
    "parametrized-and-assigned": lambda m, name: (
        parametrize.register_parametrization(m, name, Halved()),
        setattr(m, name, torch.ones(getattr(m, name).shape)),
    ),
    "parametrized-bias": lambda m, name: parametrize.register_parametrization(
        m, name.replace("weight", "bias"), Halved()
    ),
    "weight-norm": lambda m, name: parametrizations.weight_norm(m, name),
    "spectral-norm": lambda m, name: parametrizations.spectral_norm(m, name, n_power_iterations=50),
    "orthogonal": lambda m, name: parametrizations.orthogonal(m, name),
    "old-weight-norm": lambda m, name: nn.utils.weight_norm(m, name),
    "old-weight-norm-removed": lambda m, name: (
        nn.utils.weight_norm(m, name),
        m(_input_of(m)),
        nn.utils.remove_weight_norm(m, name),
    ),
    "old-spectral-norm": lambda m, name: nn.utils.spectral_norm(m, name),
    "old-spectral-norm-removed": lambda m, name: (
        nn.utils.spectral_norm(m, name),
        nn.utils.remove_spectral_norm(m, name),
    ),
    "pruned": lambda m, name: prune.l1_unstructured(m, name, amount=0.3),
    "pruned-at-random": lambda m, name: prune.random_unstructured(m, name, amount=3),
    "pruned-by-a-mask": lambda m, name: prune.custom_from_mask(
        m, name, torch.arange(getattr(m, name).numel()).view_as(getattr(m, name)) % 2
    ),
    "pruned-in-rows": lambda m, name: prune.ln_structured(m, name, amount=1, n=2, dim=0),
    "pruned-in-random-rows": lambda m, name: prune.random_structured(m, name, amount=2, dim=0),
    "pruned-twice": lambda m, name: [
        prune.random_unstructured(m, name, amount=0.2),
        prune.l1_unstructured(m, name, amount=0.2),
    ],
    "pruned-and-removed": lambda m, name: (
        prune.l1_unstructured(m, name, amount=0.3),
        prune.remove(m, name),
    ),
    "pruned-globally": lambda m, name: prune.global_unstructured(
        [(m, name), (m, name.replace("hh", "ih"))], prune.L1Unstructured, amount=0.5
    ),
    "pruned-not-at-all": lambda m, name: prune.identity(m, name),
}


def _input_of(module: nn.Module) -> Tensor:
    return drawn(1, *((5, 2, I) if isinstance(module, nn.RNNBase) else (2, I)))


def changed(change: Any) -> Row:
    def row(side: Side) -> Any:
        module = side.make()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            change(module, side.weight)
        seen = [
            [name for name, _ in module.named_parameters()],
            [name for name, _ in module.named_buffers()],
            list(module.state_dict()),
            type(module).__name__,
            parametrize.is_parametrized(module),
            prune.is_pruned(module),
            repr(module),
        ]
        seen += [side.outcome(module), side.outcome(module.eval())]
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(0.5)
        return [*seen, side.outcome(module)]

    return row


ROWS.add({name: changed(change) for name, change in CHANGES.items()})


@ROWS.row()
def parametrizations_cached(side: Side) -> Any:
    module = side.make()
    parametrize.register_parametrization(module, side.weight, Halved())
    with parametrize.cached():
        same = getattr(module, side.weight) is getattr(module, side.weight)
        return same, side.outcome(module)


@ROWS.row()
def how_often_parametrizations_are_evaluated(side: Side) -> Any:
    class Counted(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            seen.append(1)
            return weight

    module, seen = side.make(), []
    parametrize.register_parametrization(module, side.weight, Counted())
    seen.clear()
    module(side.x())
    return len(seen)


@ROWS.row()
def copies_of_a_parametrized_module(side: Side) -> Any:
    module = side.make()
    parametrize.register_parametrization(module, side.weight, Halved())
    other = copy.deepcopy(module)
    pickled = attempt(lambda: torch.save(module, io.BytesIO()))
    return side.outcome(other), pickled, str(other.load_state_dict(module.state_dict()))


@ROWS.row()
def parametrizations_carried_over(side: Side) -> Any:
    module, other = side.make(), side.make()
    parametrize.register_parametrization(module, side.weight, Halved())
    parametrize.transfer_parametrizations_and_params(module, other)
    return side.outcome(other), parametrize.type_before_parametrizations(other) is side.type


@ROWS.row()
def vectors_of_parameters(side: Side) -> Any:
    module = side.make()
    vector = nn.utils.parameters_to_vector(module.parameters())
    nn.utils.vector_to_parameters(vector * 2, module.parameters())
    return vector, side.outcome(module)


@ROWS.row()
def clipped_gradients(side: Side) -> Any:
    module = side.make()
    side.outcome(module)
    norm = nn.utils.clip_grad_norm_(module.parameters(), 0.5, foreach=True)
    nn.utils.clip_grad_value_(module.parameters(), 0.01)
    total = nn.utils.get_total_norm([p.grad for p in module.parameters()])
    seen = [p.grad.clone() for p in module.parameters()]
    nn.utils.clip_grads_with_norm_(module.parameters(), 0.01, total)
    return norm, total, seen, [p.grad for p in module.parameters()]


@ROWS.row()
def memory_format_of_convolutions(side: Side) -> Any:
    model = nn.ModuleList([side.make(), nn.Conv2d(1, 2, 3)])
    nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
    return side.outcome(model[0])


def _halves(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() * 0.5 for name, p in module.named_parameters()}


@ROWS.row()
def functional_call(side: Side) -> Any:
    module = side.make()
    weights = {name: w.requires_grad_() for name, w in _halves(module).items()}
    seen = []
    for call in (torch.func.functional_call, _old_functional_call):
        outputs = call(module, weights, (side.x(),), {"hx": side.hx()})
        seen += [outputs, list(torch.autograd.grad(loss_of(outputs), list(weights.values())))]
    one = {side.weight: weights[side.weight]}
    return seen, torch.func.functional_call(module, one, side.x()), side.outcome(module)


@ROWS.row(*LAYERS)
def per_sample_gradients_by_expanded_weights(side: Side) -> Any:
    """Weights of a subclass that refuses to be asked anything by what is not torch's."""
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    module, x = side.make(batch_first=True), side.x().transpose(0, 1).requires_grad_()
    first(call_for_per_sample_grads(module, batch_size=len(x))(x)).square().sum().backward()
    return [p.grad_sample for p in module.parameters()]


def _old_functional_call(*given: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return stateless.functional_call(*given)


@ROWS.row()
def functional_call_of_strange_weights(side: Side) -> Any:
    module = side.make()
    call = torch.func.functional_call
    return (
        attempt(lambda: call(module, {"nothing": torch.ones(1)}, side.x(), strict=True)),
        attempt(lambda: call(module, {"nothing": torch.ones(1)}, side.x())),
        type(attempt(lambda: call(module, {side.weight: torch.ones(1)}, side.x(), strict=True))),
    )


@ROWS.row()
def functional_call_in_a_container(side: Side) -> Any:
    model = nn.Sequential(OrderedDict(rnn=side.make()))
    return torch.func.functional_call(model, _halves(model), side.x())


@ROWS.row()
def stacked_module_state(side: Side) -> Any:
    modules = [side.make() for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(modules)
    return parameters, buffers


@ROWS.row()
def gradients_of_torch_func(side: Side) -> Any:
    module = side.make()
    weights = {name: p.detach() for name, p in module.named_parameters()}

    def loss(given: dict[str, Tensor]) -> Tensor:
        return loss_of(torch.func.functional_call(module, given, side.x()))

    value, pull = torch.func.vjp(loss, weights)
    return torch.func.grad_and_value(loss)(weights), value, pull(torch.ones(()))


@ROWS.row(*CELLS)
def compiled_transforms(side: Side) -> Any:
    """Not vmap of LSTMCell, which torch.nn cannot do."""
    module, x = side.make(), side.x()
    wrt_x = torch.func.grad(lambda x: loss_of(module(x)))
    programs = [
        (wrt_x, x),
        (lambda x: torch.func.jvp(lambda x: loss_of(module(x)), (x,), (x,)), x),
    ]
    if side.kind != "LSTMCell":
        programs.append((torch.vmap(module), torch.stack([x, -x])))
    found = []
    for function, given in programs:
        torch._dynamo.reset()
        found.append(torch.compile(function, backend="eager")(given))
    return found


@ROWS.row()
def functionalized(side: Side) -> Any:
    module = side.make(**({"num_layers": 2, "bidirectional": True} if side.is_layer else {}))

    def loss(x: Tensor) -> Tensor:
        return loss_of(module(x))

    return (
        flatten(torch.func.functionalize(module)(side.x())),
        torch.func.functionalize(torch.func.grad(loss))(side.x()),
        torch.func.grad(torch.func.functionalize(loss))(side.x()),
    )


@ROWS.row()
def jacobians(side: Side) -> Any:
    module = side.make()
    x, v = side.x(1, I) if not side.is_layer else side.x(2, 1, I), side.x()

    def call(given: Tensor) -> Tensor:
        return first(module(given))

    functional = torch.autograd.functional
    return (
        functional.jacobian(call, x),
        functional.vjp(call, x, torch.ones_like(call(x)))[1],
        functional.hvp(lambda given: call(given).sum(), x, torch.ones_like(x))[1],
        functional.hessian(lambda given: call(given).square().sum(), x),
        v,
    )


@ROWS.row()
def gradcheck(side: Side) -> Any:
    module = side.make().double()
    x = side.x(dtype=torch.float64).requires_grad_()
    return torch.autograd.gradcheck(lambda given: first(module(given)), x)


@ROWS.row()
def second_derivatives(side: Side) -> Any:
    module = side.make()
    x = side.x().requires_grad_()
    (slope,) = torch.autograd.grad(loss_of(module(x)), x, create_graph=True)
    return slope, gradients(module, {"slope": slope})


@ROWS.row()
def checkpointed(side: Side) -> Any:
    from torch.utils.checkpoint import checkpoint, checkpoint_sequential

    module, x = side.make(), side.x().requires_grad_()
    seen = []
    for reentrant in (True, False):
        outputs = checkpoint(module, x, use_reentrant=reentrant)
        seen.append(gradients(module, flatten(outputs)))
    parts = nn.Sequential(nn.Linear(I, I), side.make())
    return seen, checkpoint_sequential(parts, 2, x, use_reentrant=False)


@ROWS.row()
def checkpointed_selectively(side: Side) -> Any:
    from torch.utils.checkpoint import (
        CheckpointPolicy,
        checkpoint,
        create_selective_checkpoint_contexts,
    )

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.PREFER_RECOMPUTE

    module = side.make()
    outputs = checkpoint(
        module,
        side.x().requires_grad_(),
        use_reentrant=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, policy),
    )
    return gradients(module, flatten(outputs))
