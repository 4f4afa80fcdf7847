#!/bin/sh
# On a machine with a GPU: tests under compute-sanitizer's memcheck and racecheck. The sanitizer
# watches only our kernels, because torch has many. torch's memory cache is off, so each tensor is an
# allocation of its own, and an access past its end is an error.
# Usage, from the repository: [SANITIZE="pytest's -k"] tools/cuda_sanitize.sh PYTHON [pytest arguments]
set -eu

python=$1
shift
some='float32 and (test_packed_lengths and mixed or test_reset and random)'
failed=0
for tool in memcheck racecheck; do
  echo "==== $tool"
  for tier in resident stepwise; do # the second one with products of our own
    cublas=$([ $tier = resident ] && echo 1 || echo 0)
    RNNKERN_CUDA_TIER=$tier RNNKERN_CUBLAS=$cublas PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      compute-sanitizer --tool "$tool" --kernel-name kns=rnnkern --error-exitcode 1 \
      "$python" -m pytest -m cuda -p no:cacheprovider -x -q tests/test_sequences.py \
      -k "${SANITIZE:-$some}" "$@" || failed=1
  done
done
exit $failed
