# Every target first makes .venv, which takes a moment only when its inputs have changed.

PRESET ?= small
SEED ?= 0
# Each run gets a directory of its own; naming an earlier one in OUT continues it.
OUT ?= runs/internal_rl/$(NOW)
ARGS ?=
# Test processes. One with WORKERS=0, which is right where they would share a GPU.
WORKERS ?= 2

NOW := $(shell date +%Y%m%d-%H%M%S)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PYTEST := $(BIN)/python -m pytest -n $(WORKERS)
FLAGSHIP = $(BIN)/python -m experiments.internal_rl --preset $(PRESET) --seed $(SEED) \
	--out $(OUT) $(if $(wildcard $(OUT)/*),--resume)

# Compiled programs outlive the process: a second run or test starts much sooner.
export JAX_COMPILATION_CACHE_DIR := $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS := 0.5

.PHONY: help setup gpu tpu run run-from-scratch format check style types fast test notebooks bench aot lock clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-18s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/.stamp ## make .venv from requirements.lock

.venv/.stamp: requirements.lock pyproject.toml
	@$(BIN)/python -c "" 2>/dev/null || { \
		python="$${PYTHON:-$$(.ci/find-python)}" && "$$python" -m venv --clear .venv; }
	@$(PIP) install --requirement requirements.lock
	@$(PIP) install --no-deps --editable .
	@touch $@

gpu: setup ## add the CUDA runtime to .venv
	$(PIP) install --constraint requirements.lock --editable ".[gpu]"

tpu: setup ## add the TPU runtime to .venv
	$(PIP) install --constraint requirements.lock --editable ".[tpu]"

run: setup ## the flagship experiment (PRESET, SEED, OUT, ARGS)
	$(FLAGSHIP) $(ARGS)

run-from-scratch: setup ## the same, without any shipped checkpoint
	$(FLAGSHIP) --from-scratch $(ARGS)

format: setup ## format the code and repair what the linter can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# Asked for both, `make check test` runs the fast tests once.
check: style types $(if $(filter test,$(MAKECMDGOALS)),,fast) ## format, lint, types, fast tests

style: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: setup
	$(BIN)/basedpyright

fast: setup
	$(PYTEST) -m "not slow" $(ARGS)

test: setup ## all tests (WORKERS, ARGS)
	$(PYTEST) $(ARGS)

notebooks: setup ## execute every notebook, leaving the files as they are
	$(BIN)/jupyter execute notebooks/*.ipynb

bench: setup ## time the models, kernels and RL on this device, without peers; long
	$(BIN)/python -m experiments.bench

# Each runtime has an environment of its own, of some 1.3 GB, so that .venv has neither.
AOT_tpu := "jax[tpu]"
AOT_gpu := "jax[cuda12-local]" nvidia-cuda-nvcc-cu12

aot: .cache/aot/tpu/.stamp .cache/aot/gpu/.stamp ## compile the kernels for TPUs and the H200, without either (ARGS)
	$(BIN)/python -m experiments.bench.aot $(ARGS)

.cache/aot/%/.stamp: requirements.lock | setup
	$(BIN)/python -m venv --clear $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check --quiet install --constraint requirements.lock $(AOT_$*)
	@touch $@

lock: ## rewrite requirements.lock with the newest versions that pyproject.toml allows
	@fresh="$$(mktemp -d)" && trap 'rm -rf "$$fresh"' EXIT && \
	"$${PYTHON:-$$(.ci/find-python)}" -m venv "$$fresh" && \
	"$$fresh/bin/pip" install --quiet --upgrade pip && \
	"$$fresh/bin/pip" install --quiet --editable . --group dev && \
	"$$fresh/bin/pip" freeze --exclude-editable > requirements.lock

clean: ## remove caches and bytecode; keeps .venv and runs
	rm -rf .cache dist
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
