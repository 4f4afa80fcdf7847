#!/bin/sh
# Which lines of the CUDA kernels the tests on the stand-in run: the build of tools/simt.sh with
# gcov's counters, the same tests, and a table by gcovr, in build/simt-coverage.
# Usage, from the repository: tools/simt_coverage.sh PYTHON
set -eu

python=$1
base=build/simt-coverage
lib=$PWD/$base/lib

rm -rf "$base"
RNNKERN_SIMT=ON CXXFLAGS="--coverage -O1" "$python" setup.py --quiet build --build-base "$base" \
  --build-lib "$lib"
run_tests() {
  PYTHONPATH="$lib:$PWD/tools:$PWD/tests" RNNKERN_LOADED_FROM="$lib" RNNKERN_TEST_DEVICES=cpu \
    "$(dirname "$python")/pytest" -q -m kernel -p loaded_from "$@"
}
run_tests tests/simt/check_tiers.py
RNNKERN_CUDA_TIER=resident run_tests tests/test_cells.py tests/test_sequences.py
RNNKERN_CUDA_TIER=stepwise run_tests tests/test_cells.py tests/test_sequences.py -k 'float32 or LSTM'
find "$base" -path '*CompilerId*' -name '*.gcno' -delete
"$(dirname "$python")/gcovr" --root . "$base" --filter 'csrc/cuda/.*\.(cuh|cu)$' \
  --filter 'csrc/cells/(elman|gru|lstm|narrow).h' --merge-lines --gcov-ignore-parse-errors=all \
  --txt "$base/coverage.txt" --fail-under-line 100
cat "$base/coverage.txt"
