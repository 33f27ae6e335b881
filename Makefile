# One command from a fresh clone to done: every target makes the environment first when it is missing or out of date.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check docs soak bench bench-peers test-gpu bench-gpu clean

demo: $(READY)
	$(BIN)/python -m examples.demo

test: $(READY)
	$(BIN)/python -m pytest -q -m "not soak" -n 2 --no-loadscope-reorder --durations 20

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/zensical build --clean --strict

docs: $(READY)
	$(BIN)/zensical build --clean --strict

soak: $(READY)
	$(BIN)/python -m pytest -q -m soak --timeout 3600

bench: $(READY)
	$(BIN)/python -m benchmarks.compare

bench-peers: $(READY)
	$(BIN)/python -m benchmarks.peers.install all
	$(BIN)/python -m benchmarks.compare --peers all --rounds 5 --seconds 2 --out peers
	$(BIN)/python -m benchmarks.tables

test-gpu: $(READY)
	$(BIN)/python -m pytest -q tests/gpu

bench-gpu: $(READY)
	$(BIN)/python -m benchmarks.gpu

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) site .cache .peers .mypy_cache .ruff_cache .pytest_cache .hypothesis
