#!/bin/sh
# Build the package a second time with g++'s address and undefined-behaviour sanitizers, into
# build/sanitize, and run the program of tests/aarch64 on it, which checks every cell, pass and type
# in seconds, with each instruction set; and the kernel tests in float32 and bfloat16, which go
# through Python, with the best one. A third time with the CUDA kernels on their stand-in. AMX is
# the stand-in of csrc/cpu/amx.h, so that it runs on CPUs that have none.
# Usage, from the repository: tools/sanitize.sh PYTHON [pytest arguments]
set -eu

python=$1
shift
base=build/sanitize
lib=$PWD/$base/lib

# `setup.py build` and not pip: it has its own folder for the objects and keeps them for next time.
rm -rf "$lib"
RNNKERN_SANITIZE=address,undefined RNNKERN_AMX_STAND_IN=ON RNNKERN_CUDA=OFF \
  "$python" setup.py --quiet build --build-base "$base" --build-lib "$lib"

extension=$(find "$lib/rnnkern" -name '_C*.so' | head -n 1)
libasan=$(ldd "$extension" | awk '/libasan/ {print $3}')
if [ -z "$libasan" ]; then
  echo "sanitize: $extension was built without the address sanitizer" >&2
  exit 1
fi
# Python does not link libstdc++, and the sanitizer looks up what throws exceptions when the
# process starts.
libstdcxx=$(ldd "$extension" | awk '/libstdc\+\+/ {print $3}')

sanitized() {  # sanitized VARIABLE=VALUE... COMMAND...
  env PYTHONMALLOC=malloc LD_PRELOAD="$libasan $libstdcxx" \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
    UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 "$@"
}

# The script and not `python -m pytest`, which would put the repository's own package first on the
# path. Without --capture=sys the sanitizer's report would end with the process in pytest's
# capture file.
run_tests() {  # run_tests LIB [pytest arguments]
  tested=$1
  shift
  sanitized PYTHONPATH="$tested:$PWD/tools:$PWD/tests" RNNKERN_LOADED_FROM="$tested" \
    RNNKERN_TEST_DEVICES=cpu \
    "$(dirname "$python")/pytest" -m kernel -p loaded_from --capture=sys "$@"
}

echo "sanitize: the best instruction set"
run_tests "$lib" tests -k 'not float64 and (bfloat16 or not float16)' "$@"
build=$(dirname "$(find "$base" -name CMakeCache.txt | head -n 1)")
"$(dirname "$python")/cmake" --build "$build" --target driver
UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 "$build/driver"
# The sets of this build: it has the stand-in for AMX alone, whatever the CPU has.
isas=$(sanitized PYTHONPATH="$lib" "$python" tools/lower_isas.py)
for isa in $isas; do
  echo "sanitize: RNNKERN_ISA=$isa"
  UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 RNNKERN_ISA=$isa "$build/driver"
done

simt=$PWD/$base-simt/lib
rm -rf "$simt"
RNNKERN_SANITIZE=address,undefined RNNKERN_SIMT=ON \
  "$python" setup.py --quiet build --build-base "$base-simt" --build-lib "$simt"
echo "sanitize: the CUDA kernels, on the stand-in of tests/simt"
run_tests "$simt" tests/simt/check_tiers.py -k 'float32 or bfloat16' "$@"
