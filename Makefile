# `make demo` and `make test` need only python3 (>= 3.11, with venv), git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Small convolutions with several threads on a busy machine run 10-50x slower.
export OMP_NUM_THREADS ?= 1
# Test processes. Whoever is done takes tests from the other: a few files start whole programs and take minutes.
JOBS ?= 2

.PHONY: install demo test test-all lint docs clean

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "fedsec needs Python >= 3.11; set PYTHON=python3.x"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,docs,track]'
	@touch $@

demo: install
	$(BIN)/fedsec run --attack gradinversion:images=4,budget_s=4 --defense dp --rounds 8 --out runs/demo
	$(BIN)/fedsec plot runs/demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint docs
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist worksteal

test-all: lint docs
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

docs: install
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) site build *.egg-info .mypy_cache .ruff_cache .pytest_cache
