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
run_tests() {
  PYTHONPATH="$lib:$PWD/tools" RNNKERN_LOADED_FROM="$lib" RNNKERN_TEST_DEVICES=cpu \
    "$(dirname "$python")/pytest" -m kernel -p loaded_from "$@"
}
run_tests "$@"

# Every barrier and every wait is needed: without any one of them a test fails.
for place in $(cd csrc/cuda && grep -nE '^ +(sync_block|wait_until)\(' plain_*.cuh teams.cuh |
    sed -E 's/^([^:]+:[0-9]+):.*/\1/'); do
  if RNNKERN_SIMT_WITHOUT=$place run_tests -q -x tests/test_sequences.py \
      -k 'float32 and (test_reset or test_packed_lengths)' >build/simt/without.log 2>&1; then
    echo "simt: no test fails without the wait at csrc/cuda/$place" >&2
    exit 1
  fi
  grep -q '^FAILED' build/simt/without.log || { cat build/simt/without.log >&2; exit 1; }
  echo "simt: without the wait at csrc/cuda/$place a test fails, as it should"
done
