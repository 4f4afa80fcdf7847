#!/bin/sh
# Unpack the newest wheel in dist/ into a temporary folder and run it from there, so that the
# repository's own package cannot stand in for it. torch comes from PYTHON's environment.
# Usage, from the repository: tools/check_wheel.sh PYTHON
set -eu

python=$(dirname "$1")
python=$(cd "$python" && pwd)/$(basename "$1")
wheel=$PWD/$(ls -t dist/rnnkern-*.whl | head -n 1)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

"$python" -m pip --disable-pip-version-check install --quiet --no-deps --target "$place" "$wheel"
cp tools/loaded_from.py "$place"
cd "$place"
PYTHONPATH=$place RNNKERN_LOADED_FROM=$place "$python" -c \
  'import loaded_from; loaded_from.pytest_sessionstart()'
PYTHONPATH=$place "$python" -m rnnkern info
echo "check-wheel: $(basename "$wheel") works"
