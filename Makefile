PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# of the tests
PROCESSES ?= 2

# Without bytecode on disk every process compiles all of torch again.
unexport PYTHONDONTWRITEBYTECODE

# `make install CPU=1` takes the builds of PyTorch without CUDA, from its own index.
UV_ARGS := $(if $(CPU),--torch-backend cpu)

.PHONY: install dev quickstart test lint clean

install: $(VENV)/.installed

# What the tests and linters need as well.
dev: $(VENV)/.dev

# uv installs the whole set in well under a minute; where it is not available, pip is used.
define install_winnow
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv || true
	UV_SYSTEM_CERTS=1 $(BIN)/uv pip install --python $(BIN)/python $(UV_ARGS) -e '$(1)' || \
	$(BIN)/python -m pip install -e '$(1)'
endef

$(VENV)/.installed: pyproject.toml
	$(call install_winnow,.)
	touch $@

$(VENV)/.dev: pyproject.toml
	$(call install_winnow,.[dev])
	touch $@ $(VENV)/.installed

quickstart: install
	$(BIN)/winnow run quickstart --out runs/quickstart

test: dev
	$(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs
