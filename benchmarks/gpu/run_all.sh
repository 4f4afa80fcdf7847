#!/usr/bin/env bash
# Everything that wants a GPU, in one run of under nine minutes: see README.md beside this.
# Usage, from anywhere: benchmarks/gpu/run_all.sh [part ...]
#
# Variables:
#   OUT      where results go (build/gpu of the repository); WORK where things are built
#   SKIP     parts to leave out: SKIP="sanitizer peers"
#   COMMIT   the commit of these sources, where there is no repository to ask
#   WHEELS   a folder of wheels that the build needs and this Python lacks
#   PYTHON   the interpreter that has torch (python3)
#   ARCH     the architecture to build for (the device's: 90a)
#   SANITIZE pytest's -k for the sanitizers; COMPARE the options of rnnkern compare (--quick)
#   BUDGET   seconds of timing for the workloads (50), SWEEPS for those over H and T (12); both may
#            take twice as long. BUDGET=200 SWEEPS=80 LIMIT_speed=580 is a good measurement
#   JOBS     processes of the tests, where pytest-xdist is there (8)
#   LIMIT_tests and so on: seconds of a part
# No -e: a part that fails is recorded, and the next one runs.
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$here/../.." && pwd)
OUT=${OUT:-$repository/build/gpu}
WORK=${WORK:-$repository/build/gpu-work}
mkdir -p "$OUT" "$WORK"
OUT=$(cd "$OUT" && pwd)
WORK=$(cd "$WORK" && pwd)
PYTHON=${PYTHON:-python3}
export OUT WORK PYTHON PYTHONUNBUFFERED=1
site=$WORK/site       # the package as installed
source=$WORK/source   # a copy of the sources, in which to build and from which to test
wheels=$WORK/wheels
export PATH=$wheels/bin:$PATH PYTHONPATH=$site:$source/tools:$wheels

parts=(env constants build tests sanitizer speed peers compare plots)
# Seconds: below nine minutes together. What a part does not need, those after it may use.
declare -A limits=([env]=20 [constants]=65 [build]=105 [tests]=100 [sanitizer]=60 [speed]=105
                   [peers]=40 [compare]=30 [plots]=10)

# "90a" for compute capability 9.0: only with the letter are there wgmma and the like.
architecture() {
  local arch=${ARCH:-}
  if [[ -z $arch ]]; then
    arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d '. ')
  fi
  case $arch in
    90 | 100 | 103 | 120) echo "${arch}a" ;;
    *) echo "$arch" ;;
  esac
}

part_env() {
  COMMIT=${COMMIT:-$(git -C "$repository" describe --always --abbrev=40 --exclude='*' --dirty)} \
    "$PYTHON" - "$OUT/env.json" <<'PYTHON'
import datetime, json, os, platform, subprocess, sys
from importlib import metadata

def lines_of(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        return done.stdout.strip().splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        return [str(error)]

def version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

query = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
env = {
    "commit": os.environ["COMMIT"] or None,
    "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    "gpu": dict(zip(query.split(","), (lines_of(
        "nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader") or [""])[0].split(", "))),
    "nvcc": lines_of("nvcc", "--version")[-2:],
    "compiler": lines_of("g++", "--version")[:1],
    "cores": os.cpu_count(),
    "platform": platform.platform(),
    "python": platform.python_version(),
    "packages": {name: version(name) for name in (
        "torch", "triton", "numpy", "pybind11", "setuptools", "cmake", "ninja", "pytest",
        "pytest-xdist", "hypothesis", "nvidia-cudnn-cu13", "nvidia-cublas")},
}
with open(sys.argv[1], "w", encoding="utf-8") as file:
    json.dump(env, file, indent=1)
print(json.dumps(env, indent=1))
PYTHON
  nvidia-smi
}

part_constants() {
  local arch
  arch=$(architecture)
  nvcc -std=c++20 -O3 -gencode "arch=compute_$arch,code=sm_$arch" -o "$WORK/constants" \
    "$here/constants.cu" || return
  "$WORK/constants" "$OUT/constants.json"
}

