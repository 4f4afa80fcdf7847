#!/bin/sh
# Build with g++'s address and undefined-behaviour sanitizers, and test what was built, in six
# parts:
#   0, 1  the package with the best instruction set: the kernel tests, which go through Python, in
#         float32, and in bfloat16 with layers drawn at random in every type, in build/sanitize;
#   2, 3  the program of tests/standalone, which checks every cell, pass and type in seconds, with
#         each instruction set without AVX-512 and with it, in build/sanitize-program;
#   4, 5  the package with the CUDA kernels on their stand-in, in float32 and in bfloat16, in
#         build/sanitize-simt.
# A part of one type leaves the kernels of some others unsanitized. Part 3 needs a CPU with AVX-512.
# AMX is the stand-in of csrc/cpu/amx.h, so that it runs on CPUs that have none.
# Usage, from the repository, with cmake and ninja on the path:
#   tools/sanitize.sh PYTHON PART [pytest arguments]
# PART is all, or a number whose remainder by six names the part.
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

# The element types whose kernels are sanitized, in one part.
elements() {
  [ "$part" = all ] || echo "$1;F32ByBf16;F32ByI8;F32By3Bf16"
}

package() {  # package ELEMENTS PYTEST_K [pytest arguments]
  echo "sanitize: the package, with the best instruction set, $1"
  build $base RNNKERN_SANITIZED="$(elements "$1")" RNNKERN_AMX_STAND_IN=ON \
    RNNKERN_INSTRUCTION_SETS=native RNNKERN_CUDA=OFF
  selected=$2
  shift 2
  run_tests $base tests -k "$selected" "$@"
}

program() {  # program INSTRUCTION_SETS
  echo "sanitize: the program, with each instruction set of $1"
  cmake -S . -B $base-program -G Ninja -DRNNKERN_STANDALONE=ON "-DRNNKERN_INSTRUCTION_SETS=$1" \
    -DRNNKERN_SANITIZE=$RNNKERN_SANITIZE -DRNNKERN_AMX_STAND_IN=ON
  cmake --build $base-program --target standalone
  sets=$($base-program/standalone --sets)
  [ -n "$sets" ]
  for isa in $sets; do
    echo "sanitize: RNNKERN_ISA=$isa"
    RNNKERN_ISA=$isa $base-program/standalone
  done
}

stand_in() {  # stand_in ELEMENTS PYTEST_K [pytest arguments]
  echo "sanitize: the CUDA kernels, on the stand-in of tests/simt, $1"
  build $base-simt RNNKERN_SANITIZED="$(elements "$1")" RNNKERN_SIMT=ON
  selected=$2
  shift 2
  run_tests $base-simt tests/simt/check_tiers.py -k "$selected" "$@"
}

in_part() {
  [ "$part" = all ] || [ $((part % 6)) = "$1" ]
}
without_avx512=baseline
[ "$(uname -m)" != x86_64 ] || without_avx512='baseline;x86_64_v3'
if in_part 0; then package 'float;double' 'not float64 and not float16 and not bfloat16' "$@"; fi
if in_part 1; then package 'Bf16;F16' 'bfloat16 or test_hypothesis' "$@"; fi
if in_part 2; then program "$without_avx512"; fi
if in_part 3; then
  if grep -qw avx512f /proc/cpuinfo; then
    program 'x86_64_v4;x86_64_v4_vnni;x86_64_v4_bf16;x86_64_v4_amx'
  else
    echo "sanitize: this CPU has no AVX-512; part 2 in place of part 3"
    [ "$part" = all ] || program "$without_avx512"
  fi
fi
if in_part 4; then stand_in float float32 "$@"; fi
if in_part 5; then stand_in Bf16 bfloat16 "$@"; fi
