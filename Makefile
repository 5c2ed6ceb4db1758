PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do command -v $$p && break; done)
BIN := .venv/bin

.PHONY: install demo test test-slow test-gpu bench docs lint clean

install: .venv/.installed

.venv/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no Python found; install 3.11 or newer, or run make PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/curate run demo --work build/demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -q --durations=15 --numprocesses logical --maxprocesses 4 --dist loadfile

test-slow: install
	$(BIN)/pytest -q -m slow --durations=15

test-gpu: install
	$(BIN)/pytest -q -m gpu

bench: install
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

docs: install
	$(BIN)/mkdocs build

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache
