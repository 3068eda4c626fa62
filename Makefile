# `make demo` and `make test` need only python3 (>= 3.11, with venv), git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Small convolutions with several threads on a busy machine run 10-50x slower.
export OMP_NUM_THREADS ?= 1
# Test processes. Whoever is done takes tests from the other: a few files start whole programs and take minutes.
JOBS ?= 2

# Flower has a venv of its own that borrows the packages of the first: `make test` shows that nothing needs it.
FLOWER := .venv-flower

.PHONY: install demo test test-all test-flower test-deployment lint docs clean

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "fedsec needs Python >= 3.11; set PYTHON=python3.x"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,docs,track,dicom]'
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

$(FLOWER)/.installed: $(STAMP)
	@test -x $(FLOWER)/bin/python || $(PYTHON) -m venv $(FLOWER)
	$(BIN)/python -c 'import sys; print(*[p for p in sys.path if p.endswith("site-packages")], sep="\n")' \
	  > "$$($(FLOWER)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
	$(FLOWER)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[flower]'
	@touch $@

test-flower: $(FLOWER)/.installed
	$(FLOWER)/bin/python -m pytest tests/flower -m "not slow"

# A SuperLink and three SuperNodes as processes, and what breaks in them: some ten minutes.
test-deployment: $(FLOWER)/.installed
	$(FLOWER)/bin/python -m pytest tests/flower/test_deployment.py -s

docs: install
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) $(FLOWER) site build *.egg-info .mypy_cache .ruff_cache .pytest_cache
