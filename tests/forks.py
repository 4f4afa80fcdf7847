"""Functions called in processes of their own, which may crash or hang, or need a fresh import of
rnnkern.

They are forked from a server that has imported torch, because that import takes seconds; it has
computed nothing and has not imported rnnkern. So nothing may import rnnkern here.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch"])


class ChildError(Exception):
    """What a process has raised, or how it ended."""


def start(
    function: Callable[..., Any], *arguments: Any, env: Mapping[str, str]
) -> tuple[BaseProcess, Connection]:
    """A process that calls a function of a module with these environment variables and no others,
    and where its result arrives.
    """
    receiver, sender = SERVER.Pipe(duplex=False)
    # By name: the module is imported when the variables are set.
    named = (function.__module__, function.__name__)
    process = SERVER.Process(target=_answer, args=(sender, *named, arguments, dict(env)))
    process.start()
    sender.close()  # or the end of the process would not end the pipe
    return process, receiver


def results(*started: tuple[BaseProcess, Connection], timeout: float) -> list[Any]:
    """What the functions have returned, once their processes have ended; kills a process that has
    not answered after ``timeout`` seconds.

    Raises:
        ChildError: one of the processes raised, died or was killed.
    """
    ended = [_end(*each, timeout) for each in started]
    failures = [failure for _, failure in ended if failure is not None]
    if failures:
        raise ChildError("\n".join(failures))
    return [value for value, _ in ended]


def _end(process: BaseProcess, receiver: Connection, timeout: float) -> tuple[Any, str | None]:
    """What the function has returned, or what went wrong."""
    value, failure = None, f"no answer after {timeout} s"
    try:
        if receiver.poll(timeout):
            value, failure = receiver.recv()
            process.join(timeout)
    except EOFError:  # it died without an answer
        process.join(timeout)
        failure = f"the process ended with status {process.exitcode}"
    finally:
        process.kill()
        process.join()
        receiver.close()
    if failure is None and process.exitcode != 0:
        failure = f"the process answered, then ended with status {process.exitcode}"
    return value, failure


def _answer(
    sender: Connection, module: str, name: str, arguments: tuple[Any, ...], env: dict[str, str]
) -> None:
    os.environ.clear()
    os.environ.update(env)
    try:
        answer = (getattr(importlib.import_module(module), name)(*arguments), None)
    except BaseException:
        answer = (None, traceback.format_exc())
    sender.send(answer)
