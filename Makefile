# One command from a fresh clone to done: every target makes the environment first when it is missing or out of date.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check soak test-gpu bench-gpu clean

demo: $(READY)
	$(BIN)/python -m loaders demo

test: $(READY)
	$(BIN)/python -m pytest -q -m "not soak"

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

soak: $(READY)
	$(BIN)/python -m pytest -q -m soak --timeout 3600

test-gpu: $(READY)
	$(BIN)/python -m pytest -q tests/gpu

bench-gpu: $(READY)
	$(BIN)/python -m benchmarks.gpu

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
