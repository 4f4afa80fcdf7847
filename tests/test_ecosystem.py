"""Code of other packages, with rnnkern's modules in place of torch.nn's.

What is marked `ecosystem` needs the group of that name; what is not installed is skipped.
"""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path

import pytest
import torch
from support import assert_agree, flatten
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_map_only

import rnnkern
from rnnkern import tolerance

pytestmark = pytest.mark.cpu_only

NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
ECOSYSTEM_GROUP = "pip install --group ecosystem"
TEST_GROUP = "pip install --group test"
# Not in the group: its wheel brings a package `benchmarks`, which hides this project's.
OPACUS = "pip install opacus==1.6.0, into an environment of its own"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_inputs_of_torch_testing(
    name: str, dtype: torch.dtype, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch tests its own modules with: outputs, and gradients of all inputs and weights."""
    pytest.importorskip("expecttest", reason=TEST_GROUP)
    # Its import forbids to set any flag of torch.backends from then on.
    monkeypatch.setattr(torch.backends, "disable_global_flags", lambda: None)
    from torch.testing._internal.common_modules import module_db

    info = next(info for info in module_db if info.module_cls is getattr(nn, name))
    inputs = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=training
    )
    assert inputs
    for each in inputs:
        args, kwargs = each.constructor_input.args, each.constructor_input.kwargs
        theirs = info.module_cls(*args, **kwargs).to(dtype).train(training)
        ours = getattr(rnnkern, name)(*args, **kwargs).to(dtype).train(training)
        ours.load_state_dict(theirs.state_dict())
        given = (each.forward_input.args, each.forward_input.kwargs)
        results = []
        for model, own_dtype in (
            (ours, dtype),
            (theirs, tolerance.yardstick_dtype(dtype)),
            (theirs, torch.float64),
        ):
            module = copy.deepcopy(model).to(own_dtype)
            own = tree_map_only(Tensor, functools.partial(_leaf, own_dtype), given)
            outputs = flatten(module(*own[0], **own[1]))
            sources = dict(module.named_parameters()) | flatten(own[0], "input")
            loss = sum(output.square().sum() for output in outputs.values())
            gradients = torch.autograd.grad(loss, list(sources.values()))
            values = outputs | dict(zip(sources, gradients, strict=True))
            results.append({key: value.detach() for key, value in values.items()})
        assert_agree(*results)


def _leaf(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)


@pytest.mark.ecosystem
def test_recurrent_ppo() -> None:
    """stable-baselines3's recurrent PPO on CartPole: the same run as with torch.nn."""
    sb3 = pytest.importorskip("sb3_contrib", reason=ECOSYSTEM_GROUP)
    runs = []
    for change in (rnnkern.convert, lambda model: model):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="stable_baselines3")
            model = sb3.RecurrentPPO(
                "MlpLstmPolicy", "CartPole-v1", n_steps=32, batch_size=16, n_epochs=2, seed=0,
                policy_kwargs={"lstm_hidden_size": 16, "net_arch": [16]}, device="cpu",
            )  # fmt: skip
        change(model.policy)
        first = next(m for m in model.policy.modules() if isinstance(m, nn.LSTM))
        assert isinstance(first, rnnkern.LSTM) == (change is rnnkern.convert)
        model.learn(total_timesteps=96)
        runs.append(
            ([int(a) for a in model.rollout_buffer.actions.flatten()], model.policy.state_dict())
        )
    (actions, ours), (their_actions, theirs) = runs
    assert actions == their_actions
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.ecosystem
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_forecasts_of_darts(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """darts' RNNModel takes its network from torch.nn by name: the same forecast from rnnkern's."""
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        darts = pytest.importorskip("darts", reason=ECOSYSTEM_GROUP)
        models = pytest.importorskip("darts.models", reason=ECOSYSTEM_GROUP)
        pytest.importorskip("pytorch_lightning", reason=ECOSYSTEM_GROUP)
        series = darts.TimeSeries.from_values(torch.linspace(0, 30, 100).sin().numpy())
        forecasts = []
        for layer in (getattr(rnnkern, kind), getattr(nn, kind)):
            monkeypatch.setattr(nn, kind, layer)
            model = models.RNNModel(
                input_chunk_length=12, training_length=16, model=kind, hidden_dim=8, n_epochs=2,
                random_state=0, work_dir=str(tmp_path),
                pl_trainer_kwargs={
                    "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
                    "enable_model_summary": False,
                },
            )  # fmt: skip
            model.fit(series)
            network = next(m for m in model.model.modules() if isinstance(m, nn.RNNBase))
            assert type(network) is layer
            forecasts.append(torch.from_numpy(model.predict(5).values()))
    torch.testing.assert_close(*forecasts, rtol=1e-4, atol=1e-5)


@pytest.mark.ecosystem
def test_per_sample_gradients_as_opacus_has_them() -> None:
    """Opacus rewrites the LSTM as layers whose hooks collect them, step by step."""
    layers = pytest.importorskip("opacus.layers", reason=OPACUS)
    sampled = pytest.importorskip("opacus.grad_sample", reason=OPACUS).GradSampleModule
    ours = rnnkern.LSTM(4, 6, batch_first=True)
    theirs = layers.DPLSTM(4, 6, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 7, 4)
    module = sampled(theirs, batch_first=True, loss_reduction="sum")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        module(x)[0].square().sum().backward()
    expected = {name: p.grad_sample for name, p in theirs.named_parameters()}

    def loss(weights: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(ours, weights, (sample[None],))[0].square().sum()

    weights = {name: p.detach() for name, p in ours.named_parameters()}
    torch.testing.assert_close(vmap(grad(loss), (None, 0))(weights, x), expected)
