"""Every example runs, asserts its own result, and says what is wrong with what it is given."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu_only
EXAMPLES = Path(__file__).parent.parent / "examples"
# Each with the pictures that it draws.
SCRIPTS: dict[str, Sequence[str]] = {
    "compare_notebook": (),
    "digits_rows": ("digits_rows.png",),
    "gradient_flow": ("gradient_flow.png", "gradient_flow_40.png"),
    "sine": ("sine.png",),
    "sentiment": (),
    "char_lm": tuple(f"char_lm_{part}.png" for part in ("neurons", "unit", "gates", "states")),
}


def run_example(name: str, *arguments: str, place: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    return subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        cwd=place,
        check=False,
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_fast_run(name: str, tmp_path: Path) -> None:
    for module in ("matplotlib", "tqdm", "sklearn"):
        pytest.importorskip(module, reason="pip install 'rnnkern[examples]'")
    done = run_example(name, "--fast", "--torch", place=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch.nn" in done.stdout  # both times
    for picture in SCRIPTS[name]:
        content = (tmp_path / picture).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000


def test_every_script_is_tested() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts - {"common", "idx", "distributed"} == set(SCRIPTS)


def truncated(place: Path) -> None:
    (place / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\x00\x00\x08\x03\x00"))


def empty(place: Path) -> None:
    (place / "text").write_text("")


def damaged(place: Path) -> None:
    (place / "text").write_text("negative\tgood line\nno label here\n")


NOTHING = lambda place: None  # noqa: E731
WRONG = {
    "unknown cell": ("compare_notebook", ["--cells", "XX"], NOTHING, "XX"),
    "no such folder": ("digits_rows", ["--data", "nowhere"], NOTHING, "nowhere"),
    "truncated IDX": ("digits_rows", ["--data", "."], truncated, "train-images-idx3-ubyte"),
    "too few steps": ("gradient_flow", ["--steps", "1"], NOTHING, "steps"),
    "unknown cell of sine": ("sine", ["--cell", "XX"], NOTHING, "XX"),
    "no such sentences": ("sentiment", ["--data", "nowhere"], NOTHING, "nowhere"),
    "damaged sentences": ("sentiment", ["--data", "text"], damaged, "text"),
    "no such text": ("char_lm", ["--text", "nowhere"], NOTHING, "nowhere"),
    "empty text": ("char_lm", ["--text", "text"], empty, "text"),
    "unknown cell of char_lm": ("char_lm", ["--cell", "XX"], NOTHING, "XX"),
    "no picture": ("sine", ["--out", "sine.xyz"], NOTHING, "sine.xyz"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_clear_message(fault: str, tmp_path: Path) -> None:
    """And no traceback, no picture."""
    name, arguments, prepare, named = WRONG[fault]
    prepare(tmp_path)
    done = run_example(name, *arguments, place=tmp_path)
    assert done.returncode != 0
    assert named in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*.png"))
