"""Shorter defaults than pytest-benchmark's own: there are hundreds of rows here.

The whole suite takes about four minutes on two cores. What is given on the command line counts; for
a smoke run use ``-k notebook`` or ``--benchmark-max-time=0.01 --benchmark-min-rounds=1``.
"""

from __future__ import annotations

import pytest

DEFAULTS = {"benchmark_max_time": "0.3", "benchmark_min_rounds": 3}


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    given = [argument.partition("=")[0] for argument in config.invocation_params.args]
    for name, value in DEFAULTS.items():
        if "--" + name.replace("_", "-") not in given:
            setattr(config.option, name, value)
