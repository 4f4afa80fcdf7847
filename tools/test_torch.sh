#!/bin/sh
# Run the tests with another torch, in a virtual environment build/torch-VERSION that has that torch
# alone: whatever else they use comes from the environment of PYTHON. The extension is the one that
# is built already, because one serves every torch.
# Usage, from the repository: tools/test_torch.sh PYTHON VERSION [pytest arguments]
set -eu

python=$1
version=$2
shift 2
venv=build/torch-$version

if [ ! -e "$venv/ready" ]; then
  echo "==== torch $version into $venv, with the CUDA that pip's index has it with: up to 6 GB"
  rm -rf "$venv"
  "$python" -m venv --without-pip "$venv"
  # Without the pins of constraints.txt, which are those of another torch.
  env -u PIP_CONSTRAINT "$python" -m pip --disable-pip-version-check --python "$venv/bin/python" \
    install --quiet "torch==$version"
  "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
    "$(echo "$venv"/lib/python3.*/site-packages)/others.pth"
  touch "$venv/ready"
fi

export PYTHONPATH="$PWD"
where=$("$venv/bin/python" -c 'import torch; print(torch.__version__, "of", torch.__path__[0])')
case $where in
  "$version"*"$venv"*) echo "==== the tests with torch $where" ;;
  *) echo "test_torch: want torch $version of $venv, got $where" >&2; exit 1 ;;
esac
exec "$venv/bin/python" -m pytest tests "$@"
