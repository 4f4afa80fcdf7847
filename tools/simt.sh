#!/bin/sh
# Build the package a second time with the CUDA kernels in place of the CPU's, as plain C++ on the
# stand-in of tests/simt, into build/simt, and run kernel tests on it: the package's own, for the
# operands are ordinary tensors.
# Usage, from the repository: tools/simt.sh PYTHON [pytest arguments]
set -eu

python=$1
shift
base=build/simt
lib=$PWD/$base/lib

rm -rf "$lib"
RNNKERN_SIMT=ON "$python" setup.py --quiet build --build-base "$base" --build-lib "$lib"

if [ $# -eq 0 ]; then
  set -- tests/test_cells.py tests/test_sequences.py -k float32
fi
# The script and not `python -m pytest`, which would put the repository's own package first.
PYTHONPATH="$lib:$PWD/tools" RNNKERN_LOADED_FROM="$lib" \
  "$(dirname "$python")/pytest" -m kernel -p loaded_from "$@"
