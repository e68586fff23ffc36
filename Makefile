# Two commands matter: `make demo` and `make test`. Each sets up what it needs and works alone.
#
#   PYTHON   the interpreter that makes the virtual environment (3.11 or newer)
#   TORCH    the torch requirement, for example TORCH='torch==2.13.0' or a build for your GPU
#   VENV     where the virtual environment lives

PYTHON ?= python3
TORCH  ?= torch>=2.4
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test test-all check format bench clean

demo: $(READY)
	$(BIN)/paramserver run examples/char-lm.yaml

test: check
	$(BIN)/python -m pytest

test-all: check
	$(BIN)/python -m pytest -m "slow or not slow"

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone, so that its requirement decides which build is taken.
$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "paramserver needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[models,dev]'
	touch $(READY)
