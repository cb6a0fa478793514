# `make help` lists the targets: a line that begins with ## describes the target below it. A machine needs make and
# Python 3.10 or newer.
#
# Commands run in the active virtual environment, or else in .venv, made on first use. With SYSTEM_PYTHON=1 (the Docker
# images) they run in the Python that is there, and nothing is installed.

PYTHON ?= python3
VENV := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),$(CURDIR)/.venv)
ifdef SYSTEM_PYTHON
BIN := $(patsubst %/,%,$(dir $(shell command -v $(PYTHON))))
INSTALLED :=
else
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.megatron-moe-lpr-installed
endif
# Versions that the emulation knows are the names in tests/emulation/tables; 2.20 stands for the one of 2.20.
TE_VERSION ?= 2.11.0
TE_TABLES := tests/emulation/tables/$(TE_VERSION)
TE_TABLE := $(basename $(notdir $(firstword $(wildcard $(TE_TABLES).txt $(TE_TABLES).*.txt))))
TE_VENV := $(CURDIR)/.venv-te$(if $(filter 2.11.0,$(TE_TABLE)),,-$(or $(TE_TABLE),$(TE_VERSION)))
NEXT_VENV := $(CURDIR)/.venv-next$(if $(NEXT_PYTHON),-$(notdir $(NEXT_PYTHON)))
# What touches Megatron-Core: layouts and their gradients, checkpoints, conversion, frozen bits, evaluation, the launcher.
NEXT_TESTS := tests/next tests/megatron tests/test_contributing.py tests/platform tests/parallel tests/model \
	tests/checkpoint tests/conversion/test_parity.py tests/conversion/test_round_trip.py tests/training/test_layouts.py \
	tests/training/test_checkpointing.py tests/training/test_frozen_bits.py tests/training/test_evaluating.py \
	tests/training/test_damage.py tests/training/test_documents.py tests/training/run_directory/test_resuming.py \
	tests/launching/test_launcher.py
SERVING := tests/serving
ENGINES := $(CURDIR)/.venv-vllm/.installed $(CURDIR)/.venv-llama-cpp/.installed $(CURDIR)/.venv-transformers4/.installed

export OMP_NUM_THREADS ?= 1

.PHONY: install help test test-te test-next test-eval test-gpu test-serving test-docker lint clean

## Install the package and what its tests need into the active virtual environment, or into .venv.
install: $(INSTALLED)

## List the targets.
help:
	@awk '/^## / { line = substr($$0, 4); next } \
		line && match($$0, /^[a-z][a-z0-9-]*:/) { printf "make %-16s %s\n", substr($$0, 1, RLENGTH - 1), line } \
		{ line = "" }' $(MAKEFILE_LIST)

ifndef SYSTEM_PYTHON
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is older than Python 3.10; pass PYTHON=/path/to/python3.10" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "error: $(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv" >&2; exit 1; }

$(INSTALLED): setup.py pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@
endif

# Two files at a time: with one, a core of two waits a third of the time. A part is run in one process, so that -s prints.
JOBS ?= $(if $(TESTS),0,2)
ORDER ?= -p tests.slowest_first

## Install, then test on the CPU; TESTS="FILE -k NAME" for a part, ORDER=--random-order to shuffle.
test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ORDER) $(TESTS)

$(TE_VENV)/.installed: tests/transformer_engine/environment.sh setup.py constraints.txt
	TE_VERSION=$(TE_VERSION) bash tests/transformer_engine/environment.sh $(TE_VENV) $(PYTHON)
	@touch $@

# Another version of Transformer Engine has its own environment: TE_VERSION=2.20 that of .venv-te-2.20.2.
## Run the GPU tests on an emulated device; with TE_VERSION=2.20 on that Transformer Engine.
test-te: $(TE_VENV)/.installed
	$(TE_VENV)/bin/python -m pytest -p tests.emulation.plugin $(or $(TESTS),tests/emulation tests/transformer_engine tests/gpu)

$(NEXT_VENV)/.installed: tests/next/environment.sh tests/next/torch.sh tests/next/stand_ins.py setup.py constraints.txt
	bash tests/next/environment.sh $(NEXT_VENV) "$$(NEXT_PYTHON=$(NEXT_PYTHON) bash tests/next/python.sh)"
	@touch $@

# NEXT_PYTHON=python3.13 takes another Python, and an environment of its own.
## Run what touches Megatron on Python 3.12 and megatron-core 0.19, in .venv-next.
test-next: $(NEXT_VENV)/.installed
	$(NEXT_VENV)/bin/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ORDER) \
		$(or $(TESTS),$(NEXT_TESTS))

# lm_eval brings fifty packages, 540 MB: the tests that need it (and pyarrow) are skipped by `make test` without them.
## Install lm_eval (540 MB), then run the tests that need it.
test-eval: $(INSTALLED)
ifndef SYSTEM_PYTHON
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,eval]'
endif
	$(BIN)/python -m pytest $(or $(TESTS),tests/evaluation/lm_eval tests/data/preparation/test_hub.py tests/data/preparation/test_sources.py)

# Those of Transformer Engine are skipped where it is missing.
## Run the GPU tests on GPUs, of NVIDIA or AMD; installs nothing.
test-gpu:
	$(PYTHON) -m pytest -m gpu $(or $(TESTS),tests/gpu) -rs -s

$(CURDIR)/.venv-vllm/.installed: $(SERVING)/vllm.sh
	bash $(SERVING)/vllm.sh $(@D) $(PYTHON)
	@touch $@

$(CURDIR)/.venv-llama-cpp/.installed: $(SERVING)/llama_cpp.sh constraints.txt
	bash $(SERVING)/llama_cpp.sh $(@D) $(PYTHON)
	@touch $@

$(CURDIR)/.venv-transformers4/.installed: $(SERVING)/transformers4.sh
	bash $(SERVING)/transformers4.sh $(@D) $(PYTHON)
	@touch $@

# Engines on the loopback interface against transformers and Megatron; docs/serving.md has the last output.
## Compare exports in vLLM, llama.cpp and transformers 4, each in its own environment.
test-serving: $(INSTALLED) $(ENGINES)
	$(BIN)/python -m tests.serving.compare --vllm .venv-vllm --llama-cpp .venv-llama-cpp \
		--transformers4 .venv-transformers4

# Needs root, buildah and mmdebstrap; docs/launching.md says on which bases it has run.
## Build the Docker images without a Docker engine, and try the demo and some tests in them.
test-docker:
	PYTHON=$(PYTHON) bash tests/docker/run.sh

## Check style and types as CI does.
lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check megatron_moe_lpr tools tests benchmarks examples setup.py
	$(BIN)/mypy

## Remove environments and builds; keep what was trained in runs/.
clean:
	rm -rf .venv .venv-te .venv-te-2.* .venv-next* .venv-vllm .venv-llama-cpp .venv-transformers4 build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

include examples/demo/demo.mk
include examples/real/real.mk
