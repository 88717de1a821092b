# `make lab` opens the first lesson; `make test` proves that everything works. Both set up what they need, once.
#
# PYTHON   the interpreter to start from (3.11 or newer)
# PIP_ARGS further arguments for pip, for example the index of PyTorch's CPU-only builds (see the README)
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=

BIN := $(VENV)/bin
LAB_STAMP := $(VENV)/.lab-is-installed
TEST_STAMP := $(VENV)/.test-is-installed
REQUIREMENTS := pyproject.toml constraints.txt $(wildcard moe_edu/kernels/csrc/*)

.PHONY: lab test gpu lint notebooks site clean

lab: $(LAB_STAMP)
	$(BIN)/moe-edu lab

test: $(TEST_STAMP) lint
	$(BIN)/python -m pytest
	MOE_EDU_PROGRESS=$(abspath $(VENV))/progress.json $(BIN)/python -m pytest --nbval notebooks

# On a machine with an NVIDIA GPU: its tests, then the table, which is also left as data and as a picture.
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

# Runs every notebook from top to bottom and saves it with its outputs, without widget state.
notebooks: $(TEST_STAMP)
	$(BIN)/python -m moe_edu.lessons.execute notebooks/*.ipynb

# A static book in build/site that opens from disk, without a network or a kernel.
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
