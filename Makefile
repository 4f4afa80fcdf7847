# Every target sets up what it needs and no more: a virtual environment in .venv, the packages of
# its dependency groups (pyproject.toml) in the versions that constraints.txt pins, and a build of
# the extension beside its sources. Stamp files in .venv keep the second run from doing it again.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip
PYTEST := $(BIN)/pytest
# The tests in as many processes as there are CPUs.
SPREAD := -n logical --maxprocesses 8 --dist worksteal

export PATH := $(abspath $(BIN)):$(PATH)

NATIVE_SOURCES := $(shell find csrc cmake -type f 2>/dev/null) CMakeLists.txt setup.py
FORMATTED      := $(shell find csrc tests benchmarks -type f 2>/dev/null | grep -E '\.(cpp|h|cu|cuh)$$')

# The pins hold for every pip below; an isolated build takes them as --build-constraint.
export PIP_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Python compiles what it imports, and most of torch is never imported: half a minute saved.
export PIP_NO_COMPILE := 1

# What a target needs, as prerequisites.
READY      := $(VENV)/.ready
WITH_TORCH := $(VENV)/.torch
NATIVE     := $(VENV)/.built-native
BUILT      := $(VENV)/.built-all
group       = $(VENV)/.group-$(1)
TOLD       := $(VENV)/.told
TESTS      := $(NATIVE) $(call group,test)
# For what builds the extension a second time, in another way, and tests that.
TESTS_ALONE := $(WITH_TORCH) $(call group,test)

define build_wheels
$(BIN)/python tools/build_wheels.py --cuda $(1) $(ARGS)
endef

SETTINGS := RNNKERN_CUDA=$(RNNKERN_CUDA) CUDAARCHS=$(CUDAARCHS) EXCHANGE=$(RNNKERN_CUDA_EXCHANGE).

# The extension, with the lines of ninja as they come.
define build
@echo 'Compiling the kernels for $(1): some minutes the first time'
@rm -f $(TOLD)
@RNNKERN_INSTRUCTION_SETS=$(2) $(BIN)/python setup.py --quiet build_ext --inplace
@echo '$(SETTINGS)' > $(TOLD)
endef

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install compare test test-ecosystem test-machines test-torch bench bench-smoke report \
  docs lint format wheels wheels-cuda test-aarch64 sanitize cuda-check cuda-sanitize simt ptx \
  toy-cell own-cells simt-coverage clean distclean FORCE

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile
	@echo
	@echo '  ARGS="..." is handed on to the program; PYTHON=... is the interpreter that makes .venv.'

install: $(BUILT)  ## set up .venv and build the package in it, for every CPU, nothing more

compare: $(NATIVE) $(call group,progress)  ## check and time against torch.nn (ARGS=--quick: under 20 s)
compare: $(if $(findstring --plot,$(ARGS)),$(call group,plot))
	$(BIN)/rnnkern compare $(ARGS)

test: $(TESTS)  ## run the tests (ARGS="-k lstm": some of them)
	$(PYTEST) tests $(SPREAD) $(ARGS)

test-ecosystem: $(TESTS) $(call group,ecosystem)  ## run the tests in the models of other packages
	$(PYTEST) tests -m ecosystem $(ARGS)

test-machines: $(BUILT) $(TESTS)  ## run the tests as on other machines (PART=0 to 80: a third of the files, each on one)
	$(BIN)/python tools/test_machines.py $(if $(PART),--part $(PART)) $(SPREAD) $(ARGS)

ifeq ($(filter test-torch,$(MAKECMDGOALS))$(TORCH),test-torch)
$(error test-torch: want TORCH=VERSION, such as TORCH=2.12.1)
endif
test-torch: $(TESTS)  ## run the tests with another torch (TORCH=2.12.1), in an environment of its own
	sh tools/test_torch.sh $(BIN)/python $(TORCH) $(SPREAD) $(ARGS)

bench: $(TESTS)  ## run the benchmarks (ARGS="-k notebook": some of them)
	$(PYTEST) benchmarks --benchmark-only $(ARGS)

report: $(NATIVE) $(call group,peers)  ## measure beside ONNX Runtime and OpenVINO, write docs/benchmarks.md
	$(BIN)/python -m benchmarks.report $(ARGS)

# One thread each, because processes that all have a thread for every CPU wait for one another.
bench-smoke: $(TESTS)  ## run every benchmark once, untimed: its check and its code
	OMP_NUM_THREADS=1 $(PYTEST) benchmarks $(SPREAD) --benchmark-disable $(ARGS)

docs: $(NATIVE) $(call group,docs)  ## build README.md and docs/ as a site in build/site; a broken link is an error
	$(BIN)/python tools/build_docs.py $(ARGS)

lint: $(WITH_TORCH) $(call group,lint)  ## ruff, mypy, clang-format and the workflow's linters, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(FORMATTED),$(BIN)/clang-format --dry-run -Werror $(FORMATTED))
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --quiet --offline --strict-collection .github

