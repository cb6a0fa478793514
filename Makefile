# One command each, from nothing: a machine needs Python 3.10 or newer and make. `make help` lists them: a line that
# begins with ## says what the target below it does.
#
# The commands run in the active virtual environment, or in .venv, made on first use; with SYSTEM_PYTHON=1 (the Docker
# images) in the Python that is there, installing nothing.

PYTHON ?= python3
VENV := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),$(CURDIR)/.venv)
ifdef SYSTEM_PYTHON
BIN := $(patsubst %/,%,$(dir $(shell command -v $(PYTHON))))
INSTALLED :=
else
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.megatron-moe-lpr-installed
endif
TE_VENV := $(CURDIR)/.venv-te
SERVING := tests/serving
ENGINES := $(CURDIR)/.venv-vllm/.installed $(CURDIR)/.venv-llama-cpp/.installed $(CURDIR)/.venv-transformers4/.installed

export OMP_NUM_THREADS ?= 1

.PHONY: install help test test-te test-eval test-gpu test-serving test-docker lint clean

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

## Install, then run the tests on this machine's CPU; TESTS="FILE -k NAME" runs a part of them.
test: $(INSTALLED)
	$(BIN)/python -m pytest $(TESTS)

$(TE_VENV)/.installed: tests/transformer_engine/environment.sh setup.py constraints.txt
	bash tests/transformer_engine/environment.sh $(TE_VENV) $(PYTHON)
	@touch $@

## Run the GPU tests on an emulated device, without a GPU, in an environment of their own: .venv-te.
test-te: $(TE_VENV)/.installed
	$(TE_VENV)/bin/python -m pytest -p tests.emulation.plugin $(or $(TESTS),tests/emulation tests/transformer_engine tests/gpu)

# lm_eval brings fifty packages, 540 MB: the tests that need it (and pyarrow) are skipped by `make test` without them.
## Install lm_eval, then run the tests that need it.
test-eval: $(INSTALLED)
ifndef SYSTEM_PYTHON
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,eval]'
endif
	$(BIN)/python -m pytest $(or $(TESTS),tests/evaluation/benchmarks tests/data/test_hub.py tests/data/test_sources.py)

# As the Docker image's has; installs nothing.
## Run the GPU tests on GPUs, with the Python that has the real Transformer Engine.
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
## Try exports in vLLM, llama.cpp and transformers 4, in environments of their own.
test-serving: $(INSTALLED) $(ENGINES)
	$(BIN)/python -m tests.serving.compare --vllm .venv-vllm --llama-cpp .venv-llama-cpp \
		--transformers4 .venv-transformers4

# Needs root, buildah and mmdebstrap; docs/launching.md says on which bases it has run.
## Build the Docker images without a Docker engine, and try the demo and some tests in them.
test-docker:
	PYTHON=$(PYTHON) bash tests/docker/run.sh

## Check the code as CI does.
lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check megatron_moe_lpr tools tests benchmarks examples setup.py
	$(BIN)/mypy

## Remove the environments and what was built, not what was trained.
clean:
	rm -rf .venv .venv-te .venv-vllm .venv-llama-cpp .venv-transformers4 build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

include examples/demo/demo.mk
