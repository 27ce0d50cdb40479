# Every target sets up what it needs in .venv and reuses it on the next call.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= auto

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-page lint bench bench-serve soak soak-train pods pods-check pods-gpu ci clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.core  ## a Qwen3 thinks and answers, from the checkpoint in the package
	$(BIN)/qwen3-jax demo

test: $(VENV)/.test  ## the default test suite, against live PyTorch
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q

test-slow: $(VENV)/.test  ## the tests that take minutes or gigabytes, every program compiled as for users
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -m 'slow or users_programs' -q

pods-check: $(VENV)/.test  ## compile serving's steps for TPU slices that need not exist, and look at the programs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[tpu]'
	$(BIN)/python -m pytest -m tpu tests/test_plan_tpu.py -q

pods-gpu: $(VENV)/.test  ## kernels and plans for H100s; installs several GB of wheels
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cuda]'
	$(BIN)/python -m pytest tests/test_ops_moe.py tests/test_ops_paged.py -k h100 -q
	$(BIN)/python scripts/pods.py --only H100

pods: pods-check  ## compile for TPU slices that need not exist: the checks, then the tables
	$(BIN)/python scripts/pods.py
	$(BIN)/python scripts/pods.py --train

bench-serve: $(VENV)/.test  ## the engine under load, against transformers and against itself without batching
	$(BIN)/python scripts/bench_serve.py

soak: $(VENV)/.test  ## the server's faults S1 to S10, against a live server; 15 minutes
	$(BIN)/python scripts/soak_serve.py

soak-train: $(VENV)/.test  ## the training's faults T1 to T11: kills, flips, full disks; 20 minutes
	$(BIN)/python scripts/soak_train.py

test-page: $(VENV)/.test  ## the chat page in a headless Chromium, installed if need be
	command -v chromium || apt-get install --yes --no-install-recommends chromium
	$(BIN)/python -m pytest tests/test_page.py -m 'slow or not slow' -q

lint: $(VENV)/.test  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

bench: $(VENV)/.test  ## speed on this machine, side by side with transformers
	$(BIN)/python scripts/bench_cpu.py

ci: lint test demo pods-check  ## what a change must pass

clean:  ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis

$(VENV)/.core: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Python %d.%d is too old: set PYTHON to 3.11 or newer" % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.test: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,lint]'
	touch $@
