# On a machine with Python >= 3.10 and make, every target sets up .venv by itself; the second time it is there already.
#
#   make demo     train on the embedded tiny world and show the result; no download of weights or data
#   make test     the tests
#   make check    what has to pass before a change is merged: lint, types, tests
#
# PYTHON=python3.12           another interpreter for .venv
# PIP_FLAGS="..."             more arguments for pip install
# ARGS="..."                  more arguments for the demo or for pytest

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
ARGS ?=
BIN := $(VENV)/bin

# A stamp is younger than pyproject.toml exactly if the environment was made from it.
MADE := $(VENV)/.made
RUN := $(VENV)/.installed
DEV := $(VENV)/.installed-dev

.PHONY: demo test lint types check format reference wheel clean help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed -n '1,9p'

demo: $(RUN)
	$(BIN)/diffalign demo $(ARGS)

# Two processes, one thread and about 2 GB each; a file stays in one of them, for what its tests share. ARGS="-n 0" is one.
test: $(DEV)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(DEV)
	$(BIN)/mypy

check: lint types test

format: $(DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# docs/reference/config.md and components.md, from the docstrings
reference: $(DEV)
	$(BIN)/python scripts/generate_reference.py

wheel: $(DEV)
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache

# Its own stamp: an interrupted set-up leaves an interpreter without pip behind, and is done again.
$(MADE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "make: $(PYTHON) is missing or older than Python 3.10; name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@

$(RUN): pyproject.toml | $(MADE)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -e .
	@touch $@

# The development environment holds everything that the demo needs, too.
$(DEV): pyproject.toml | $(MADE)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -e '.[dev]'
	@touch $(RUN) $@
