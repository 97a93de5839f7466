# Everything is installed into .venv; the second time nothing is.
#
#   make quickstart PYTHON=python3.12         another Python than python3
#   make test PYTEST_FLAGS="-k gemma"         some tests, in one process; without, two processes share the files
#   make test PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#       torch without CUDA: constraints.txt pins torch==2.13.0, and pip prefers the CPU build wherever it sees one
#       (that index, or a wheel in its find-links).  Where it sees none it takes PyPI's, with gigabytes of CUDA.
#       Training needs no torch: `make quickstart` installs none.

PYTHON ?= python3
PIP_FLAGS ?=
PYTEST_FLAGS ?= -n 2 --dist loadfile
PY := .venv/bin/python
INSTALL = $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)

.PHONY: help quickstart test test-slow lint types check format
.NOTPARALLEL:

help:
	@echo "make quickstart   installs jaxtune and trains the embedded model (configs/quickstart.py)"
	@echo "make test         installs what the tests need and runs them; make test-slow: those that take minutes"
	@echo "make check        ruff, pyright and the tests; CI runs this and test-slow"
	@echo "make format       puts the code into the form that make check wants"

quickstart: .venv/.run
	$(PY) -m jaxtune.train --config configs/quickstart.py

test: .venv/.test
	$(PY) -m pytest -m "not slow" $(PYTEST_FLAGS)

test-slow: .venv/.test
	$(PY) -m pytest -m slow $(PYTEST_FLAGS)

lint: .venv/.test
	$(PY) -m ruff check
	$(PY) -m ruff format --check

types: .venv/.test
	$(PY) -m pyright --pythonpath $(PY)

check: lint types test

format: .venv/.test
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

# A half-made environment would look like a whole one the next time, so it is removed.
$(PY):
	@$(PYTHON) -c "import sys; v = sys.version_info; v >= (3, 11) or sys.exit('jaxtune needs Python 3.11 or newer; \
	$(PYTHON) is %d.%d. Name another: make PYTHON=python3.12 ...' % v[:2])"
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/.run: pyproject.toml constraints.txt | $(PY)
	@echo "Installing jaxtune and jax into .venv: one to three minutes"
	$(INSTALL) -e .
	@touch $@

.venv/.test: pyproject.toml constraints.txt | $(PY)
	@echo "Installing jaxtune and what its tests compare with into .venv: two to five minutes"
	$(INSTALL) -e ".[test]"
	@touch $@ .venv/.run