# From a copy, for the build writes among the sources; and the copy then loses its folder `rnnkern`,
# which would come before the installed package.
part_build() {
  rm -rf "$site" "$source" "$wheels"
  mkdir -p "$source"
  tar -C "$repository" --exclude=./.git --exclude=./build --exclude=./dist --exclude=./.venv \
    --exclude='_C*.so' --exclude=__pycache__ -cf - . | tar -C "$source" -xf - || return
  local pip=("$PYTHON" -m pip --disable-pip-version-check install --quiet --no-index --no-deps
             --no-cache-dir --upgrade)
  if [[ -n ${WHEELS:-} ]]; then
    "${pip[@]}" --target "$wheels" "$WHEELS"/*.whl || return
  fi
  RNNKERN_CUDA=ON CUDAARCHS=$(architecture)-real \
    "${pip[@]}" --no-build-isolation --target "$site" "$source" || return
  rm -r "${source:?}/rnnkern"
  cd "$WORK" && "$PYTHON" -m rnnkern info
}

run_tests() {
  cd "$source" && RNNKERN_LOADED_FROM=$site "$@"
}

part_tests() {
  local jobs=()
  if "$PYTHON" -c 'import xdist' 2>/dev/null; then
    jobs=(-n "${JOBS:-8}")
  fi
  run_tests "$PYTHON" -m pytest tests -m cuda -p loaded_from "${jobs[@]}" --maxfail=50 --tb=short \
    -q --durations=10 --junit-xml="$OUT/tests.xml"
  local status=$?
  RNNKERN_CUDA_TIER=stepwise run_tests "$PYTHON" -m pytest tests/test_cells.py \
    tests/test_sequences.py tests/test_cuda.py -m cuda -k 'float32 or LSTM' -p loaded_from \
    "${jobs[@]}" --maxfail=50 --tb=short -q --junit-xml="$OUT/tests-stepwise.xml" || status=1
  # And with products of our own.
  RNNKERN_CUBLAS=0 run_tests "$PYTHON" -m pytest tests/test_cells.py tests/test_sequences.py \
    -m cuda -k 'random or mixed or Cell' -p loaded_from "${jobs[@]}" --maxfail=50 --tb=short -q \
    --junit-xml="$OUT/tests-own-products.xml" || status=1
  return "$status"
}

part_sanitizer() {
  run_tests sh tools/cuda_sanitize.sh "$PYTHON" -p loaded_from >"$OUT/sanitizer.log" 2>&1
  local status=$?
  grep -E '^====|ERROR SUMMARY|RACECHECK SUMMARY|passed|failed' "$OUT/sanitizer.log"
  return "$status"
}

part_speed() {
  cd "$WORK" && "$PYTHON" "$here/speed.py" "$OUT/speed.jsonl" --budget "${BUDGET:-50}" \
    --sweeps "${SWEEPS:-12}"
}

# Those whose wheels are in WHEELS. They compile at their first call.
part_peers() {
  cd "$WORK" && "$PYTHON" "$here/speed.py" "$OUT/peers.jsonl" --peers --workload flash768 \
    --dtype bfloat16 --dtype float32 --budget 15
}

part_compare() {
  # shellcheck disable=SC2086
  cd "$WORK" && "$PYTHON" -m rnnkern compare --device cuda ${COMPARE---quick} \
    --json "$OUT/compare.json"
}

# Where this Python has matplotlib; page.py makes them anywhere of what has been measured.
part_plots() {
  "$PYTHON" -c 'import matplotlib' 2>/dev/null || { echo "no matplotlib here"; return 0; }
  local measured=("$OUT/speed.jsonl")
  [[ -s $OUT/peers.jsonl ]] && measured+=("$OUT/peers.jsonl")
  "$PYTHON" "$here/page.py" "${measured[@]}" --docs "$OUT"
}

if [[ ${1:-} == --inside ]]; then # a part, in a process that can be ended
  "part_$2"
  exit
fi

results=()
write_summary() {
  local separator='' result
  {
    printf '{'
    for result in "${results[@]}"; do
      printf '%s\n %s' "$separator" "$result"
      separator=,
    done
    printf '\n}\n'
  } >"$OUT/summary.json"
}

log=$OUT/log.txt
: >"$log"
say() { printf '%s\n' "$@" | tee -a "$log"; }

wanted=("$@")
((${#wanted[@]})) || wanted=("${parts[@]}")
deadline=0 failures=0 table=()
SECONDS=0
for part in "${parts[@]}"; do
  own=LIMIT_$part
  deadline=$((deadline + ${!own:-${limits[$part]}}))
  if [[ " ${SKIP:-} " == *" $part "* || " ${wanted[*]} " != *" $part "* ]]; then
    status=skipped took=0
  else
    begun=$SECONDS
    say "" "==== $part, at $begun s, at most $((deadline - begun)) s"
    # Interrupted first: pytest and the others then write what they have. A shell in the background
    # has them ignore that.
    timeout --signal=INT --kill-after=8 $((deadline - begun > 1 ? deadline - begun : 1)) \
      env --default-signal=INT bash "${BASH_SOURCE[0]}" --inside "$part" </dev/null 2>&1 |
      tee -a "$log"
    code=${PIPESTATUS[0]}
    took=$((SECONDS - begun))
    case $code in
      0) status=ok ;;
      124 | 137) status="out of time" ;;
      *) status="failed with $code" ;;
    esac
    [[ $status == ok ]] || failures=$((failures + 1))
  fi
  results+=("\"$part\": {\"status\": \"$status\", \"seconds\": $took}")
  table+=("$(printf '%-10s %4d s  %s' "$part" "$took" "$status")")
  write_summary
done
say "" "$(printf '%s\n' "${table[@]}")"
((failures == 0))
