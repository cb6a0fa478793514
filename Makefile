# One command each, from nothing: a machine needs Python 3.10 or newer and make.
#
#   make test     install, then run the tests on this machine's CPU
#   make lint     ruff
#   make demo     the whole method on real text
#
# The commands run in the active virtual environment, or in .venv, made on first use.

PYTHON ?= python3
VENV := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),$(CURDIR)/.venv)
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.megatron-moe-lpr-installed

export OMP_NUM_THREADS ?= 1

.PHONY: install test lint clean

install: $(INSTALLED)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is older than Python 3.10; pass PYTHON=/path/to/python3.10" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "error: $(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv" >&2; exit 1; }

$(INSTALLED): setup.py pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

test: $(INSTALLED)
	$(BIN)/python -m pytest $(TESTS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check megatron_moe_lpr tools tests benchmarks setup.py

clean:
	rm -rf .venv build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

include examples/demo/demo.mk
