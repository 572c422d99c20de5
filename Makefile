# Everything runs in .venv with the versions of constraints.txt; nothing is installed by hand.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install -qq --disable-pip-version-check --no-input -c constraints.txt

.PHONY: help install install-dev quickstart cluster-demo lint test test-faults test-gpu reliability bench clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing raydist into $(VENV) (once)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing what the tests need"
	@$(PIP) -e '.[dev]'
	@touch $@

install: $(VENV)/.installed  ## install raydist into .venv

install-dev: $(VENV)/.installed-dev  ## install raydist and what its tests need

quickstart: $(VENV)/.installed  ## prepare real text, train, track, pull and sample on this machine
	@$(BIN)/python jobs/quickstart.py

$(VENV)/.installed-demo: $(VENV)/.installed
	@$(PIP) -e '.[demo]'
	@touch $@

cluster-demo: $(VENV)/.installed-demo  ## three Ray nodes, S3 and MLflow servers here: submit, kill a node, finish, pull
	@$(BIN)/python jobs/cluster_demo.py

lint: $(VENV)/.installed-dev  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

test: lint  ## lint, types and every test that needs no GPU
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup -m "not slow and not gpu and not ray"
	@OMP_NUM_THREADS=1 $(BIN)/pytest --maxfail 3 -m "ray and not slow and not gpu"

test-faults: $(VENV)/.installed-dev  ## kill workers in the middle of real runs (minutes; the quick fault tests are part of make test)
	@OMP_NUM_THREADS=1 $(BIN)/pytest tests/faults --maxfail 3 -m "slow and not gpu"

test-gpu: $(VENV)/.installed-dev  ## the tests that need a CUDA device
	@$(BIN)/pytest -m gpu

reliability: $(VENV)/.installed-dev  ## all fault tests, and the table of docs/reliability.md from what they recorded
	@rm -f runs/faults.jsonl
	@OMP_NUM_THREADS=1 RAYDIST_FAULT_RECORDS=runs/faults.jsonl $(BIN)/pytest tests/faults --ignore tests/faults/test_page.py -m "not gpu"
	@$(BIN)/python benchmarks/reliability.py runs/faults.jsonl

bench: $(VENV)/.installed-dev  ## measure against the peers; writes benchmarks/results/
	@$(BIN)/python benchmarks/step.py
	@$(BIN)/python benchmarks/loader.py
	@$(BIN)/python benchmarks/samplers.py
	@$(BIN)/python benchmarks/alignment.py
	@$(BIN)/python benchmarks/resample_synthetic.py
	@$(BIN)/python benchmarks/sweep_overhead.py
	@$(BIN)/python benchmarks/ready_sweeps.py
	@$(BIN)/python benchmarks/checkpoint.py
	@$(BIN)/python benchmarks/goodput.py

clean:  ## remove what the quickstart made (not .venv)
	@rm -rf runs/quickstart runs/data build dist
