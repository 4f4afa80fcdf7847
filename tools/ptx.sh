#!/bin/sh
# Build the package a second time with the CUDA kernels in place of the CPU's, on the stand-in of
# tests/simt with the blocks of a GPU, into build/ptx; the same kernels once more from the PTX that
# nvcc makes; and test both. Needs nvcc, and no GPU.
# Usage, from the repository: tools/ptx.sh PYTHON PART [pytest arguments], where PART is 0 to 3, a
# quarter of the cells and types, or all.
set -eu

python=$1
part=$2
shift 2
base=build/ptx
[ "${RNNKERN_CUDA_EXCHANGE:-FLAGS}" = FLAGS ] || base=build/ptx-values
lib=$PWD/$base/lib

rm -rf "$lib"
RNNKERN_SIMT=FULL "$python" setup.py --quiet build --build-base "$base" --build-lib "$lib"
[ "$part" = all ] && part=
echo "ptx: compiling the kernels of ${part:+part }${part:-all cells} for the stand-in"
# shellcheck disable=SC2086
"$python" tests/ptx/kernels.py $part

PYTHONPATH="$lib:$PWD/tools:$PWD/tests:$PWD/tests/ptx" RNNKERN_LOADED_FROM="$lib" \
  RNNKERN_TEST_DEVICES=cpu "$(dirname "$python")/pytest" -p loaded_from -p table \
  tests/ptx/check_*.py "$@"
