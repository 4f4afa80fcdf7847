"""What the tests run in a process of its own, by `support.in_a_process`: it may crash or hang, or
needs a fresh import.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import os
import runpy
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import int8_reference
import torch
import wrong_calls
from support import (
    CELLS,
    DTYPES,
    FORMS,
    LAYERS,
    Leaves,
    build,
    evaluate,
    has_smooth_gradient,
    importable,
    leaves_for,
    on_threads,
    pack_rows,
    plain,
)
from torch import Tensor, nn

import rnnkern
from rnnkern import tolerance

# T, N, I, H: tiny, one row, several rows per register tile with remainders, and enough work for two
# threads.
SIZES = [(4, 1, 3, 5), (3, 1, 65, 130), (5, 13, 7, 33), (2, 70, 40, 150), (1, 17, 70, 67)]


def cases() -> Iterator[tuple[str, nn.Module, Leaves]]:
    """A layer of every form, dtype and size, and its input: the same in every process."""
    for form, (kind, own) in FORMS.items():
        for dtype in DTYPES:
            for T, N, inputs, H in SIZES:
                torch.manual_seed(0)
                module = build(kind, inputs, H, dtype=dtype, bidirectional=True, **own)
                yield f"{form} {dtype} {T=} {N=} {H=}", module, leaves_for(module, T, N)


def numbers(path: str) -> str:
    """Saves the results of many calls by case and way; gives the instruction set that was used."""
    torch.set_num_threads(1)
    results: dict[str, dict[str, dict[str, Tensor]]] = {"integers": {"training": integers()}}
    for case, module, leaves in cases():
        training = evaluate(module, leaves, backward=has_smooth_gradient(module))
        found = results[case] = {"training": training}
        for deterministic in (True, False):
            torch.use_deterministic_algorithms(deterministic)
            for threads in (1, 2):
                call = on_threads(plain, threads)
                found[f"{deterministic=} {threads=}"] = evaluate(
                    module, leaves, call, backward=False
                )
            torch.set_num_threads(1)
    torch.save(results, path)
    return isa()


def frozen_weights() -> str:
    """Checks layers with int8 and bfloat16 weights; gives the instruction set that was used."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for kind in LAYERS:
        for I, H, N in ((9, 33, 7), (70, 64, 1), (5, 150, 13)):
            module = build(kind, I, H)
            frozen = rnnkern.freeze(module, torch.int8)
            for ours, theirs, reference in int8_reference.worst(module, frozen, 3, N):
                verdict = tolerance.check(ours, theirs, reference)
                assert verdict, f"{kind} {I} {H} {N}: {verdict}"
            halves = rnnkern.freeze(module, torch.bfloat16)
            x = torch.randn(3, N, I)
            if "bf16" in isa() or "amx" in isa():
                continue  # rounds x and h, too: tests/test_frozen.py
            torch.use_deterministic_algorithms(True)
            with torch.no_grad():
                assert torch.equal(halves(x)[0], rnnkern.thaw(halves)(x)[0])
            torch.use_deterministic_algorithms(False)
    return isa()


