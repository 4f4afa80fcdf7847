#!/bin/sh
# Build the CPU kernels for AArch64, with the flags of the package and warnings as errors, into a
# program that checks every cell, pass and type without Python (tests/standalone), and run it on
# QEMU's emulation of that processor. Debian's packages for it are g++-aarch64-linux-gnu and
# qemu-user.
# With `native` it is built for this CPU and runs without QEMU: the quick way to debug the program.
# Usage, from the repository, with cmake and ninja on the path: tools/aarch64.sh [native]
set -eu

build=build/aarch64
if [ "$*" = native ]; then
  build=$build-native
  emulator=
  set -- -DRNNKERN_INSTRUCTION_SETS=baseline
elif [ $# -eq 0 ]; then
  for tool in aarch64-linux-gnu-g++ qemu-aarch64; do
    command -v "$tool" >/dev/null || {
      echo "aarch64: there is no $tool;" \
        "on Debian: apt-get install g++-aarch64-linux-gnu qemu-user" >&2
      exit 1
    }
  done
  # A processor of ARMv8.0, so that newer instructions are illegal.
  emulator='qemu-aarch64 -cpu cortex-a57 -L /usr/aarch64-linux-gnu'
  set -- -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
else
  echo "aarch64: got '$*', wanted 'native' or nothing" >&2
  exit 1
fi

cmake -S . -B "$build" -G Ninja -DRNNKERN_STANDALONE=ON -DCMAKE_CXX_FLAGS=-Werror "$@"
cmake --build "$build" --target standalone --parallel "$(nproc)"
$emulator "$build/standalone"
