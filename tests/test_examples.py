"""Every example runs, asserts its own result, and says what is wrong with what it is given."""

from __future__ import annotations

import gzip
import re
import runpy
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import subprocesses
from support import importable, in_a_process, in_two_processes

pytestmark = pytest.mark.cpu_only
EXAMPLES = Path(__file__).parent.parent / "examples"
# Each with the pictures that it draws.
SCRIPTS: dict[str, Sequence[str]] = {
    "compare_notebook": (),
    "digits_rows": ("digits_rows.png",),
    "gradient_flow": ("gradient_flow.png", "gradient_flow_40.png"),
    "own_cell": ("own_cell.png",),
    "sine": ("sine.png",),
    "sentiment": (),
    "char_lm": tuple(f"char_lm_{part}.png" for part in ("neurons", "unit", "gates", "states")),
}


@pytest.fixture(autouse=True)
def needs_the_group() -> None:
    for module in ("matplotlib", "tqdm", "sklearn"):
        pytest.importorskip(module, reason="pip install --group examples")


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., str]]:
    """Runs a script in this process, in a folder of its own; gives what it has printed."""
    monkeypatch.chdir(tmp_path)
    with importable(EXAMPLES):

        def run_script(name: str, *arguments: str) -> str:
            script = str(EXAMPLES / f"{name}.py")
            monkeypatch.setattr(sys, "argv", [script, *arguments])
            runpy.run_path(script, run_name="__main__")
            return capsys.readouterr().out

        yield run_script


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_fast_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process that has imported nothing but torch before."""
    monkeypatch.chdir(tmp_path)
    both = [] if name == "compare_notebook" else ["--torch"]  # it always runs both
    said = in_a_process(subprocesses.script, str(EXAMPLES / f"{name}.py"), "--fast", *both)
    assert "torch.nn" in said  # both times
    assert "not judged" not in said
    for picture in SCRIPTS[name]:
        content = (tmp_path / picture).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000
    assert {path.name for path in tmp_path.iterdir()} == set(SCRIPTS[name])


def test_every_script_is_tested() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts - {"common", "idx", "features", "distributed"} == set(SCRIPTS)


def idx(place: Path, part: str, count: int, size: int = 8, lacking: int = 0) -> None:
    """Files as those of MNIST: an image has as many bright rows as its digit says."""
    digits = np.arange(count) % 4
    rows = np.arange(size) < 2 * digits[:, None]
    images = np.where(rows[:, :, None], 200, 0).repeat(size, 2).astype(np.uint8)
    header = struct.pack(">4B3I", 0, 0, 8, 3, *images.shape)
    content = (header + images.tobytes())[: -lacking or None]
    (place / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
    labels = struct.pack(">4BI", 0, 0, 8, 1, count) + digits.astype(np.uint8).tobytes()
    (place / f"{part}-labels-idx1-ubyte").write_bytes(labels)


def test_digits_of_ones_own(run: Callable[..., str], tmp_path: Path) -> None:
    """Reported, and judged by no limit that is meant for others."""
    idx(tmp_path, "train", 120)
    idx(tmp_path, "t10k", 40)
    line = ["--data", ".", "--fast", "--recipes", "lstm64", "--model", "best.pt"]
    said = run("digits_rows", *line)
    assert re.search(r"lstm64: \d+\.\d+% of 40 test digits right", said)
    assert "not judged" in said
    assert (tmp_path / "best_lstm64.pt").exists()


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("sine", ["--own-samples", "--cell", "GRU", "--epochs", "2"]),
        ("sentiment", ["--phi-y", "tanh", "--phi-h", "relu", "--epochs", "2"]),
    ],
)
def test_other_hyperparameters(name: str, line: list[str], run: Callable[..., str]) -> None:
    assert "not judged" in run(name, "--fast", *line)


@pytest.mark.parametrize("name", ["sine", "sentiment"])
def test_two_processes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They train one model, and one of them speaks. test_distributed.py has torchrun itself."""
    monkeypatch.chdir(tmp_path)
    line = ["--fast", "--repeats", "2", "--model", "best.pt"]
    said = in_two_processes(subprocesses.script, str(EXAMPLES / f"{name}.py"), *line)
    assert said[1] == ""
    assert said[0].count("time: rnnkern") == 1
    assert said[0].count("epoch 2 ") == 1
    assert "medians of 2 runs" in said[0]
    assert (tmp_path / "best.pt").exists()


def text(content: str) -> Callable[[Path], object]:
    return lambda place: (place / "text").write_text(content, encoding="utf-8")


