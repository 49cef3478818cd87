# Two commands matter: `make demo` and `make test`. Both set up everything they need.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: setup demo test test-slow lint format bench docs clean

setup: .venv/ready-dev

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "ldmlab needs Python 3.11 to 3.13; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv

.venv/ready: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing ldmlab and what it needs into .venv: about 6 GB, two to five minutes, once."
	$(PIP) --editable .
	@touch $@

.venv/ready-dev: .venv/ready
	$(PIP) --editable '.[dev]'
	@touch $@

.venv/ready-docs: .venv/ready
	$(PIP) --editable '.[docs]'
	@touch $@

demo: .venv/ready
	$(BIN)/ldmlab demo

test: .venv/ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

test-slow: .venv/ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist worksteal

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/ready-dev
	$(BIN)/python benchmarks/run.py

docs: .venv/ready-docs
	$(BIN)/python docs/site.py build/docs
	@echo "The site: build/docs/site/index.html. Its search needs a server: $(BIN)/python -m http.server -d build/docs/site"

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