def malformed_states() -> tuple[list[str], int]:
    """Calls that end a child of this process: each of them in one that is forked for it alone is
    too dear, so a child runs on until it is killed, and the next one goes on behind that call.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    killed, calls = [], list(_malformed_calls())
    begin = 0
    while begin < len(calls):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            for i in range(begin, len(calls)):
                os.write(write, i.to_bytes(4, "little"))
                with contextlib.suppress(Exception):
                    calls[i][1]()
            os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            seen = pipe.read()
        _, status = os.waitpid(child, 0)
        begin = len(calls)
        if os.WIFSIGNALED(status):
            begin = int.from_bytes(seen[-4:], "little") + 1
            killed.append(calls[begin - 1][0])
    return killed, len(calls)


def _malformed_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    N, I, H = 3, 5, 3
    shapes = [(), (H,), (N, H), (1, H), (2, H), (1, N, H), (2, N, H), (1, 1, N, H), (0, H), (N, 0)]
    tensors: dict[str, Any] = {str(shape): torch.zeros(shape) for shape in shapes}
    tensors |= {"int": torch.zeros(N, H).long(), "None": None, "1.0": 1.0, "text": "ab"}
    pairs = {f"({a}, {b})": (x, y) for a, x in tensors.items() for b, y in tensors.items()}
    state = torch.zeros(N, H)
    others: dict[str, Any] = {
        "one": (state,),
        "three": (state,) * 3,
        "list": [state] * 2,
        "empty": (),
        "nested": ((state, state),) * 2,
        "dict": {"h": state},
        "set": {1},
    }
    rows = [torch.randn(3, I), torch.randn(2, I), torch.randn(1, I)]
    inputs: dict[str, Any] = {
        "1-D": torch.randn(I),
        "2-D": torch.randn(N, I),
        "3-D": torch.randn(2, N, I),
        "no rows": torch.randn(0, I),
        "no steps": torch.randn(0, N, I),
        "packed": pack_rows(rows),
        "packed, unsorted": pack_rows(rows[::-1], enforce_sorted=False),
    }
    for kind in (*LAYERS, *CELLS):
        module = build(kind, I, H)
        for name, x in inputs.items():
            for of_state, hx in (tensors | others | (pairs if "LSTM" in kind else {})).items():
                call = functools.partial(module, x, hx)
                yield f"{kind}, input {name}, state {of_state}", call


def integers() -> dict[str, Tensor]:
    """Outputs and gradients of a relu network of small integers: exact in whatever order they are
    summed.
    """
    torch.manual_seed(0)
    module = build("RNN", 6, 33, nonlinearity="relu", bidirectional=True)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randint(-1, 2, parameter.shape).float())
            if "weight_hh" in name:
                parameter.mul_(torch.rand(parameter.shape) < 2 / 33)
    y, h_n = module(torch.randint(-3, 4, (6, 7, 6)).float())
    y.sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"y": y.detach(), "h_n": h_n.detach()} | gradients


def isa() -> str:
    return str(rnnkern.build_info()["isa"])


class Subclass(torch.Tensor):
    pass


FALLBACKS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "complex64": lambda m, x: m.to(torch.complex64)(x.to(torch.complex64)),
    "subclass": lambda m, x: m(x.as_subclass(Subclass)),
    "subclass-of-a-weight": lambda m, x: with_weight(m, lambda w: w.as_subclass(Subclass))(x),
    "complex64-lengths": lambda m, x: m.to(torch.complex64)(
        x.to(torch.complex64), lengths=torch.tensor([2, 5])
    ),
}


def with_weight(module: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    weight = module.weight_hh_l0.detach().clone()
    del module.weight_hh_l0
    module.weight_hh_l0 = change(weight)
    return module


def fallbacks() -> dict[str, list[str] | None]:
    """For each way out of the kernels, the warnings of two calls alike, by a child that has seen no
    other.
    """
    torch.set_num_threads(1)
    found = {}
    for name, call in FALLBACKS.items():
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for _ in range(2):
                    call(rnnkern.GRU(4, 6), torch.randn(5, 2, 4))
            messages = [str(w.message) for w in caught if w.category is rnnkern.FallbackWarning]
            os.write(writing, json.dumps(messages).encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            text = pipe.read()
        os.waitpid(child, 0)
        found[name] = json.loads(text) if text else None
    return found


def allow_rnn(order: str) -> dict[str, bool]:
    """Whether Dynamo may trace a module of rnnkern and one of torch.nn, and what its flag says to
    all others. rnnkern is imported here already; Dynamo is not.
    """
    assert "torch._dynamo" not in sys.modules
    if order == "dynamo-first":
        own = "rnnkern.interop.on_import"
        sys.meta_path[:] = [f for f in sys.meta_path if type(f).__module__ != own]
        importlib.import_module("torch._dynamo.config")
        rnnkern.interop.dynamo.open_to_rnnkern()
    config = importlib.import_module("torch._dynamo.config")
    if order == "own-setting":
        config.allow_rnn = True
    found = {"bool": bool(config.allow_rnn)}
    for name, package in (("rnnkern", rnnkern), ("torch.nn", torch.nn)):
        found[name] = _compiles(package.GRU(3, 4))
    return found


def _compiles(module: nn.Module) -> bool:
    try:
        torch.compile(module, fullgraph=True, backend="eager")(torch.randn(2, 1, 3))
    except torch._dynamo.exc.Unsupported:
        return False
    return True


def forks(kind: str, threads: int) -> tuple[str, int, bool]:
    """A forked child computes what its parent did, after the parent has used its threads."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    module = build(kind, 40, 150)
    x = torch.randn(5, 70, 40)
    with torch.no_grad():
        expected = module(x)[0].numpy().tobytes()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        if threads == 1:  # as torch's own workers do; then backward is safe too
            torch.set_num_threads(1)
            module(x)[0].sum().backward()
        with torch.no_grad():
            actual = module(x)[0].numpy().tobytes()
        os.write(writing, b"same" if actual == expected else b"different")
        os._exit(0)
    os.close(writing)
    os.set_blocking(reading, False)
    answer, patience = b"", time.monotonic() + 60
    while not answer and time.monotonic() < patience:
        time.sleep(0.02)
        try:
            answer = os.read(reading, 100)
        except BlockingIOError:
            continue
    if not answer:
        os.kill(child, signal.SIGKILL)
        answer = b"hangs"
    _, status = os.waitpid(child, 0)
    with torch.no_grad():  # the parent still works, on all its threads
        alive = module(x)[0].numpy().tobytes() == expected
    return answer.decode(), status, alive


