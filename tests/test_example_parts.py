"""The parts that the examples are made of: training, features of text, readers, sampling."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import importable
from torch import Tensor, nn

import rnnkern

for needed in ("matplotlib", "tqdm"):
    pytest.importorskip(needed, reason="pip install --group examples")

pytestmark = pytest.mark.cpu_only
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def load() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script."""
    with importable(EXAMPLES):
        yield importlib.import_module


@pytest.fixture
def common(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("common")


@pytest.fixture
def char_lm(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("char_lm")


@pytest.fixture
def features(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("features")


@pytest.fixture
def sentiment(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("sentiment")


def alone(common: ModuleType) -> Any:
    return common.Workers(0, 1, torch.device("cpu"), silent=True)


# Training


def fit(common: ModuleType, path: Path, scores: list[float]) -> tuple[nn.Module, Any]:
    """A weight that each epoch makes larger by 1, from 0 on."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    left = iter(scores)
    trainer = common.Trainer(
        alone(common),
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        lambda model, batch: -model.weight.sum() * batch,
        lambda model: (next(left), "as given"),
        path,
    )
    return model, trainer.fit(len(scores), lambda epoch: [1.0])


@pytest.mark.parametrize(
    ("scores", "best"), [([0.1, 0.9, 0.3], 2), ([0.5, 0.5, 0.1], 2), ([0.1, 0.2, 0.3], 3)]
)
def test_training_ends_with_the_best_model(
    common: ModuleType, tmp_path: Path, scores: list[float], best: int
) -> None:
    model, history = fit(common, tmp_path / "best.pt", scores)
    assert model.weight.item() == best
    assert history.best == best
    assert [score for _, score in history.scores] == scores
    assert torch.load(tmp_path / "best.pt")["weight"].item() == best
    assert not model.training


@pytest.mark.parametrize("score", [math.nan, -math.inf])
def test_training_that_diverges(common: ModuleType, tmp_path: Path, score: float) -> None:
    with pytest.raises(SystemExit, match=r"epoch 2 is .* diverged"):
        fit(common, tmp_path / "best.pt", [0.1, score])


def options(**others: Any) -> argparse.Namespace:
    known = {"torch": True, "seed": 0, "repeats": 1, "judged": True, "model": None}
    return argparse.Namespace(**known | others)


def test_repeats_take_turns_and_the_first_alone_is_told(common: ModuleType) -> None:
    calls: list[tuple[str, bool, Any]] = []

    def experiment(library: ModuleType, options: Any, crew: Any) -> float:
        calls.append((library.__name__, crew.speaks, options.model))
        return torch.rand(()).item()

    measured: list[float] = []
    crew = common.Workers(0, 1, torch.device("cpu"))
    given = options(repeats=2, model=Path("x.pt"))
    runs = common.run_in_turn(experiment, given, crew, measured.append)
    first, second = ("rnnkern", "torch.nn")
    assert [run.library for run in runs] == [first, second]
    assert calls == [
        ("rnnkern", True, Path("x.pt")),
        ("torch.nn", True, Path("x.pt")),
        ("rnnkern", False, None),
        ("torch.nn", False, None),
    ]
    assert measured == [run.result for run in runs]
    assert runs[0].result == runs[1].result  # from the same seed


def test_measuring_is_not_timed(common: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def passes(seconds: float) -> Callable[..., None]:
        return lambda *_: now.__setitem__(0, now[0] + seconds)

    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])
    runs = common.run_in_turn(passes(2), options(), alone(common), passes(100))
    assert [run.seconds for run in runs] == [2, 2]


def test_the_model_of_torch_does_not_replace_that_of_rnnkern(
    common: ModuleType, tmp_path: Path
) -> None:
    crew, given = alone(common), options(model=tmp_path / "x.pt")
    for library, part, wanted in (
        (rnnkern, "", tmp_path / "x.pt"),
        (rnnkern, "small", tmp_path / "x_small.pt"),
    ):
        with crew.best_file(library, given, part) as path:
            assert path == wanted
    for library, some in ((nn, given), (rnnkern, options())):
        with crew.best_file(library, some) as path:
            assert tmp_path not in path.parents
            assert path.parent.is_dir()
        assert not path.parent.exists()


@pytest.mark.parametrize(
    ("line", "judged"),
    [
        ([], True),
        (["--fast"], True),
        (["--fast", "--size", "3"], True),
        (["--fast", "--size", "8"], False),
        (["--size", "3"], False),
        (["--free", "1", "--seed", "7", "--torch"], True),
    ],
)
def test_the_users_own_are_not_judged(
    common: ModuleType, monkeypatch: pytest.MonkeyPatch, line: list[str], judged: bool
) -> None:
    made = common.parser("A test.")
    made.add_argument("--size", type=int, default=8)
    made.add_argument("--free", type=int)
    monkeypatch.setattr(sys, "argv", ["test.py", *line])
    assert common.arguments(made, {"size": 3}, judged_with=("free",)).judged is judged


# Text


LINE = "  f('a [b]') don't\n\nEnd"


def test_the_column_of_each_character(features: ModuleType) -> None:
    assert features.column("ab\nc\n\nd") == [1, 2, 0, 1, 0, 0, 1]


def test_indentation(features: ModuleType) -> None:
    assert features.indentation("a b\n  c d\n e") == [0, 0, 0, 0, 1, 2, 2, 2, 2, 0, 1, 1]


def test_what_is_inside_quotes_and_brackets(features: ModuleType) -> None:
    """An apostrophe opens nothing, and an empty line closes all."""
    marks = {"quotes": {"'": "'"}, "brackets": {"(": ")", "[": "]"}}
    found = {name: features.inside(LINE, pairs) for name, pairs in marks.items()}
    text = LINE.replace("\n", "$")
    shown = {name: "".join(map(str, depths)) for name, depths in found.items()}
    assert text == "  f('a [b]') don't$$End"
    assert shown["quotes"] == "00001111110000000000000"
    assert shown["brackets"] == "00011112211000000000000"
    assert features.inside("'a\n\nb", {"'": "'"}) == [1, 1, 1, 0, 0]


def test_correlations(char_lm: ModuleType) -> None:
    x = torch.tensor([0.0, 1.0, 2.0, 3.0])
    values = torch.stack((x, -2 * x + 5, torch.ones(4)), 1)
    features = torch.stack((x, torch.tensor([1.0, -1.0, -1.0, 1.0])), 1)
    wanted = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(char_lm.correlations(values, features), wanted)


def small_model(char_lm: ModuleType, cell: str = "LSTM") -> nn.Module:
    torch.manual_seed(0)
    sizes = argparse.Namespace(cell=cell, hidden=8, layers=1, dropout=0.0)
    return char_lm.CharModel(rnnkern, sizes, 5).eval()


@pytest.mark.parametrize("temperature", [1e-6, 1e-44])
def test_a_sample_at_a_tiny_temperature_is_the_likeliest(
    char_lm: ModuleType, temperature: float
) -> None:
    model = small_model(char_lm)
    given = torch.tensor([0, 3, 1])
    drawn = char_lm.sample(model, given, 6, temperature)
    text = given
    for _ in range(6):
        logits, _ = model(text.unsqueeze(1))
        text = torch.cat((text, logits[-1].argmax(-1)))
    assert drawn.tolist() == text[3:].tolist()


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_blocks_carry_the_state_and_not_its_gradient(char_lm: ModuleType, cell: str) -> None:
    """Losses are those of the whole text at once; the second block's gradient is its own."""
    model = small_model(char_lm, cell)
    text = torch.randint(5, (2, 9), generator=torch.Generator().manual_seed(1))
    first, second = char_lm.blocks(text, 4)
    training = char_lm.Truncated((first, second))
    training.epoch()
    losses = [training.loss(model, block) for block in (first, second)]
    logits, _ = model(text[:, :-1].t())
    for i, loss in enumerate(losses):
        part = slice(4 * i, 4 * i + 4)
        wanted = nn.functional.cross_entropy(
            logits[part].flatten(0, 1), text[:, 1:].t()[part].flatten()
        )
        torch.testing.assert_close(loss, wanted)

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, model.rnn.weight_hh_l0)[0]

    with torch.no_grad():
        _, state = model(first[:-1])
    alone, _ = model(second[:-1], state)
    wanted = nn.functional.cross_entropy(alone.flatten(0, 1), second[1:].flatten())
    torch.testing.assert_close(gradient(losses[1]), gradient(wanted))
    training.epoch()
    torch.testing.assert_close(training.loss(model, first), losses[0])  # from zeros again


# Sentences


def test_a_tree(sentiment: ModuleType) -> None:
    line = "(4 (2 It) (3 (2 really) (3 (4 Works) (2 .))))"
    assert sentiment.read_tree(line, "here") == (2, ["it", "really", "works", "."])


@pytest.mark.parametrize("line", ["(4 (2 It)", "(5 It)", "(2)", "(2 (2 a) b)", "2 a"])
def test_no_tree(sentiment: ModuleType, line: str) -> None:
    with pytest.raises(SystemExit, match="here: no tree"):
        sentiment.read_tree(line, "here")


def test_a_row(sentiment: ModuleType) -> None:
    row = sentiment.read_row("positive\tIt's well-made, and WORKS!", "here")
    assert row == (2, ["it's", "well-made", ",", "and", "works", "!"])


def test_parts_do_not_overlap(sentiment: ModuleType) -> None:
    sentences = [sentiment.Sentence(i % 3, [str(i), "word"]) for i in range(50)]
    data = sentiment.split(sentences)
    parts = (data.train, data.validation, data.held_out)
    assert [len(part) for part in parts] == [32, 8, 10]
    assert sorted(s.words[0] for part in parts for s in part) == sorted(map(str, range(50)))
    assert data.number == {"word": 1}


def test_naive_bayes(sentiment: ModuleType) -> None:
    rows = [("bad", 0), ("dull", 1), ("good", 2)]
    train = [sentiment.Sentence(label, [word, "it"]) for word, label in rows] * 2
    held_out = [sentiment.Sentence(label, ["it", word, "new"]) for word, label in rows]
    assert sentiment.naive_bayes(sentiment.Data(train, train[:3], held_out, {})) == [0, 1, 2]


# Notebooks


@pytest.mark.parametrize(
    "name",
    sorted(
        path.stem
        for path in EXAMPLES.glob("*.py")
        if path.stem not in ("common", "idx", "features")
    ),
)
def test_cells_run_where_there_is_no_file(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    load("common")
    notebook = ModuleType("notebook")
    monkeypatch.setitem(sys.modules, "notebook", notebook)
    code = compile((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"), "a cell", "exec")
    exec(code, notebook.__dict__)
    assert callable(notebook.__dict__["main"])
