"""The command ``rnnkern``: ``rnnkern compare`` and ``rnnkern info``."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import rnnkern
from rnnkern import kernels, plot
from rnnkern.bench import compare
from rnnkern.bench.compare import Options
from rnnkern.bench.printer import Printer, write_json
from rnnkern.bench.workloads import (
    CELLS,
    PASSES,
    PRECISIONS,
    STEP_CELLS,
    Precision,
    default_precisions,
    load_step_workloads,
    load_workloads,
)

OK, FAILED, INTERRUPTED = 0, 1, 130
ALL_CELLS = (*CELLS, *STEP_CELLS)
DTYPES = {
    "cpu": tuple(name for name, precision in PRECISIONS.items() if not precision.tf32),
    "cuda": tuple(PRECISIONS),
}


def _slug(pass_name: str) -> str:
    """A pass as a word that needs no quotes: forward, forward-grad, forward-backward."""
    return pass_name.replace(" (", "-").replace("+", "-").rstrip(")")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status.

    Returns:
        0, or 1 if a check failed, or 130 if interrupted.

    Raises:
        SystemExit: with 2 for bad usage, as argparse does it, before any work.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rnnkern", description="Hand-written kernels for torch.nn's RNN, LSTM and GRU."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    info = commands.add_parser("info", help="what this build has, and what it uses on this machine")
    info.set_defaults(command=lambda _: _info())
    cache = commands.add_parser("cache", help="the compiled cells of rnnkern.cell")
    cache.add_argument("action", choices=("clear", "show"), help="remove or list them")
    cache.set_defaults(command=_cache)
    sub = commands.add_parser(
        "compare",
        help="check rnnkern against torch.nn and time both",
        description="Checks rnnkern against torch.nn and times both, in turn. "
        "Exit status 1 if a check fails.",
    )
    sub.set_defaults(command=_compare, parser=sub)
    several: dict[str, Any] = {"action": "extend", "type": _words, "default": []}
    names, gpu_names = (", ".join(load_workloads(device)) for device in ("cpu", "cuda"))
    step_names = ", ".join(load_step_workloads())
    dtypes = [
        f"on {device}: {', '.join(DTYPES[kind])} (default: "
        f"{', '.join(precision.name for precision in default_precisions(kind))})"
        for device, kind in (("the CPU", "cpu"), ("a GPU", "cuda"))
    ]
    passes = ", ".join(map(_slug, PASSES))
    sub.add_argument(
        "--quick", action="store_true", help="take seconds instead of minutes, with rougher figures"
    )
    sub.add_argument("--cell", **several, metavar="C[,C]", help=", ".join(ALL_CELLS))
    sub.add_argument(
        "--workload",
        **several,
        metavar="W[,W]",
        help=f"of layers on the CPU: {names}; on a GPU: {gpu_names}; of cells: {step_names}",
    )
    sub.add_argument("--pass", dest="passes", **several, metavar="P[,P]", help=passes)
    sub.add_argument(
        "--threads",
        type=_positive,
        metavar="N",
        help="number of threads (torch's pool, which rnnkern shares)",
    )
    sub.add_argument("--device", type=_device, default="cpu", help="cpu (default), cuda or cuda:N")
    sub.add_argument("--dtype", **several, metavar="D[,D]", help="; ".join(dtypes))
    sub.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results to FILE as they come"
    )
    sub.add_argument("--plot", type=Path, metavar="FILE", help="draw the speed-ups (extra 'plot')")
    return parser


def _cache(arguments: argparse.Namespace) -> int:
    from rnnkern.own_cells import build

    try:
        folder = build.cache_folder()
        if arguments.action == "clear":
            print(f"{build.clear()} compiled cells removed from {folder}")
            return 0
        found = build.libraries()
    except (OSError, RuntimeError) as error:
        print(f"rnnkern cache: {error}", file=sys.stderr)
        return FAILED
    print("\n".join([f"{folder}: {len(found)} compiled cells", *(path.name for path in found)]))
    return 0


def _words(text: str) -> list[str]:
    return text.split(",")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        why = "" if torch.version.cuda else " (it is built without CUDA)"
        raise argparse.ArgumentTypeError(
            f"torch sees {count or 'no'} CUDA device(s){why}, so no {text!r}"
        )
    return device


def _choose(
    parser: argparse.ArgumentParser, option: str, given: list[str], known: dict[str, Any]
) -> tuple[Any, ...]:
    """The values of the given names, in any case and in the order of ``known``; or all values."""
    folded = {name.lower(): name for name in known}
    names = [name.strip().lower() for name in given]
    unknown = [name for name in names if name not in folded]
    if unknown:
        parser.error(f"{option}: unknown {unknown[0]!r}, known are: {', '.join(known)}")
    chosen = {folded[name] for name in names} or set(known)
    return tuple(value for name, value in known.items() if name in chosen)


def _precisions(arguments: argparse.Namespace) -> tuple[Precision, ...]:
    device_type = arguments.device.type
    if not arguments.dtype:
        return default_precisions(device_type)
    known = {name: PRECISIONS[name] for name in DTYPES[device_type]}
    return _choose(arguments.parser, "--dtype", arguments.dtype, known)


def _options(arguments: argparse.Namespace) -> Options:
    parser, device = arguments.parser, arguments.device
    passes = list(map(_slug, arguments.passes))
    known = load_workloads(device.type) | load_step_workloads()
    workloads = _choose(parser, "--workload", arguments.workload, known)
    small = workloads
    if arguments.quick and not arguments.workload:  # a large workload runs if it is named
        small = compare.quick_workloads(workloads, device.type)
    return Options(
        cells=_choose(parser, "--cell", arguments.cell, {name: name for name in ALL_CELLS}),
        workloads=small,
        passes=_choose(parser, "--pass", passes, {_slug(name): name for name in PASSES}),
        device=device,
        precisions=_precisions(arguments),
        threads=arguments.threads,
        quick=arguments.quick,
        left_out=tuple(w.name for w in workloads if w not in small),
    )


def _compare(arguments: argparse.Namespace) -> int:
    options = _options(arguments)
    # Minutes of work must not end in a file that cannot be written.
    for path in filter(None, (arguments.json, arguments.plot)):
        if not path.absolute().parent.is_dir():
            arguments.parser.error(f"{path}: no such directory")
    try:
        if arguments.plot:
            plot.require_matplotlib(arguments.plot)
    except (ModuleNotFoundError, ValueError) as error:
        arguments.parser.error(str(error))
    with Printer(options, arguments.json) as printer:
        report = compare.run(options, printer)
    printer.summary(report)
    if arguments.json:
        write_json(report, arguments.json)
    if arguments.plot and report.rows:
        plot.speedup(report.rows, arguments.plot)
    return OK if report.ok else FAILED


def _info() -> int:
    info = rnnkern.build_info()
    width = max(map(len, info))
    for name, value in info.items():
        print(f"{name:{width}}  {_plain(value)}")
    if refusal := kernels.cuda_driver_refusal():
        text = f"This machine has {refusal}; until then torch.nn runs the calls with CUDA tensors."
        print(f"\n{textwrap.fill(text, 100)}")
    return OK


def _plain(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value)