format: $(call group,lint)  ## format Python and C++, and apply ruff's safe fixes
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(if $(FORMATTED),$(BIN)/clang-format -i $(FORMATTED))

wheels: $(call group,wheels)  ## build the CPU's wheel, prove it without a compiler, index it in dist/
	$(call build_wheels,cpu)

wheels-cuda: $(call group,wheels)  ## the same for CUDA, in an hour: needs no nvcc (ARGS="--torch 2.13.0 2.12.1")
	$(call build_wheels,13.0 13.2)

test-aarch64: $(call group,build)  ## check the CPU kernels on AArch64 under QEMU (ARGS=native: on this CPU)
	sh tools/aarch64.sh $(ARGS)

sanitize: $(TESTS_ALONE)  ## run the kernel tests under the address and undefined-behaviour sanitizers (PART=0 to 5: a sixth)
	sh tools/sanitize.sh $(BIN)/python $(or $(PART),all) $(SPREAD) $(ARGS)

cuda-check: $(TESTS_ALONE) $(call group,cuda-check)  ## compile the CUDA kernels (CUDAARCHS=90a-real: for one target), read their machine code
	sh tools/cuda_check.sh $(BIN)/python $(or $(PART),all) $(SPREAD) $(ARGS)

cuda-sanitize: $(TESTS)  ## tests on a GPU under compute-sanitizer's memcheck and racecheck
	sh tools/cuda_sanitize.sh $(BIN)/python $(ARGS)

simt: $(TESTS_ALONE)  ## run kernel tests on the CUDA kernels, on a stand-in for the GPU (PART=0, 1: a half)
	sh tools/simt.sh $(BIN)/python $(or $(PART),all) $(SPREAD) $(ARGS)

ptx: $(TESTS_ALONE)  ## test nvcc's PTX of the CUDA kernels on that stand-in; needs nvcc (PART=0 to 3: a quarter of it)
	sh tools/ptx.sh $(BIN)/python $(or $(PART),all) $(SPREAD) $(ARGS)

toy-cell: $(WITH_TORCH) $(call group,test)  ## add a cell to a copy of the sources and test it there (PART=0, 1: on the CPU, the stand-in)
	$(BIN)/python tools/toy_cell.py $(if $(PART),--part $(PART)) $(SPREAD) $(ARGS)

own-cells: $(TESTS)  ## run the kernel tests on three cells that are written in Python
	PYTHONPATH=tests:tests/own_cells RNNKERN_CACHE=build/cells $(PYTEST) -p three_cells -m kernel \
	  -k "Own and not autocast" tests/test_sequences.py tests/test_modules.py tests/test_numerics.py \
	  tests/test_16bit.py tests/test_second_order.py $(SPREAD) $(ARGS)

simt-coverage: $(TESTS) $(call group,coverage)  ## which lines of the CUDA kernels the tests on the stand-in run
	sh tools/simt_coverage.sh $(BIN)/python

clean:  ## remove what was built, keep .venv
	rm -rf build dist *.egg-info rnnkern/_C*.so $(NATIVE) $(BUILT) $(TOLD)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find $(wildcard rnnkern tests benchmarks tools) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove .venv too
	rm -rf $(VENV)

$(READY): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'rnnkern needs Python 3.10 or later; name one with make PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo 'this Python has no venv; on Debian: apt-get install python3-venv' >&2; exit 1; }
	@echo 'Setting up $(VENV)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -qq --upgrade pip
	@touch $@

$(WITH_TORCH): $(call group,build)
	@echo 'Installing torch: a download of some gigabytes'
	@$(PIP) install -qq torch numpy
	@RNNKERN_WITHOUT_EXTENSION=1 PYTHONWARNINGS=ignore $(PIP) install -qq --no-build-isolation --no-deps --editable .
	@touch $@

$(VENV)/.group-%: $(READY) pyproject.toml
	@echo 'Installing the packages of the group $*'
	@$(PIP) install -qq --group $*
	@touch $@

# If something is said about CUDA, and the last build was told something else, it is built again.
ifneq ($(RNNKERN_CUDA)$(CUDAARCHS)$(RNNKERN_CUDA_EXCHANGE),)
ifneq ($(SETTINGS),$(shell cat $(TOLD) 2>/dev/null))
NATIVE_SOURCES += FORCE
endif
endif

# The kernels for the CPU at hand take a third of the time of all, and they are all that timing and
# the tests need. Once all have been built, all are built again.
ifeq ($(wildcard $(BUILT)),)
$(NATIVE): $(WITH_TORCH) $(NATIVE_SOURCES)
	$(call build,this CPU,native)
	@touch $@
else
$(NATIVE): $(BUILT)
endif

$(BUILT): $(WITH_TORCH) $(NATIVE_SOURCES)
	$(call build,every CPU,all)
	@touch $(NATIVE) $@
