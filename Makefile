# Everything runs from .venv, which the first call makes; nothing but Python packages is downloaded.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: serve test test-fast check format gpu-report clean

serve: $(STAMP)
	$(BIN)/codmd-serve serve

test: $(STAMP)
	$(BIN)/python -m pytest

test-fast: $(STAMP)
	$(BIN)/python -m pytest -m 'not gpu and not slow'

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python scripts/readme_tree.py --write

# Limits add up to less than 9 minutes with the tests. A row that is there for this commit and device is kept, so a second call goes on.
GPU_BENCH := $(BIN)/codmd-serve bench --device cuda --resume --work build/bench --teacher-pairs 1
GPU_LOSSY := $(GPU_BENCH) --against lossy --no-cold-start --pairs 3
gpu-report: $(STAMP)
	$(BIN)/python -m pytest -m gpu || test $$? -eq 5
	$(GPU_BENCH) --limit-s 45
	$(GPU_LOSSY) --limit-s 30
	$(GPU_BENCH) --limit-s 190 --pairs 5 --random-weights wan-1.3b
	$(GPU_LOSSY) --limit-s 75 --random-weights wan-1.3b
	$(GPU_BENCH) --limit-s 130 --pairs 2 --random-weights wan-14b

clean:
	rm -rf $(VENV)

# The default torch of Linux brings gigabytes of CUDA libraries. Without an NVIDIA device the build that the
# distiller and the tests were developed with is tried first: where a CPU build of it is offered, pip takes that one.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo 'make: Python 3.11 or newer is needed; name one with "make PYTHON=python3.12 ..."' >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -e /dev/nvidia0 || $(PIP) install 'torch==2.13.0' || true
	$(PIP) install -e '.[dev]'
	touch $@
