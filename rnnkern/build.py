"""What this build has: `build_info` and the version."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch

from rnnkern import kernels


def _version() -> str:
    try:
        return metadata.version("rnnkern")
    except metadata.PackageNotFoundError:  # run from the sources without installation
        return "unknown"


__version__ = _version()


def build_info() -> dict[str, Any]:
    """Version, compiler, CUDA, and the instruction sets compiled and in use.

    Returns:
        A dict with the keys ``version``, ``compiler``, ``cuda`` (the toolkit's version; None if
        built without CUDA), ``cuda_architectures`` (list: ``sm_90a`` is machine code,
        ``compute_80`` PTX), ``cuda_driver`` (the latest CUDA that this machine's driver knows; None
        if there is no driver), ``isa_compiled`` (list, best first), ``isa`` (in use; the
        environment variable ``RNNKERN_ISA`` forces a lower one), ``openmp``, ``torch``,
        ``threads``.
    """
    return {
        "version": __version__,
        "compiler": kernels.compiler,
        "cuda": kernels.cuda_version(),
        "cuda_architectures": (kernels.cuda_architectures() or "").split(),
        "cuda_driver": kernels.cuda_driver(),
        "isa_compiled": kernels.compiled_sets(),
        "isa": kernels.instruction_set(),
        "openmp": True,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
