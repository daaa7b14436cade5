PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# of the tests
PROCESSES ?= 2

# Without bytecode on disk every process compiles all of torch again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install quickstart test lint clean

install: $(VENV)/.installed

# uv installs the whole set in well under a minute; where it is not available, pip is used.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv || true
	UV_SYSTEM_CERTS=1 $(BIN)/uv pip install --python $(BIN)/python -e '.[dev]' || \
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@

quickstart: install
	$(BIN)/winnow run quickstart --out runs/quickstart

test: install
	$(BIN)/python -m pytest -n $(PROCESSES) --dist loadgroup --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs
