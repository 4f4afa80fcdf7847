"""The commands ``rnnkern compare`` and ``rnnkern info``, and the timing behind them."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rnnkern
from rnnkern import kernels
from rnnkern.bench import cli, compare, timing
from rnnkern.bench.printer import Printer, duration
from rnnkern.bench.report import Report, Row
from rnnkern.bench.workloads import (
    FORWARD,
    FORWARD_BACKWARD,
    PASSES,
    PRECISIONS,
    Workload,
    load_step_workloads,
    load_workloads,
)

pytestmark = pytest.mark.cpu_only

TINY = ["compare", "--quick", "--cell", "LSTM", "--workload", "gradient_flow"]
NOTEBOOK = ["compare", "--quick", "--cell", "LSTM", "--workload", "notebook", "--pass", "forward"]

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is optional"
)


@pytest.fixture(autouse=True)
def few_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare.Options, "notebook_runs", 10)


class WrongLSTM(rnnkern.LSTM):
    """Right but for the last digits that a check has to see."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output, state = super().forward(*args, **kwargs)
        return output + 1e-4, state


class FrozenLSTM(rnnkern.LSTM):
    """Right but for gradients of the parameters, which are missing."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.requires_grad_(False)
        return super().forward(*args, **kwargs)


class FallenBackLSTM(rnnkern.LSTM):
    """What torch.nn computes, and says so."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        warnings.warn("no kernel covers this call", rnnkern.FallbackWarning, stacklevel=1)
        return super().forward(*args, **kwargs)


