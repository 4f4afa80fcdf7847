#!/bin/sh
# What the compiler can say of the CUDA kernels without a GPU: they compile, for every architecture
# or for those of CUDAARCHS, the hot ones keep their registers and stay within the limits of
# tools/cuda_sass.py, and the package loads without a driver. Whether they are right is a question
# for tools/simt.sh.
# Usage, from the repository:
#   tools/cuda_check.sh PYTHON PART [pytest arguments]
# PART is all, or a number whose remainder says which one of the programs of a GPU's first run is
# compiled.
set -eu

python=$1
part=$2
shift 2
base=build/cuda-check
lib=$PWD/$base/lib

rm -rf "$base" # the report is of what is compiled now
mkdir -p "$base"
echo "cuda-check: compiling for ${CUDAARCHS:-every architecture} takes minutes; its output is in" \
  "$base/build.log"
RNNKERN_CUDA=ON RNNKERN_CUDA_REPORT=ON RNNKERN_INSTRUCTION_SETS=native "$python" setup.py --quiet \
  build --build-base "$base" --build-temp "$base" --build-lib "$lib" >"$base/build.log" 2>&1 || {
  tail -n 40 "$base/build.log" >&2
  exit 1
}
"$python" tools/cuda_report.py "$base/build.log"
# cuobjdump and nvdisasm are packages beside that Python.
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
for tools in "$packages"/nvidia/cu*/bin; do PATH=$tools:$PATH; done
export PATH
find "$base" -path '*cuda_*' -name 'scan.cu.o' -exec "$python" tools/cuda_sass.py {} +

echo "cuda-check: compiling the programs of a GPU's first run"
WORK=$PWD/$base ARCH=90 PYTHONPATH=benchmarks/gpu "$python" - "$part" <<'PYTHON'
import sys

import run_all

run_all.BIN.mkdir(parents=True)
log = run_all.WORK / "programs.log"
part = sys.argv[1]
of_cells = run_all.PROGRAMS
if part != "all":
    of_cells = (of_cells[int(part) % len(of_cells)],)
for name in ("constants", *of_cells):
    status = run_all.build_program(name, log, 600).wait()
    if status != run_all.OK:
        sys.exit(f"cuda-check: {name}: {status}\n{log.read_text()}")
PYTHON

PYTHONPATH="$lib:$PWD/tools" RNNKERN_LOADED_FROM="$lib" RNNKERN_TEST_DEVICES=cpu \
  "$(dirname "$python")/pytest" -p loaded_from tests/test_cells.py tests/test_cuda_plan.py \
  tests/test_cuda_cells.py "$@"
# Run in $lib, because a program from standard input imports from the current folder first.
interpreter=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
(cd "$lib" && "$interpreter") <<'PYTHON'
import os
import rnnkern

info = rnnkern.build_info()
found = {name: info[name] for name in ("cuda", "cuda_architectures", "cuda_driver")}
print("cuda-check:", found)
assert info["cuda"], "built without CUDA"
assert len(info["cuda_architectures"]) >= 1 + ("CUDAARCHS" not in os.environ), found
PYTHON
