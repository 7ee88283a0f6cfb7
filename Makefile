# Every target sets up what it needs. `make demo` and `make test` are the two that a new machine starts with.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
# The repository's root holds folders called kernels, train and profiling: none of them may be importable by its bare name.
export PYTHONSAFEPATH := 1

.PHONY: setup demo test test-native test-slow check bench gpu-suite clean

setup: .venv/installed

.venv/installed: pyproject.toml setup.py CMakeLists.txt tools/setup.sh $(wildcard csrc/*)
	tools/setup.sh $(PYTHON)
	touch $@

demo: setup
	$(BIN)/opensora-fast demo --out runs/demo

# One thread for each of the two processes: more would only wait for each other.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-native: setup
	tools/test_native.sh
	$(BIN)/python -m pytest tests/kernels

test-slow: setup
	$(BIN)/python -m pytest -m slow

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) test

bench: setup
	$(BIN)/opensora-fast bench

# On a bare GPU machine: no setup, no git, no network. make gpu-suite OUT=folder [COMMIT=name] [SUITE_ARGS="--device cpu"]
OUT ?= runs/gpu-suite
SUITE_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu-suite:
	PYTHONPATH=.typecheck $(SUITE_PYTHON) -m opensora_fast.profiling.suite --out $(OUT) $(if $(COMMIT),--commit "$(COMMIT)") $(SUITE_ARGS)

clean:
	rm -rf .venv build runs opensora_fast.egg-info opensora_fast/_C*.so
	find . -name __pycache__ -prune -exec rm -rf {} +
