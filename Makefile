# The newest Python that the project supports, of those that run: a shim of pyenv may be there and fail.
PYTHON ?= $(shell for v in 3.13 3.12 3.11; do \
	for p in python$$v $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$$v.*/bin/python$$v; do \
	$$p -c 'import ensurepip, venv' 2>/dev/null && echo $$p && exit; done; done)
BIN := .venv/bin
INSTALLED := .venv/.installed$(EXTRAS:%=-%)

.PHONY: install demo test test-slow test-gpu bench docs lint clean

install: $(INSTALLED)  ## EXTRAS=sscd,faces adds optional parts

$(INSTALLED): pyproject.toml
	@test -x $(BIN)/python -o -n "$(PYTHON)" || { echo "make: no Python from 3.11 to 3.13 runs here; install one, or run make PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@test "$$($(BIN)/python -V)" = "$$($(PYTHON) -V)" || echo "make: .venv stays with $$($(BIN)/python -V); remove it for $$($(PYTHON) -V)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev$(EXTRAS:%=,%)]'
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
