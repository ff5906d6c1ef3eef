# `make demo` and `make test` work as the first command in a fresh clone; they set up .venv themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
TEST_WORKERS ?= 2
# Of each test a few cases, and none that takes long; CASES=all for every one, as CI does.
CASES ?= few
# --required: fail where the oldest and the newest transformers cannot be had from the package index.
VERSIONS ?=

# One thread a process: pinned for reproducibility, and with xdist also the fastest.
THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# Tests make every model and text they need.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help setup demo test check regenerate format bench scale hooks clean

help:  ## List the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-17s%s\n", $$1, $$2}'

setup: $(STAMP)  ## Make .venv with everything in it (again when pyproject.toml or constraints.txt change)

# torch comes first and alone, so that a CPU wheel offered by the user's pip settings is taken as it is.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: PYTHON=…")'
	@echo "Setting up $(VENV); the first time this downloads torch and takes a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## Compress the embedded model three ways and compare, in two minutes
	$(BIN)/lrc demo

test: $(STAMP)  ## Run the tests, some on the oldest and newest transformers too (CASES=all: every case, half an hour)
	$(THREADS) $(OFFLINE) $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadgroup --cases $(CASES) $(PYTEST_OPTIONS)
	$(THREADS) $(OFFLINE) $(BIN)/python scripts/other_versions.py $(VERSIONS) -- -n $(TEST_WORKERS) --cases $(CASES)

check: $(STAMP)  ## Format, lint and types; the same in the git hook and in CI
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

# Arguments of scripts/regenerate.py: ARGS='--recipes auto,svd-llm', or ARGS=--write for a change that is meant.
ARGS ?=
regenerate: $(STAMP)  ## Make the checkpoint of every recipe again and compare every byte (ARGS=--write: expect these)
	$(THREADS) $(OFFLINE) $(BIN)/python scripts/regenerate.py $(ARGS)

format: $(STAMP)  ## Format the code and mend what ruff can mend
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format .

bench: $(STAMP)  ## Measure the tables of methods in docs/results.md anew and write it there (minutes)
	$(BIN)/python scripts/methods_table.py --write docs/results.md

scale: $(STAMP)  ## Measure how long compressing takes against its floor, and draw a chart (tens of minutes)
	$(BIN)/python scripts/bench_scale.py --parameters 0.3B --chart runs/scale.png --json runs/scale.json

hooks:  ## Run `make check` before every commit
	git config core.hooksPath .githooks

clean:  ## Remove .venv, runs and caches
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest runs build dist .pytest_cache .ruff_cache .hypothesis
