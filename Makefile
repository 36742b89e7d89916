# Every target sets itself up: .venv is made once and again whenever the requirements change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# constraints.txt pins the versions that the tests run with, torch first of all.
# Modules are compiled when they are first imported: compiling all of torch takes over a minute.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile -c constraints.txt

# Where several processes share the cores, threads that spin while they wait cost minutes.
test slow soak check: export OMP_WAIT_POLICY ?= passive

.PHONY: demo test slow soak check docs clean format

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) -e ".[dev]"
	@touch $@

$(VENV)/.docs: $(VENV)/.run
	$(PIP) -e ".[docs]"
	@touch $@

# One thread: a second saves half a minute, and waits for many where another program has its core.
demo: $(VENV)/.run
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/eigendamage demo

# Without the examples of the documents, which check runs too.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto -m "not slow and not pages"

# Those that take long, which test and check leave out.
slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto -m slow

# Random compressions, one after another in one process: nothing breaks, nothing leaks.
soak: $(VENV)/.dev
	$(BIN)/python benchmarks/soak.py

check: $(VENV)/.dev $(VENV)/.docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m mkdocs build --strict --quiet --site-dir $(VENV)/site
	$(BIN)/python -m pytest -n auto

docs: $(VENV)/.docs
	$(BIN)/python -m mkdocs build --strict --site-dir site

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) site dist build .pytest_cache .ruff_cache
