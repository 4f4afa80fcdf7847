#!/bin/sh
# Everything that wants a GPU: benchmarks/gpu/run_all.sh first, then second. See README.md here.
exec "${PYTHON:-python3}" "$(dirname "$0")/run_all.py" "$@"
