# `make demo` and `make test` set up what is missing and then do their job. A second run sets up nothing again.
SHELL := /bin/bash
PYTHON ?= python3.11
# Any 3.11 will do, under whatever name this machine has it.
FOUND := $(shell command -v $(PYTHON) || command -v python3)
BIN := .venv/bin
# uv reads neither pip's configuration nor its environment: pass on where wheels are found, else name PyTorch's CPU index.
LINKS := $(shell $(FOUND) -m pip config get global.find-links 2>/dev/null)
CPU_WHEELS := $(if $(LINKS),$(addprefix --find-links ,$(LINKS)),--extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match)
export HF_HUB_OFFLINE ?= 1

.PHONY: setup setup-bench setup-gpu demo test lint bench chaos lock clean

setup: .venv/.ready

.venv/.ready: requirements/cpu.txt
	@$(FOUND) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "Python 3.11 is needed, but $(FOUND) is another version; set PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(FOUND) -m venv .venv
	$(BIN)/python -m pip install --quiet uv==0.13.9
	test -e .venv/.gpu || $(BIN)/uv pip install --compile-bytecode --python $(BIN)/python $(CPU_WHEELS) --no-deps --requirements requirements/cpu.txt
	touch $@

setup-bench: setup
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python $(CPU_WHEELS) --requirements pyproject.toml --extra bench

setup-gpu:
	test -x $(BIN)/python || $(FOUND) -m venv .venv
	$(BIN)/python -m pip install --quiet uv==0.13.9
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python --requirements pyproject.toml --extra gpu --extra dev
	touch .venv/.gpu .venv/.ready

demo: setup
	$(BIN)/python deploy/job.py deploy/configs/random_number.yaml $(ARGS)

test: setup lint
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

# Measured figures, as a table and MLflow runs; names choose: make bench ARGS="publish update_rate", or ARGS=all for hours.
bench: setup
	$(BIN)/python -m tests.benchmarks $(ARGS)

# The tests that take minutes, then processes killed and stopped at random times in real runs: a line of JSON for each fault. ARGS="--injections 5" for a short one. At last the memory of a long run. One that fails keeps none of the others from running.
chaos: setup
	trap 'exit 130' INT; failed=0; \
	$(BIN)/python -m pytest -m chaos || failed=1; \
	$(BIN)/python -m tests.chaos $(ARGS) || failed=1; \
	$(BIN)/python -m tests.benchmarks.soak || failed=1; \
	exit $$failed

# Pins for a set-up that is the same everywhere; without hosts or folders, so it can be committed.
lock: setup
	$(BIN)/uv pip compile --quiet --python-version 3.11 $(CPU_WHEELS) --no-annotate --no-header --extra cpu --extra dev pyproject.toml --output-file requirements/cpu.txt
	sed -i '/^--/d' requirements/cpu.txt

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
