# One command each, from nothing: a machine needs Python 3.10 or newer and make.
#
#   make test            install, then run the tests on this machine's CPU
#   make test-te         the GPU tests on an emulated device, in an environment of their own, without a GPU
#   make test-gpu        the same tests on GPUs
#   make lint            ruff
#   make demo            the whole method on real text; make demo-baselines for what else one could do
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

export OMP_NUM_THREADS ?= 1

.PHONY: install test test-te test-gpu lint clean

install: $(INSTALLED)

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

test: $(INSTALLED)
	$(BIN)/python -m pytest $(TESTS)

$(TE_VENV)/.installed: tests/transformer_engine/environment.sh setup.py constraints.txt
	bash tests/transformer_engine/environment.sh $(TE_VENV) $(PYTHON)
	@touch $@

test-te: $(TE_VENV)/.installed
	$(TE_VENV)/bin/python -m pytest -p tests.emulation.plugin $(or $(TESTS),tests/emulation tests/transformer_engine tests/gpu)

# With the Python that has the real Transformer Engine, as the Docker image's has; installs nothing.
test-gpu:
	$(PYTHON) -m pytest -m gpu $(or $(TESTS),tests/gpu) -rs -s

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check megatron_moe_lpr tools tests benchmarks examples setup.py

clean:
	rm -rf .venv .venv-te build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

include examples/demo/demo.mk
