#!/bin/sh
# Build with g++'s address and undefined-behaviour sanitizers, and test what was built, in three
# parts:
#   0  the package with the best instruction set: the kernel tests in float32 and bfloat16, which go
#      through Python, in build/sanitize;
#   1  the program of tests/aarch64, which checks every cell, pass and type in seconds, with each
#      instruction set, in build/sanitize-program;
#   2  the package with the CUDA kernels on their stand-in, in build/sanitize-simt.
# AMX is the stand-in of csrc/cpu/amx.h, so that it runs on CPUs that have none.
# Usage, from the repository, with cmake and ninja on the path:
#   tools/sanitize.sh PYTHON PART [pytest arguments]
# PART is all, or a number whose remainder by three names the part.
set -eu

python=$1
part=$2
shift 2
bin=$(dirname "$python")
base=build/sanitize
export RNNKERN_SANITIZE=address,undefined
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1

# `setup.py build` and not pip: it has its own folder for the objects and keeps them for next time.
build() {  # build BASE VARIABLE=VALUE... Leaves the package in BASE/lib.
  folder=$1
  shift
  rm -rf "$folder/lib"
  env "$@" "$python" setup.py --quiet build --build-base "$folder" --build-lib "$PWD/$folder/lib"
}

# The script and not `python -m pytest`, which would put the repository's own package first on the
# path. Without --capture=sys the sanitizer's report would end with the process in pytest's
# capture file.
run_tests() {  # run_tests BASE [pytest arguments]
  tested=$PWD/$1/lib
  shift
  extension=$(find "$tested/rnnkern" -name '_C*.so' | head -n 1)
  libasan=$(ldd "$extension" | awk '/libasan/ {print $3}')
  if [ -z "$libasan" ]; then
    echo "sanitize: $extension was built without the address sanitizer" >&2
    exit 1
  fi
  # Python does not link libstdc++, and the sanitizer looks up what throws exceptions when the
  # process starts.
  libstdcxx=$(ldd "$extension" | awk '/libstdc\+\+/ {print $3}')
  # Python does not free everything when it ends, so leaks are not looked for.
  env PYTHONMALLOC=malloc LD_PRELOAD="$libasan $libstdcxx" \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
    PYTHONPATH="$tested:$PWD/tools:$PWD/tests" RNNKERN_LOADED_FROM="$tested" \
    RNNKERN_TEST_DEVICES=cpu "$bin/pytest" -m kernel -p loaded_from --capture=sys "$@"
}

package() {
  echo "sanitize: the package, with the best instruction set"
  build $base RNNKERN_AMX_STAND_IN=ON RNNKERN_INSTRUCTION_SETS=native RNNKERN_CUDA=OFF
  run_tests $base tests -k 'not float64 and (bfloat16 or not float16)' "$@"
}

program() {
  echo "sanitize: the program, with each instruction set"
  cmake -S . -B $base-program -G Ninja -DRNNKERN_DRIVER=ON \
    -DRNNKERN_SANITIZE=$RNNKERN_SANITIZE -DRNNKERN_AMX_STAND_IN=ON
  cmake --build $base-program --target driver
  sets=$($base-program/driver --sets)
  [ -n "$sets" ]
  for isa in $sets; do
    echo "sanitize: RNNKERN_ISA=$isa"
    RNNKERN_ISA=$isa $base-program/driver
  done
}

stand_in() {
  echo "sanitize: the CUDA kernels, on the stand-in of tests/simt"
  build $base-simt RNNKERN_SIMT=ON
  run_tests $base-simt tests/simt/check_tiers.py -k 'float32 or bfloat16' "$@"
}

[ "$part" = all ] || part=$((part % 3))
case $part in 0 | all) package "$@" ;; esac
case $part in 1 | all) program ;; esac
case $part in 2 | all) stand_in "$@" ;; esac