def usage_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is printed for arguments that must be refused before any work."""
    with pytest.raises(SystemExit) as raised:
        cli.main(["compare", *arguments])
    captured = capsys.readouterr()
    assert raised.value.code == 2
    assert captured.out == ""
    return captured.err


def test_a_quick_run_passes_and_reads_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", "--quick", "--workload", "notebook,stream_step"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert max(map(len, lines)) <= 100
    assert captured.out.isascii()
    assert "\x1b" not in captured.out
    assert captured.err == ""  # no progress bar without a terminal
    assert lines[-1] == "All checks passed."
    for cell in ("RNN", "LSTM", "GRU"):
        # the notebook's comparison, two workloads
        assert sum(line.startswith(f"{cell} ") for line in lines) == 3
    for pass_name in PASSES:
        # a row for each cell and workload, and the mean
        assert sum(line.split("  ")[0] == pass_name for line in lines) == 1
        assert sum(bool(re.search(rf" {re.escape(pass_name)} +\d", line)) for line in lines) == 6


def test_steps_of_cells_have_a_table_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--cell", "LSTM,LSTMCell,GRUCell", "--workload", "sine,step_h20,step_h129"]
    assert cli.main(["compare", "--quick", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[-1] == "All checks passed."
    begins = [line.split()[:3] for line in lines if line.startswith(("LSTM", "GRU"))]
    assert begins == [
        ["LSTM", "sine", "29"],
        ["LSTMCell", "step_h20", "1"],
        ["LSTMCell", "step_h129", "64"],
        ["GRUCell", "step_h20", "1"],
        ["GRUCell", "step_h129", "64"],
    ]
    means = [line.split()[5:] for line in lines if line.startswith("geometric mean")]
    assert means == [
        ["LSTM", "all", "the", "least"],
        ["LSTMCell", "GRUCell", "all", "the", "least"],
    ]


@pytest.mark.usefixtures("no_clock")
def test_the_json_file_has_every_result(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    assert (
        cli.main([*TINY, "--workload", "notebook", "--dtype", "float64", "--json", str(path)]) == 0
    )
    found = json.loads(path.read_text())
    header = found["header"]
    assert header["torch"] == torch.__version__
    assert header["rnnkern"] == rnnkern.__version__
    assert header["isa"] == rnnkern.build_info()["isa"]
    assert header["cpu"]
    assert header["date"].endswith("+00:00")
    assert {"commit", "quick", "dtype", "threads", "load_average"} <= header.keys()
    assert {header[name] for name in ("gpu", "driver", "cuda", "cudnn")} == {None}
    assert found["finished"]
    (notebook,) = found["notebook"]
    assert notebook["cell"] == "LSTM"
    assert notebook["ok"]
    assert notebook["output_difference"] < 1e-10
    assert notebook["gradient_difference"] < 1e-10
    assert notebook["speedup"] == notebook["torch_seconds"] / notebook["seconds"]
    for beside in (notebook["without_grad"], notebook["with_grad"]):
        assert beside["ratio"] == pytest.approx(beside["us"] / beside["linear_us"])
    assert [(row["workload"], row["pass"]) for row in found["rows"]] == [
        (workload, pass_name) for workload in ("notebook", "gradient_flow") for pass_name in PASSES
    ]
    for row in found["rows"]:
        assert (row["device"], row["cell"], row["dtype"]) == ("cpu", "LSTM", "float64")
        assert row["threads"] == torch.get_num_threads()
        assert min(row["us"], row["torch_us"], row["speedup"], row["gflops"], row["pairs"]) > 0
        mean = found["geometric_mean"][row["pass"]]
        both = [r["speedup"] for r in found["rows"] if r["pass"] == row["pass"]]
        assert mean == pytest.approx(math.sqrt(math.prod(both)))
    assert found["ok"]
    assert found["failures"] == []


@pytest.mark.parametrize("wrong", [WrongLSTM, FrozenLSTM])
def test_a_failed_check_is_exit_status_1_and_is_not_timed(
    wrong: type[nn.LSTM],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(rnnkern, "LSTM", wrong)
    path = tmp_path / "results.json"
    arguments = [*TINY, "--cell", "RNN", "--workload", "notebook", "--json", str(path)]
    assert cli.main(arguments) == 1
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert "LSTM  gradient_flow FAILED" in out
    last = out.splitlines()[-1]
    assert last == "FAILED: LSTM gradient_flow, LSTM notebook, LSTM notebook's comparison"
    found = json.loads(path.read_text())
    assert not found["ok"]
    assert {row["cell"] for row in found["rows"]} == {"RNN"}
    assert {failure["cell"] for failure in found["failures"]} == {"LSTM"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "nonsense"], "known are: notebook, gradient_flow, sine"),
        (["--cell", "LSTM,Transformer"], "known are: RNN, LSTM, GRU"),
        (["--pass", "backward"], "known are: forward, forward-grad, forward-backward"),
        (["--threads", "0"], "at least 1"),
        (["--threads", "two"], "at least 1"),
        (["--device", "tpu"], "expected cpu, cuda"),
        (["--device", "meta"], "expected cpu, cuda"),
        (["--dtype", "float128"], "known are: float32, bfloat16, float16, float64"),
        (["--dtype", "float32,tf32"], "known are: float32, bfloat16, float16, float64"),
        (["--json", "no/such/directory/x.json"], "no such directory"),
        (["--plot", "no/such/directory/x.png"], "no such directory"),
    ],
)
def test_bad_usage_is_exit_status_2_and_says_what_is_known(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in usage_error(capsys, *arguments)


def test_cuda_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    message = usage_error(capsys, "--device", "cuda")
    assert "torch sees no CUDA device(s), so no 'cuda'" in message
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in usage_error(capsys, "--device", "cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "torch sees 2 CUDA device" in usage_error(capsys, "--device", "cuda:2")


def test_a_plot_without_matplotlib_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert 'pip install "rnnkern[plot]"' in usage_error(capsys, "--plot", "speedup.png")


@needs_matplotlib
def test_a_plot_of_unknown_kind_is_refused_before_any_work(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "must end in one of" in usage_error(capsys, "--plot", "speedup.xyz")


@needs_matplotlib
@pytest.mark.parametrize("dtypes", ["float32", "float32,float64"])
def test_the_picture_is_written(tmp_path: Path, dtypes: str) -> None:
    path = tmp_path / "speedup.png"
    assert cli.main([*TINY, "--dtype", dtypes, "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def options(*arguments: str) -> compare.Options:
    return cli._options(cli._parser().parse_args(["compare", *arguments]))


def test_selections_repeat_or_take_commas_in_any_case_and_keep_the_known_order() -> None:
    assert options().cells == ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
    assert options("--cell", "lstmcell,RNN").cells == ("RNN", "LSTMCell")
    assert options("--cell", "gru,LSTM").cells == ("LSTM", "GRU")
    assert options("--cell", "GRU", "--cell", "rnn").cells == ("RNN", "GRU")
    assert options("--pass", "forward+backward,forward").passes == (FORWARD, FORWARD_BACKWARD)
    assert options("--pass", "forward-grad").passes == ("forward (grad)",)
    assert [w.name for w in options("--workload", "sine,notebook").workloads] == [
        "notebook",
        "sine",
    ]


def names(precisions: tuple[Any, ...]) -> list[str]:
    return [precision.name for precision in precisions]


def known_workloads(device_type: str) -> set[str]:
    return {*load_workloads(device_type), *load_step_workloads()}


def test_what_is_compared_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workloads and dtypes of its own, in minutes."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    whole, quick = options("--device", "cuda"), options("--device", "cuda:1", "--quick")
    assert whole.device == torch.device("cuda")
    assert quick.device == torch.device("cuda:1")
    assert {w.name for w in whole.workloads} == known_workloads("cuda")
    assert "h2048" in quick.left_out
    assert names(whole.precisions) == ["float32", "tf32", "bfloat16", "float16"]
    chosen = options("--device", "cuda", "--dtype", "float64,TF32", "--dtype", "float16")
    assert names(chosen.precisions) == ["tf32", "float16", "float64"]
    rows = 3 * len(whole.workloads) * len(whole.precisions) * len(PASSES)
    assert rows * whole.row_budget_s < 60
    assert quick.time_limit_s < whole.time_limit_s <= 240


def test_dtypes_of_the_cpu() -> None:
    assert names(options().precisions) == ["float32"]
    assert names(options("--dtype", "float64,float32").precisions) == ["float32", "float64"]
    assert names(options("--dtype", "float16,bfloat16").precisions) == ["bfloat16", "float16"]
    assert options().time_limit_s == math.inf


@pytest.mark.parametrize(
    ("dtypes", "wanted"),
    [
        (["float32", "tf32"], "float32"),
        (["tf32", "float16", "float64"], "float64"),
        (["tf32", "bfloat16"], None),
    ],
    ids=str,
)
def test_the_notebooks_comparison_wants_float32(dtypes: list[str], wanted: str | None) -> None:
    precisions = tuple(PRECISIONS[name] for name in dtypes)
    notebook = (load_workloads()["notebook"],)
    chosen = compare.Options(workloads=notebook, precisions=precisions)
    assert chosen.notebook_precision == (None if wanted is None else PRECISIONS[wanted])
    assert compare.pieces_of_work(chosen) == 3 * (4 * len(dtypes) + (wanted is not None))
    others = compare.Options(workloads=(load_workloads()["sine"],), precisions=precisions)
    assert others.notebook_precision is None


def test_several_dtypes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    arguments = [*TINY, "--workload", "sine", "--dtype", "float64,float32", "--json", str(path)]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    found = json.loads(path.read_text())
    assert found["header"]["dtype"] == "float32, float64"
    assert [(row["workload"], row["dtype"], row["pass"]) for row in found["rows"]] == [
        (workload, dtype, pass_name)
        for workload in ("gradient_flow", "sine")
        for dtype in ("float32", "float64")
        for pass_name in PASSES
    ]
    for dtype, means in found["geometric_mean_by_dtype"].items():
        for pass_name, mean in means.items():
            both = [
                row["speedup"]
                for row in found["rows"]
                if (row["dtype"], row["pass"]) == (dtype, pass_name)
            ]
            assert mean == pytest.approx(math.sqrt(math.prod(both)))
            assert sum(line.startswith(f"{dtype}  {pass_name}  ") for line in out.splitlines()) == 1


def test_results_are_written_as_they_come(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, rows = tmp_path / "results.json", iter([compare.time_row])

    def once(*arguments: Any) -> Row:
        try:
            return next(rows)(*arguments)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(compare, "time_row", once)
    assert cli.main([*TINY, "--json", str(path)]) == 130
    found = json.loads(path.read_text())
    assert not found["finished"]
    assert [row["pass"] for row in found["rows"]] == [FORWARD]
    assert list(tmp_path.iterdir()) == [path]


def test_what_torch_carries_out_is_no_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rnnkern, "LSTM", FallenBackLSTM)
    assert cli.main(TINY) == 1
    assert "FAILED kernel: no kernel covers this call" in capsys.readouterr().out


def test_the_header_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "The GPU")
    monkeypatch.setattr(timing, "gpu_driver", lambda: "123.4")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91200)
    chosen = options("--device", "cuda", "--dtype", "tf32,float32")
    header = compare.header(chosen)
    Printer(chosen).start(Report(header))
    expected = {"gpu": "The GPU", "driver": "123.4", "cuda": "13.0", "cudnn": 91200}
    assert header | expected == header
    assert (header["device"], header["dtype"]) == ("cuda", "float32, tf32")
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(f"against torch.nn {torch.__version__}, float32, tf32")
    assert second == "The GPU, driver 123.4, CUDA 13.0, cuDNN 91200"


def test_the_driver_where_nvidia_smi_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def says(text: str) -> None:
        done = subprocess.CompletedProcess([], 0, stdout=text)
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)

    says("580.65.06\n580.65.06\n")
    assert timing.gpu_driver() == "580.65.06"
    says("\n")
    assert timing.gpu_driver() is None

    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    assert timing.gpu_driver() is None


def test_quick_leaves_out_the_largest_unless_asked_for_them() -> None:
    quick, full = options("--quick"), options()
    assert {w.name for w in full.workloads} == known_workloads("cpu")
    assert {"large", "xlarge", "long"} <= set(quick.left_out)
    assert {w.name for w in quick.workloads} | set(quick.left_out) == known_workloads("cpu")
    assert [w.name for w in options("--quick", "--workload", "xlarge").workloads] == ["xlarge"]
    assert options("--quick", "--workload", "xlarge").left_out == ()


def test_a_quick_run_out_of_time_still_checks_everything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare.Options, "time_limit_s", 0.0)
    assert cli.main(TINY) == 0
    assert "3 rows were checked but not timed" in capsys.readouterr().out
    monkeypatch.setattr(rnnkern, "LSTM", WrongLSTM)
    assert cli.main(TINY) == 1


def test_threads_are_set_and_restored(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    assert cli.main([*TINY, "--threads", str(before + 1)]) == 0
    assert f"{before + 1} threads" in capsys.readouterr().out.splitlines()[0]
    assert torch.get_num_threads() == before


def test_an_interrupted_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "run", interrupt)
    assert cli.main(TINY) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_every_piece_of_work_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = options("--quick", "--cell", "LSTM,RNN", "--workload", "notebook,sine")
    done: list[int] = []
    printer = Printer(chosen)
    monkeypatch.setattr(printer, "end", lambda pieces=1: done.append(pieces))
    monkeypatch.setattr(rnnkern, "LSTM", WrongLSTM)  # one that fails must count as well
    compare.run(chosen, printer)
    assert sum(done) == compare.pieces_of_work(chosen)


def test_gflops() -> None:
    # T=1 N=1 I=500 H=500: 2 * 500 * 1000 = 1e6 FLOPs in 1000 us are 1 GFLOP/s.
    workload = Workload("x", 1, 1, 500, 500)
    assert compare.gflops("RNN", workload, FORWARD, 1000.0) == pytest.approx(1.0)
    assert compare.gflops("LSTM", workload, FORWARD_BACKWARD, 1000.0) == pytest.approx(12.0)


def test_info_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    info = rnnkern.build_info()
    assert [line.split()[0] for line in lines] == list(info)
    column = max(map(len, info)) + 2
    assert all(line[column - 1] == " " and line[column] != " " for line in lines)
    assert any(line.split() == ["version", rnnkern.__version__] for line in lines)


def test_info_says_that_a_driver_is_too_old(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = kernels.cuda_driver_refusal(12040, 13020)
    monkeypatch.setattr(kernels, "cuda_driver_refusal", lambda: reason)
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    assert all(version in shown for version in ("12.4", "13.2", "13.0 or later"))
    assert max(map(len, shown.splitlines())) <= 100


@pytest.mark.parametrize(
    ("driver", "built", "is_refused"),
    [
        (12090, 13000, True),
        (0, 12000, True),
        (13000, 13000, False),
        (13000, 13020, False),  # within a major version any driver will do
        (14000, 13020, False),
        (12090, 12000, False),
    ],
)
def test_drivers_that_will_do(driver: int, built: int, is_refused: bool) -> None:
    reason = kernels.cuda_driver_refusal(driver, built)
    assert (reason is not None) == is_refused


def test_no_driver_is_not_refused() -> None:
    assert kernels.cuda_driver() or kernels.cuda_driver_refusal() is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "none"), (True, "yes"), (False, "no"), (1, "1"), (["a", "b"], "a, b"), ([], "none")],
)
def test_plain_text_of_a_value(value: object, text: str) -> None:
    assert cli._plain(value) == text


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rnnkern", "info"], capture_output=True, text=True, check=True
    )
    assert "version" in done.stdout


@pytest.mark.parametrize(
    ("us", "text"),
    [
        (0.04567, "0.046 us"),
        (1.234, "1.23 us"),
        (12.34, "12.3 us"),
        (999.4, "999 us"),
        (999.6, "1.00 ms"),
        (123456.0, "123 ms"),
        (1234567.0, "1.23 s "),
    ],
)
def test_durations(us: float, text: str) -> None:
    assert duration(us) == text
