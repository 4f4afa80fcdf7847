#!/bin/sh
# Build the package a second time with the CUDA kernels in place of the CPU's, as plain C++ on the
# stand-in of tests/simt, into build/simt, and run kernel tests on it: the package's own, for the
# operands are ordinary tensors.
# Usage, from the repository: tools/simt.sh PYTHON PART [pytest arguments]
# PART is all, or a number: an even one for the tests of the package's cells, an odd one for cells
# that are written in Python and for the barriers.
set -eu

python=$1
part=$2
shift 2
base=build/simt
lib=$PWD/$base/lib

rm -rf "$lib"
RNNKERN_SIMT=ON "$python" setup.py --quiet build --build-base "$base" --build-lib "$lib"

# The script and not `python -m pytest`, which would put the repository's own package first.
run_tests() {
  PYTHONPATH="$lib:$PWD/tools:$PWD/tests:$PWD/tests/own_cells" RNNKERN_LOADED_FROM="$lib" RNNKERN_TEST_DEVICES=cpu \
    "$(dirname "$python")/pytest" -m 'kernel and not cpu_only' -p loaded_from "$@"
}
in_part() {
  [ "$part" = all ] || [ $((part % 2)) = "$1" ]
}

cells_of_the_package() {
  tests="tests/test_cells.py tests/test_sequences.py"
  run_tests tests/simt/check_tiers.py "$@"
  # shellcheck disable=SC2086
  RNNKERN_CUDA_TIER=resident run_tests $tests "$@"
  # shellcheck disable=SC2086
  RNNKERN_CUDA_TIER=stepwise run_tests $tests -k 'float32 or LSTM' "$@"
  # Second derivatives are of the stepwise tier, whatever tier is named.
  run_tests tests/test_second_order.py "$@"
}
if in_part 0; then cells_of_the_package "$@"; fi
in_part 1 || exit 0

# Cells that are written in Python are compiled for the stand-in when they are first called.
own_cells() {
  run_tests -p stand_in -p three_cells "$@"
}
own_cells tests/simt/check_own_cells.py "$@"
RNNKERN_CUDA_TIER=resident own_cells tests/test_sequences.py -k 'Own and float32' "$@"
RNNKERN_CUDA_TIER=stepwise own_cells tests/test_sequences.py -k 'OwnMGU and float32' "$@"
own_cells tests/test_second_order.py -k Own "$@"

# Every barrier, every wait and every flag is needed: without any one of them a test fails.
places() {
  (cd csrc/cuda && grep -HnE '^ +(sync_block|sync_warp|wait_until|set_flag)\(' "$@" |
    sed -E 's/^([^:]+:[0-9]+):.*/\1/')
}
fails_without() {  # fails_without PLACE [pytest arguments]
  place=$1
  shift
  log=$base/without-$place.log
  if RNNKERN_SIMT_WITHOUT=$place run_tests -q -x "$@" >"$log" 2>&1; then
    echo "simt: no test fails without the wait $place" >&2
    return 1
  fi
  grep -q '^FAILED' "$log" || { cat "$log" >&2; return 1; }
  echo "simt: without the wait $place a test fails, as it should"
}
two_at_once() {  # two_at_once PYTEST_K PLACES...
  selected=$1
  shift
  while [ $# -gt 0 ]; do
    fails_without "$1" tests/simt/check_tiers.py -k "$selected" &
    first=$!
    [ $# -lt 2 ] || fails_without "$2" tests/simt/check_tiers.py -k "$selected"
    wait $first
    shift
    [ $# -eq 0 ] || shift
  done
}
# shellcheck disable=SC2046
two_at_once 'float32 or bfloat16' \
  $(places resident.cuh resident_forward.cuh resident_backward.cuh gradients.cuh)
# shellcheck disable=SC2046
two_at_once without_a_library $(places product.cuh)
# So is every wait of a stream for another one.
two_at_once window wait_for_main main_waits
