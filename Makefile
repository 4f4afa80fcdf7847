# Every target sets up what it needs: a virtual environment in .venv, the versions pinned in
# constraints.txt, and an editable build of the package. Stamp files keep the second run from doing
# any of it again.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.tools-ready
BUILT := $(VENV)/.package-built

# The same as in pyproject.toml's [build-system]. The editable build runs without build isolation:
# an isolated one has its tools in a new place every time and would compile everything anew.
BUILD_REQUIRES := setuptools pybind11 cmake ninja
export PATH := $(abspath $(BIN)):$(PATH)

NATIVE_SOURCES := $(shell find csrc -type f 2>/dev/null) CMakeLists.txt setup.py pyproject.toml
FORMATTED      := $(shell find csrc tests benchmarks -type f 2>/dev/null | grep -E '\.(cpp|h|cu|cuh)$$')

# The pins hold for every pip below; an isolated build takes them as --build-constraint.
export PIP_CONSTRAINT := constraints.txt

define build_wheels
$(PIP) install --quiet --group wheels
$(BIN)/python tools/build_wheels.py --cuda $(1) $(ARGS)
endef

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install compare test test-isa test-torch bench bench-smoke report lint format wheels wheels-cuda \
  check-neon sanitize cuda-check cuda-sanitize simt simt-coverage clean distclean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo
	@echo '  ARGS="..." is handed on to the program; PYTHON=... is the interpreter that makes .venv.'

install: $(BUILT)  ## set up .venv and build the package in it, nothing more

compare: $(BUILT)  ## check and time against torch.nn (ARGS=--quick: under 20 s)
	$(BIN)/rnnkern compare $(ARGS)

test: $(BUILT)  ## run the tests (ARGS="-k lstm": some of them)
	$(BIN)/pytest tests $(ARGS)

test-isa: $(BUILT)  ## run the tests once with each lower instruction set forced
	@set -e; isas=$$($(BIN)/python tools/lower_isas.py); for isa in $$isas; do \
	  echo "RNNKERN_ISA=$$isa $(BIN)/pytest tests $(ARGS)"; \
	  RNNKERN_TEST_DEVICES=cpu RNNKERN_ISA=$$isa $(BIN)/pytest tests $(ARGS); \
	done

test-torch: $(BUILT)  ## run the tests with another torch (TORCH=2.12.1), in an environment of its own
	sh tools/test_torch.sh $(BIN)/python $(or $(TORCH),$(error want TORCH=VERSION)) $(ARGS)

bench: $(BUILT)  ## run the benchmarks (ARGS="-k notebook": some of them)
	$(BIN)/pytest benchmarks --benchmark-only $(ARGS)

report: $(BUILT)  ## measure beside ONNX Runtime and OpenVINO, write docs/benchmarks.md
	$(PIP) install --quiet onnx onnxruntime openvino
	$(BIN)/python -m benchmarks.report $(ARGS)

bench-smoke: $(BUILT)  ## run every benchmark once, untimed: its check and its code
	$(BIN)/pytest benchmarks --benchmark-disable $(ARGS)

lint: $(BUILT)  ## ruff, mypy, clang-format and the workflow's linters, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(FORMATTED),$(BIN)/clang-format --dry-run -Werror $(FORMATTED))
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --quiet --offline --strict-collection .github

format: $(READY)  ## format Python and C++, and apply ruff's safe fixes
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(if $(FORMATTED),$(BIN)/clang-format -i $(FORMATTED))

wheels: $(READY)  ## build the CPU's wheel, prove it without a compiler, index it in dist/
	$(call build_wheels,cpu)

wheels-cuda: $(READY)  ## the same for CUDA, in an hour: needs no nvcc (ARGS="--torch 2.13.0 2.12.1")
	$(call build_wheels,13.0 13.2)

check-neon:  ## compile the kernels for AArch64 (needs Debian's g++-aarch64-linux-gnu)
	compile="aarch64-linux-gnu-g++ -std=c++20 -O3 -fno-math-errno -fno-trapping-math -fopenmp -Wall \
	  -Wextra -Werror -Icsrc -o /dev/null -c"; set -e; \
	for element in float double Bf16 F16; do \
	  $$compile -DRNNKERN_NAMESPACE=baseline -DRNNKERN_ELEMENT=$$element csrc/cpu/kernels.cpp; done; \
	for source in csrc/cpu/scan.cpp csrc/plan.cpp; do $$compile $$source; done

sanitize: $(BUILT)  ## run the kernel tests under the address and undefined-behaviour sanitizers
	sh tools/sanitize.sh $(BIN)/python $(ARGS)

cuda-check: $(BUILT)  ## compile the CUDA kernels for every architecture, look for spills, run `simt`
	sh tools/cuda_check.sh $(BIN)/python

cuda-sanitize: $(BUILT)  ## tests on a GPU under compute-sanitizer's memcheck and racecheck
	sh tools/cuda_sanitize.sh $(BIN)/python $(ARGS)

simt: $(BUILT)  ## run kernel tests on the CUDA kernels, on a stand-in for the GPU (ARGS: of pytest)
	sh tools/simt.sh $(BIN)/python $(ARGS)

simt-coverage: $(BUILT)  ## which lines of the CUDA kernels the tests on the stand-in run
	$(PIP) install --quiet gcovr
	sh tools/simt_coverage.sh $(BIN)/python

clean:  ## remove what was built, keep .venv
	rm -rf build dist *.egg-info rnnkern/_C*.so $(BUILT)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find $(wildcard rnnkern tests benchmarks tools) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove .venv too
	rm -rf $(VENV)

$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'rnnkern needs Python 3.10 or later; name one with make PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo 'this Python has no venv; on Debian: apt-get install python3-venv' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	$(PIP) install torch $(BUILD_REQUIRES) ruff clang-format
	@touch $@

$(BUILT): $(READY) $(NATIVE_SOURCES)
	$(PIP) install --no-build-isolation --editable '.[test,plot,progress,dev,ecosystem,examples]'
	@touch $@
