"""The instruction sets that can be forced here besides the one in use."""

import os
import subprocess
import sys


def lower_isas() -> list[str]:
    """The sets, the most capable one first."""
    os.environ.pop("RNNKERN_ISA", None)
    import rnnkern

    info = rnnkern.build_info()
    others = [isa for isa in info["isa_compiled"] if isa != info["isa"]]
    return [isa for isa in others if _is_supported(isa)]


def _is_supported(isa: str) -> bool:
    """Whether rnnkern can be imported with that set, which the CPU may lack."""
    command = [sys.executable, "-c", "import rnnkern"]
    environment = os.environ | {"RNNKERN_ISA": isa}
    return not subprocess.run(command, env=environment, capture_output=True).returncode
