# The same few commands for people and for CI. `make setup` runs by itself where a target needs it.
#
#   PYTHON=/path/to/python  make the environment with that interpreter (3.11 or newer)
#   PIP_FLAGS="..."         further options of pip install, such as an index of CPU-only torch wheels

VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PYTHONS := python3.11 python3.12 python3.13 python3
PIP_FLAGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench

help:
	@echo 'make setup   make .venv and install what constraints.txt pins'
	@echo 'make demo    plan, serve mixed traffic in virtual time, run a tiny model on this CPU'
	@echo 'make test    all tests that a CPU can run'
	@echo 'make check   format, lint, types, architecture, output in the README'
	@echo 'make bench   benchmarks'

setup: $(STAMP)

# An environment that is there and recent enough is kept; half-made or outdated ones are made anew.
# A candidate must be able to make environments: Debian ships python3 without ensurepip.
$(STAMP): pyproject.toml constraints.txt
	@if ! $(RUN) -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    for python in $(or $(PYTHON),$(PYTHONS)); do \
	        "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	            2>/dev/null || continue; \
	        echo "making $(VENV) with $$($$python --version)"; \
	        "$$python" -m venv --clear $(VENV) && break; \
	    done; \
	    $(RUN) -c 'import pip' 2>/dev/null || { \
	        echo 'no python >= 3.11 with venv and ensurepip found (tried: $(or $(PYTHON),$(PYTHONS)));' \
	            'install one (on Debian python3 and python3-venv), or name it: make setup PYTHON=...' >&2; \
	        exit 1; \
	    }; \
	fi
	$(RUN) -m pip install --disable-pip-version-check --quiet $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(RUN) bench/demo.py

test: setup
	$(RUN) -m pytest

check: setup
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(RUN) -m pytest -q tests/test_architecture.py
	$(RUN) bench/readme.py --check

bench: setup
	$(RUN) -m pytest bench/ --benchmark-only
