# `make quickstart` and `make test` need Python 3.11 or later and nothing else: they
# make their own virtual environment in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart test faults lint bench clean

quickstart: $(VENV)/installed
	$(BIN)/python -m lottery_flow.main --config=configs/quickstart.py --workdir=runs

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# The short part of these is in `make test`. Without root no disk can be mounted and
# filled: unshare --user --map-root-user --mount make faults
faults: $(VENV)/installed-dev
	$(BIN)/python -m pytest -q -n 2 --dist worksteal \
		tests/faults tests/test_bad_input.py tests/test_soak.py \
		-m 'faults or not faults' --reliability=results/reliability.md

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.run

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml requirements.txt constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(INSTALL) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