def huge(device: str) -> dict[str, str]:
    """Calls whose output no memory can hold; gives the type of the exception each raises."""
    torch.set_default_device(device)
    steps = torch.zeros(1, 1, 3)
    raised = {}
    for kind in ("RNN", "LSTM", "GRU"):
        for name, shape in {
            "many-steps": (2**46, 2, 3),
            "many-rows": (2, 2**46, 3),
            "bytes-overflow": (2**45, 2**15, 3),
        }.items():
            for training in (True, False):
                module = build(kind, 3, 4).requires_grad_(training)
                raised[f"{kind} {name} {training=}"] = _raised_by(module, steps.expand(shape))
    for kind in ("RNNCell", "LSTMCell", "GRUCell"):
        raised[kind] = _raised_by(build(kind, 3, 4), torch.zeros(1, 3).expand(2**46, 3))
    return raised


def broken(device: str) -> dict[str, str]:
    """Packed sequences that break their rules: gives by what each is refused. None of them may
    leave the device in a state in which it computes no more.
    """
    torch.set_default_device(device)
    found = {}
    sequences: dict[str, Callable[[], Any]] = dict(wrong_calls.BROKEN)
    for indices in wrong_calls.BROKEN_INDICES:
        sequences[str(indices)] = lambda indices=indices: wrong_calls.with_indices(indices)
    for kind in ("RNN", "LSTM", "GRU"):
        for name, sequence in sequences.items():
            module = build(kind, wrong_calls.I, wrong_calls.H)
            for states in (
                wrong_calls.zeros(kind, 1, 3 if name.startswith("[") else 2, wrong_calls.H),
                None,
            ):
                try:
                    module(sequence(), states)
                    torch.get_device_module(device).synchronize()
                    outcome = "nothing"
                except (RuntimeError, ValueError, TypeError, IndexError) as error:
                    outcome = type(error).__name__
                found[f"{kind} {name} hx={states is not None}"] = outcome
        assert build(kind, wrong_calls.I, wrong_calls.H)(wrong_calls.x())[0].isfinite().all()
    return found


def _raised_by(module: nn.Module, x: Tensor) -> str:
    try:
        module(x)
    except (RuntimeError, MemoryError) as error:
        return "RuntimeError" if isinstance(error, RuntimeError) else "MemoryError"
    return "nothing"


def _high_water() -> float:
    """The most memory that this process has had, in MiB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def peak_memory_of_a_loop(library: str, kind: str) -> float:
    """MiB by which 100 steps of a cell and their backward pass raise the peak of the process."""
    torch.set_num_threads(1)
    cell = getattr({"rnnkern": rnnkern, "torch": nn}[library], kind)

    def loop(module: Any, x: Any) -> None:
        state = None
        for step in x:
            state = module(step, state)
        (state if isinstance(state, torch.Tensor) else state[0]).sum().backward()

    loop(cell(4, 4), torch.randn(3, 2, 4))
    module, x = cell(256, 512), torch.randn(100, 32, 256)
    before = _high_water()
    loop(module, x)
    return _high_water() - before


def peak_memory(library: str, kind: str, mode: str) -> float:
    """MiB by which a call on a long sequence raises the peak of the process."""
    torch.set_num_threads(1)
    source: Any = {"rnnkern": rnnkern, "torch": nn}[library]
    layer = getattr(source, kind)
    # Everything that is loaded or made once, before the base is taken.
    small, x = layer(4, 4), torch.randn(3, 2, 4, requires_grad=True)
    small(x)[0].sum().backward()
    module, x = layer(128, 256), torch.randn(2000, 16, 128)
    before = _high_water()
    if mode == "training":
        module(x)[0].sum().backward()
    else:
        with torch.no_grad():
            y, _ = module(x)
            y.sum()
    return _high_water() - before


def script(path: str, *arguments: str) -> str:
    """Runs a Python script as its interpreter would; gives what it has printed."""
    torch.set_num_threads(1)
    sys.argv = [path, *arguments]
    with importable(Path(path).parent), redirect_stdout(io.StringIO()) as said:
        runpy.run_path(path, run_name="__main__")
    return said.getvalue()


def moves_while_read() -> int:
    """How often a thread has read an output, which another one has meanwhile made to leave memory
    that its graph then frees.
    """
    torch.set_num_threads(1)
    read = []
    for _ in range(20):
        y: Any = build("RNN", 1, 64)(torch.zeros(4000, 64, 1))[0]
        seen, layer = y.detach(), build("RNN", 64, 128)

        def run(layer: Any = layer, seen: Any = seen) -> None:
            with torch.no_grad():
                read.append(layer(seen)[0])

        thread = threading.Thread(target=run)
        thread.start()
        time.sleep(0.005)
        seen.numpy()
        y = None
        thread.join()
    return len(read)
