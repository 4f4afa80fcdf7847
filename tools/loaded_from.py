"""pytest plugin: stop unless rnnkern's extension is the one under $RNNKERN_LOADED_FROM.

The repository's own folder `rnnkern` can come first on the path; a run meant for another build
would then test the ordinary one without anybody noticing.
"""

import os
from pathlib import Path

import pytest


def pytest_sessionstart() -> None:
    from rnnkern import _C

    wanted = Path(os.environ["RNNKERN_LOADED_FROM"]).resolve()
    found = Path(_C.__file__).resolve()
    if wanted not in found.parents:
        pytest.exit(f"the tests loaded {found}, wanted one under {wanted}", returncode=3)
