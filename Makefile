# make setup | quickstart | test | slow | browser | extras | lint | types | docs | bench
# A machine without a GPU may fetch the smaller torch: make setup TORCH_INDEX="--index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
TORCH_INDEX ?=
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The optional packages live apart: several of them slow every import of the others.
EXTRAS := .venv-extras
EXTRAS_STAMP := $(EXTRAS)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Tests that start processes of their own or look at the clock run by themselves, the others side by side.
ALONE := tests/distributed tests/faults tests/run tests/inference
BESIDE := -n $(JOBS) --dist worksteal $(ALONE:%=--ignore=%) --ignore-glob='tests/test_*.py'

.DEFAULT_GOAL := setup
.PHONY: setup quickstart test slow browser extras lint types docs docs-check bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "axolotl needs Python 3.11 or newer, this is " + sys.version.split()[0] + ". Choose one: make setup PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH_INDEX) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt
	@touch $(STAMP)

# It sees all of .venv; only what is missing there, or has to be another version, is installed again.
$(EXTRAS_STAMP): $(STAMP) constraints-extras.txt
	@test -x $(EXTRAS)/bin/python || $(PYTHON) -m venv $(EXTRAS)
	@$(EXTRAS)/bin/python -c 'import pathlib, sys, sysconfig; here = sysconfig.get_path("purelib"); base = here.replace("$(EXTRAS)", "$(VENV)"); pathlib.Path(here, "base.pth").write_text(f"import site; site.addsitedir({base!r})\n")'
	$(EXTRAS)/bin/python -m pip install --quiet -r constraints-extras.txt
	@touch $(EXTRAS_STAMP)

quickstart: $(STAMP)
	@$(BIN)/python examples/quickstart/run.py

test: $(STAMP)
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

slow: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m 'slow and not extras' $(BESIDE) || failed=1; \
	$(BIN)/python -m pytest -q -m 'slow and not extras' $(ALONE) tests/test_*.py || failed=1; exit $${failed:-0}

browser: $(STAMP)
	$(BIN)/python -m pytest -q -m browser

extras: $(EXTRAS_STAMP)
	@OMP_NUM_THREADS=1 $(EXTRAS)/bin/python -m pytest -q -m extras $(BESIDE) || failed=1; \
	$(EXTRAS)/bin/python -m pytest -q -m extras $(ALONE) tests/test_*.py || failed=1; exit $${failed:-0}

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python -m axolotl.cli.document
	$(BIN)/python benchmarks/gpu/plot.py

docs-check: $(STAMP)
	$(BIN)/python -m axolotl.cli.document --check
	$(BIN)/python benchmarks/table.py --check
	$(BIN)/python benchmarks/gpu/plot.py --check

bench: $(STAMP)
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/first_step.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/loss_equality.py
	$(BIN)/python benchmarks/async_save.py
	$(BIN)/python benchmarks/run_cost.py
	$(BIN)/python benchmarks/table.py

clean:
	rm -rf build dist outputs last_run_prepared .pytest_cache .ruff_cache .mypy_cache .hypothesis