def cut_header(place: Path) -> None:
    (place / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\x00\x00\x08\x03\x00"))


def cut_pixels(place: Path) -> None:
    idx(place, "train", 120, lacking=1)


def without_pixels(place: Path) -> None:
    idx(place, "train", 120, size=0)


def folder(name: str) -> Callable[[Path], None]:
    return lambda place: (place / name).mkdir()


NOTHING = lambda place: None  # noqa: E731
DATA = ["--data", "."]
ROWS = "negative\tbad\n" * 10
WRONG = {
    "unknown cell": ("compare_notebook", ["--cells", "XX"], NOTHING, "XX"),
    "no such folder": ("digits_rows", ["--data", "nowhere"], NOTHING, "nowhere"),
    "IDX cut in its header": ("digits_rows", DATA, cut_header, "the header alone has 16"),
    "IDX cut in its data": ("digits_rows", DATA, cut_pixels, "truncated: 7695 bytes, 7696"),
    "IDX without pixels": ("digits_rows", DATA, without_pixels, "train have 0 x 0 pixels"),
    "too few steps": ("gradient_flow", ["--steps", "1"], NOTHING, "steps"),
    "a later picture": (
        "gradient_flow",
        ["--steps", "3", "4"],
        folder("gradient_flow_4.png"),
        "gradient_flow_4.png is a directory",
    ),
    "unknown cell of sine": ("sine", ["--cell", "XX"], NOTHING, "XX"),
    "a rate that is no number": ("sine", ["--rate", "nan"], NOTHING, "--rate must be above 0"),
    "no threads": ("sine", ["--threads", "0"], NOTHING, "--threads must be from 1"),
    "less than no threads": ("compare_notebook", ["--threads", "-1"], NOTHING, "got -1"),
    "a large seed": ("sine", ["--seed", str(2**64)], NOTHING, "--seed must be from 0"),
    "no repeats": ("sine", ["--repeats", "0"], NOTHING, "--repeats must be above 0"),
    "a directory as picture": ("sine", ["--out", "d.png"], folder("d.png"), "d.png is a directory"),
    "a picture nowhere": ("sine", ["--out", "nowhere/x.png"], NOTHING, "nowhere is no directory"),
    "no picture": ("sine", ["--out", "sine.xyz"], NOTHING, "sine.xyz"),
    "a directory as model": ("sine", ["--model", "d"], folder("d"), "d is a directory"),
    "a directory as one of several models": (
        "digits_rows",
        ["--model", "x.pt"],
        folder("x_relu100.pt"),
        "x_relu100.pt is a directory",
    ),
    "unknown cell of sentiment": ("sentiment", ["--cell", "XX"], NOTHING, "XX"),
    "no rate": ("sentiment", ["--rate", "nan"], NOTHING, "--rate must be above 0"),
    "no such sentences": ("sentiment", ["--data", "nowhere"], NOTHING, "nowhere"),
    "few sentences": ("sentiment", ["--data", "text"], text(ROWS[:13]), "1 sentences"),
    "damaged sentences": ("sentiment", ["--data", "text"], text(ROWS + "no label"), "line 11"),
    "three columns": ("sentiment", ["--data", "text"], text(ROWS + "negative\ta\tb"), "3 columns"),
    "no such text": ("char_lm", ["--text", "nowhere"], NOTHING, "nowhere"),
    "empty text": ("char_lm", ["--text", "text"], text(""), "text is too short"),
    "text of one letter": ("char_lm", ["--text", "text"], text("a" * 20_000), "one character only"),
    "unknown cell of char_lm": ("char_lm", ["--cell", "XX"], NOTHING, "XX"),
    "a directory as one of several pictures": (
        "char_lm",
        ["--out", "x.png"],
        folder("x_states.png"),
        "x_states.png is a directory",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_clear_message(
    fault: str, run: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the end of the script, and no picture."""
    name, arguments, prepare, named = WRONG[fault]
    prepare(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run(name, *arguments)
    # Python prints a text that a script ends with, and argparse its own: no traceback with either.
    message = ended.value.code
    if not isinstance(message, str):
        assert message == 2
        message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"{name}.py: error: ")
    assert named in message
    assert not [path for path in tmp_path.glob("*.png") if path.is_file()]


def test_a_wrong_result_is_seen_without_assertions(tmp_path: Path) -> None:
    """python -O leaves no assert: what an example expects is none."""
    code = "import common; common.expect(False, 'wrong')"
    done = subprocess.run(
        [sys.executable, "-O", "-c", code],
        capture_output=True,
        text=True,
        cwd=EXAMPLES,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith("error: wrong")
    for path in EXAMPLES.glob("*.py"):
        assert not re.search(r"^\s*assert ", path.read_text(encoding="utf-8"), re.MULTILINE)
