# `make lab` opens the first lesson. `make test` runs all checks of a normal day; `make quick` only the fast ones.
# Each command installs what it needs, once.
#
# PYTHON   the Python interpreter to use (3.11 or newer)
# PIP_ARGS further arguments for pip, for example the index of PyTorch's CPU-only builds (see the README)
# WORKERS  number of test processes, each with its own browser and Jupyter server (2 GB)
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
LAB_STAMP := $(VENV)/.lab-is-installed
TEST_STAMP := $(VENV)/.test-is-installed
REQUIREMENTS := pyproject.toml constraints.txt $(wildcard moe_edu/kernels/csrc/*)

# One worker runs a whole file, so that fixtures and kernels are made once; the longest files start first.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: lab test quick nightly screenshots gpu lint notebooks site clean

lab: $(LAB_STAMP)
	$(BIN)/moe-edu lab

test: $(TEST_STAMP) lint
	$(PYTEST) --nbval -m "not nightly and not screenshots" tests notebooks

# Style, types, and the tests that need no browser, notebook or training run.
quick: $(TEST_STAMP) lint
	$(PYTEST) -m "not slow and not nightly" tests

# Everything, including trainings that take minutes, and every lesson in every environment.
nightly: $(TEST_STAMP) lint
	$(PYTEST) --nbval -m "not screenshots" tests notebooks

# Pictures of every lesson in JupyterLab, in light and dark, at two widths, saved in build/screenshots.
screenshots: $(TEST_STAMP)
	$(PYTEST) -m screenshots tests/browser

# On a machine with an NVIDIA GPU: run the GPU tests, then print the benchmark's table and save it as data and picture.
gpu: $(TEST_STAMP)
	$(BIN)/python -m pytest -m gpu
	mkdir -p build
	$(BIN)/moe-edu bench gpu --json build/gpu.json --plot build/gpu.svg

lint: $(TEST_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/oxlint --quiet moe_edu/explorers/static docs/static
	$(BIN)/clang-format --dry-run -Werror moe_edu/kernels/csrc/*

# Run every notebook from top to bottom and save it with its outputs, without widget state.
notebooks: $(TEST_STAMP)
	$(BIN)/python -m moe_edu.lessons.execute notebooks/*.ipynb

# Build a static site in build/site, which opens from disk, without a network or a kernel.
site: $(TEST_STAMP)
	$(BIN)/python docs/build.py build/site

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "moe_edu needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(LAB_STAMP): $(BIN)/python $(REQUIREMENTS)
	$(BIN)/python -m pip install $(PIP_ARGS) --quiet -c constraints.txt -e ".[lab]"
	touch $@

$(TEST_STAMP): $(BIN)/python $(REQUIREMENTS)
	$(BIN)/python -m pip install $(PIP_ARGS) --quiet -c constraints.txt -e ".[lab,site,test]"
	touch $@ $(LAB_STAMP)
