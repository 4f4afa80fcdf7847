"""Print the instruction sets that can be forced here besides the one in use, one per line."""

import os
import subprocess
import sys


def main() -> int:
    os.environ.pop("RNNKERN_ISA", None)
    import rnnkern

    info = rnnkern.build_info()
    others = [isa for isa in info["isa_compiled"] if isa != info["isa"]]
    command = [sys.executable, "-c", "import rnnkern"]
    for isa in others:  # one that this CPU lacks refuses to be imported
        tried = subprocess.run(command, env={**os.environ, "RNNKERN_ISA": isa}, capture_output=True)
        if tried.returncode == 0:
            print(isa)
    return 0


if __name__ == "__main__":
    sys.exit(main())
