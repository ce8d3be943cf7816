# planc: `make` lists what there is; everything runs from the virtual environment that `make setup` builds.

VENV := .venv
BIN := $(VENV)/bin
# The first interpreter that is new enough; `make setup PYTHON=...` names another.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
# Prompts, text and images for tests and benchmarks, beside the project; whatever needs them is skipped without them.
export PLANC_DATA ?= $(abspath ../shared/data)
MODEL ?= smollm2-135m
PLANS ?= examples/plain-int8.yaml examples/fast-cpu.yaml

.DEFAULT_GOAL := help
.PHONY: help setup demo test golden lint type format bench papers gpu clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.stamp  ## virtual environment with planc and all it needs (once)

# torch comes first and pinned: otherwise a dependency may pull in a build with CUDA libraries of several gigabytes.
$(VENV)/.stamp: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "planc needs Python 3.11 or newer; install it or say make setup PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[compile,dev]'
	@touch $@

demo: setup  ## generate text with the fast CPU plan (downloads a model of 93 MB once)
	$(BIN)/planc run examples/fast-cpu.yaml "Explain in three sentences why the sky is blue." --model $(MODEL)

test: setup  ## all tests; ARGS="-k name" narrows them down
	$(BIN)/pytest $(ARGS)

golden: setup  ## rewrite the golden files; the diff is the review
	$(BIN)/pytest --golden $(ARGS)

lint: setup  ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

type: setup  ## mypy, strict
	$(BIN)/mypy -p planc

format: setup  ## let ruff fix and format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: setup  ## paired speed of PLANS against the plain plan, on the prompts in PLANC_DATA
	$(BIN)/planc bench $(PLANS) --model $(MODEL) --prompts $(PLANC_DATA)/spec_bench/prompts.jsonl --limit 18

papers: setup  ## run the check of every method and rewrite the table in benchmarks/results
	$(BIN)/planc papers --run

gpu: setup  ## on a machine with a CUDA device: tests and times of the kernels
	$(BIN)/pytest -m gpu
	$(BIN)/pytest tests/backends/test_triton_kernels.py
	$(BIN)/python benchmarks/gpu.py

clean:  ## remove the environment and everything built (models in the cache stay)
	rm -rf $(VENV) build dist src/planc.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
