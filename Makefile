# Every target sets up what it needs: a virtual environment in .venv and the compiled kernel in it.
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
# Test processes, at most 8: each takes 1.3 GB. `make test WORKERS=0` runs the tests in one, where --pdb works.
WORKERS ?= auto
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --maxprocesses 8 --dist worksteal
SOURCES := pyproject.toml $(CONSTRAINTS) CMakeLists.txt $(wildcard csrc/*) $(wildcard csrc/*/*)

.PHONY: help setup compare test test-torch test-slow sanitize lint bench doctor clean
help:
	@echo "make compare    how three dropouts hold against the law of dropout"
	@echo "make test       the tests"
	@echo "make test-torch VERSION=2.11.0  the tests on that PyTorch, in an environment of its own"
	@echo "make test-slow  the long batteries"
	@echo "make sanitize   the kernel's own tests and a fuzz of its binding under ASan and UBSan"
	@echo "make lint       ruff and mypy"
	@echo "make bench      time against peers; appends to benchmarks/results.csv"
	@echo "make doctor     versions, backends, instruction sets, threads"

setup: $(VENV)/.installed

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) torch numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

compare: setup
	$(BIN)/thinned compare $(ARGS)

doctor: setup
	$(BIN)/thinned doctor

test: setup
	$(PYTEST) -m "not slow" $(ARGS)

test-torch:
	@test -n "$(VERSION)" || { echo "say which, as in: make test-torch VERSION=2.15.0"; exit 2; }
	@$(MAKE) .venv-torch-$(VERSION)/constraints.txt
	$(MAKE) test VENV=.venv-torch-$(VERSION) CONSTRAINTS=.venv-torch-$(VERSION)/constraints.txt

.venv-torch-%/constraints.txt:
	mkdir -p $(@D)
	echo torch==$* > $@

test-slow: setup
	$(PYTEST) -m slow $(ARGS)

sanitize: setup
	$(MAKE) -C csrc/tests run PYTHON=$(abspath $(BIN)/python)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) build dist
