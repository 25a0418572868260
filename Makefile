# Everything runs in .venv, which the first command sets up: with uv where it is installed, with pip otherwise.

RECIPE ?= recipes/quickstart.yaml
# key.path=value overrides of the recipe and --resume for `train`, pytest's arguments for `test`.
ARGS ?=
# A process for each GPU that PyTorch sees, rounded down to a power of two; one without GPUs.
NUM_PROCESSES ?= $(shell PATH="$(CURDIR)/$(BIN):$$PATH" launch/num_processes.sh)
# The interpreter of the virtual environment; unset, the first one found that is at least 3.11.
PYTHON ?=

BIN := .venv/bin
STAMP := .venv/.installed
# If `make` runs in two terminals at once, the second waits here, then finds the work done. (macOS has no flock.)
LOCK := $(if $(shell command -v flock),flock Makefile)
DOWNLOAD := the first time this downloads PyTorch, several GB on Linux

.DEFAULT_GOAL := help
.PHONY: help setup train test faults check format bench clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' $(firstword $(MAKEFILE_LIST)) | expand -t 10
	@echo "e.g. make train RECIPE=recipes/deeplab_iou.yaml NUM_PROCESSES=2 ARGS=\"optimizer.lr=1e-4 train.seed=1\""

setup: ## set up .venv and do nothing else
	@$(LOCK) $(MAKE) --no-print-directory --silent $(STAMP)

train: setup ## train RECIPE (default recipes/quickstart.yaml) with NUM_PROCESSES processes and ARGS
	$(BIN)/accelerate launch --config_file accelerate_config.yaml --num_processes $(NUM_PROCESSES) trainer/run.py $(RECIPE) $(ARGS)

test: setup ## run the tests, two at a time; ARGS go to pytest
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

faults: setup ## run the fault-injection tests at full length: about 20 minutes
	TRAINER_FAULTS=long $(BIN)/python -m pytest tests/faults tests/launch/test_slurm.py $(ARGS)

check: setup ## check lint, format, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: setup ## fix lint and format in place
	$(BIN)/ruff check --fix --exit-zero
	$(BIN)/ruff format

bench: setup ## run the benchmarks
	@for file in benchmarks/bench_*.py; do $(BIN)/python $$file $(ARGS) || exit; done

clean: ## remove .venv and caches; data and runs stay
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

# The environment is filled in place, so running make again continues an interrupted set-up: the stamp comes last.
$(STAMP): pyproject.toml constraints.txt
	@if command -v uv >/dev/null; then \
	    echo "setting up .venv with uv: $(DOWNLOAD)"; \
	    set -x && uv venv --quiet --allow-existing --python $(or $(PYTHON),'>=3.11') .venv && \
	    uv pip install --quiet --python .venv --constraint constraints.txt --editable '.[demo,detection,export,test,dev,bench]'; \
	else \
	    for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11); do \
	        $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; python=; \
	    done; \
	    if [ -z "$$python" ]; then \
	        echo "Python 3.11 or newer is needed, and none was found. If you have one: make setup PYTHON=/path/to/python3.11" >&2; exit 2; \
	    fi; \
	    echo "setting up .venv with pip: $(DOWNLOAD)"; \
	    set -x && $$python -m venv .venv && \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,detection,export,test,dev,bench]'; \
	fi
	@touch $@
