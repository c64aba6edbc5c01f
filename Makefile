# Every target installs what it needs into the virtual environment .venv, once.
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
# `make compare NATIVE=OFF` goes without the compiled kernel and needs no compiler.
NATIVE ?= ON
BIN := $(VENV)/bin
# Test processes, at most 8: each takes 1.3 GB. `make test WORKERS=0` runs the tests in one, where --pdb works.
WORKERS ?= auto
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --maxprocesses 8 --dist worksteal
SOURCES := pyproject.toml $(CONSTRAINTS) CMakeLists.txt $(wildcard csrc/*.* csrc/simd/*)
# Without --no-compile pip compiles every file of PyTorch, which takes as long as all else. The first import compiles too.
INSTALL = SKBUILD_CMAKE_DEFINE=THINNED_NATIVE=$(NATIVE) $(BIN)/python -m pip install --disable-pip-version-check \
  --no-compile --progress-bar off -c $(CONSTRAINTS) $(1) >$(VENV)/pip.log 2>&1 || { tail -n 40 $(VENV)/pip.log >&2; \
  echo "Setting up $(VENV) failed: above are the last lines of $(VENV)/pip.log. The next make tries again." >&2; exit 1; }

.PHONY: help setup compare test test-distributed test-torch test-slow sanitize lint bench bench-models bench-gpu check-gpu specialisations doctor clean
help:
	@echo "make compare    how three dropouts hold against the law of dropout"
	@echo "make test       the tests"
	@echo "make test-distributed  those of the tests that take 1, 2 and 4 processes, with a table of the placements that ran"
	@echo "make test-torch VERSION=2.11.0  the tests on that PyTorch, in an environment of its own"
	@echo "make test-slow  the long batteries"
	@echo "make sanitize   the kernel's own tests and a fuzz of its binding under ASan and UBSan"
	@echo "make lint       ruff and mypy"
	@echo "make bench      time against peers; appends to benchmarks/results.csv"
	@echo "make bench-models  time models of timm, torchvision and transformers whose DropPaths skip; in an environment of its own"
	@echo "make bench-gpu  time on a GPU against peers, and check the targets; without a GPU a dry run that saves nothing"
	@echo "make check-gpu  all that needs a GPU: doctor --verify, the tests marked gpu, bench-gpu"
	@echo "make specialisations  registers, spills and instructions of the GPU kernels, compiled without a GPU; some 10 minutes"
	@echo "make doctor     versions, backends, instruction sets, threads; ARGS=--verify compares the backends"

setup: $(VENV)/.tests

PYTHON_3 := $(shell sed -n 's/^requires-python = ">=3\.\([0-9]*\)".*/\1/p' pyproject.toml)
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, $(PYTHON_3)))' 2>/dev/null || { \
	  found=$$($(PYTHON) -V 2>&1) || found="not found"; \
	  echo "thinned needs Python 3.$(PYTHON_3) or later, and $(PYTHON) is $$found." \
	    "Name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@test $(NATIVE) = OFF && exit; \
	  for compiler in $${CXX:-c++ g++ clang++}; do command -v $$compiler >/dev/null && exit; done; \
	  echo "thinned's kernel needs a C++17 compiler, and $${CXX:-c++, g++, clang++} is not found." \
	    "Install one, or go without the kernel: make $(MAKECMDGOALS) NATIVE=OFF" >&2; exit 1
	@echo "Setting up $(VENV): PyTorch and thinned's kernel; 1 to 2 minutes the first time (CUDA's PyTorch takes longer)"
	@$(PYTHON) -m venv $(VENV) || { rm -f $@; exit 1; }

# thinned with its kernel, and the packages of its command.
$(VENV)/.command: $(BIN)/python $(SOURCES)
	@$(if $(wildcard $(VENV)/pip.log),echo "Updating $(VENV): thinned's kernel; about half a minute")
	@$(call INSTALL,-e '.[compare]')
	@touch $@

$(VENV)/.tests: $(VENV)/.command
	@echo "Adding what the tests need to $(VENV): transformers, lightning, ONNX and others; about 1 minute the first time"
	@$(call INSTALL,'thinned[dev]')
	@touch $@

$(VENV)/.bench: $(VENV)/.command
	@echo "Adding the packages that thinned is timed beside to $(VENV): JAX, timm and torchvision; about half a minute the first time"
	@$(call INSTALL,'thinned[bench]')
	@touch $@

compare: $(VENV)/.command
	$(BIN)/thinned compare $(ARGS)

doctor: $(VENV)/.command
	$(BIN)/thinned doctor $(ARGS)

test: $(VENV)/.tests
	$(PYTEST) -m "not slow" $(ARGS)

test-distributed: $(VENV)/.tests
	$(PYTEST) -m "not slow" tests/distributed $(ARGS)

test-torch:
	@test -n "$(VERSION)" || { echo "say which, as in: make test-torch VERSION=2.15.0"; exit 2; }
	@$(MAKE) .venv-torch-$(VERSION)/constraints.txt
	$(MAKE) test VENV=.venv-torch-$(VERSION) CONSTRAINTS=.venv-torch-$(VERSION)/constraints.txt

.venv-torch-%/constraints.txt:
	mkdir -p $(@D)
	echo torch==$* > $@

test-slow: $(VENV)/.tests
	$(PYTEST) -m slow $(ARGS)

sanitize: $(VENV)/.tests
	$(MAKE) -C csrc/tests run PYTHON=$(abspath $(BIN)/python)

lint: $(VENV)/.tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks $(ARGS)

# A torchvision whose compiled part fits its PyTorch.
bench-models: .venv-models/constraints.txt
	@$(MAKE) .venv-models/.tests VENV=.venv-models CONSTRAINTS=$<
	.venv-models/bin/python -m benchmarks.skip_models $(ARGS)

.venv-models/constraints.txt:
	mkdir -p $(@D)
	printf 'torch==2.14.1\ntorchvision==0.29.1\n' > $@

bench-gpu: $(VENV)/.tests
	$(BIN)/python -m benchmarks.gpu $(ARGS)

# Each part runs whatever became of those before it: a GPU may be there for minutes.
check-gpu: $(VENV)/.tests
	@failed=0; set -x; \
	  $(BIN)/thinned doctor --verify || failed=1; \
	  $(PYTEST) -m "gpu and not slow" --continue-on-collection-errors tests || failed=1; \
	  $(BIN)/python -m benchmarks.gpu $(ARGS) || failed=1; \
	  exit $$failed

specialisations: $(VENV)/.tests
	$(BIN)/python -m benchmarks.specialisations $(ARGS)

clean:
	rm -rf $(VENV) build dist
