# What people type. Every target installs what it needs into .venv; stamps make a second run free.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python tools/install.py

# The release installed where there is no NVIDIA GPU; with one, it is the newest that the package allows.
TORCH ?= torch==2.13.0
# Passed to the installer for torch. PyTorch's own CPU builds save several GB without a GPU:
#   make serve TORCH_PIP_ARGS="--index-url <PyTorch's CPU index>"
TORCH_PIP_ARGS ?=

MODEL ?= smollm2-135m
PORT ?= 8000
GRPC_PORT ?= 50051
ARGS ?=
# Many tests start a service of their own and wait for it: two files at a time keep two cores busy. The slowest
# come first by name; in the order that xdist would choose they come last, one core idle.
JOBS ?= 2
# Kernels and tiny models share a GPU well; a model takes most of its memory, so that models come one by one.
GPU_JOBS ?= 8
TINY_ON_GPU := tests/integration/test_cuda_families.py tests/integration/test_cuda_quantized.py

SOURCES := pagewire scheduler frontend engine
BENCHMARKS := dispatch_round_trip serving_cpu engines_cpu load_generator
LINTED := $(SOURCES) tests tools $(wildcard benchmarks)

.PHONY: help serve chat test test-all test-clients test-gpu test-lowest lint audit format proto console pictures docs chaos bench clean
.DEFAULT_GOAL := help

help: ## Say what there is
	@grep -E '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{ printf "make %-10s %s\n", $$1, $$2 }'

serve: $(VENV)/.installed ## Install, fetch the model, serve it (MODEL= PORT= GRPC_PORT= ARGS=)
	$(BIN)/pagewire serve $(MODEL) --port $(PORT) --grpc-port $(GRPC_PORT) $(ARGS)

chat: $(VENV)/.installed ## Install, fetch the model, talk to it (MODEL= ARGS=)
	$(BIN)/pagewire chat $(MODEL) $(ARGS)

test: $(VENV)/.installed-dev ## Run the CPU test suite (JOBS= side by side, ARGS= goes to pytest)
	$(BIN)/python -m pytest -m "not gpu and not slow" -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-all: $(VENV)/.installed-dev ## Run the whole CPU test suite, slow matrices too (JOBS=, ARGS= as above)
	$(BIN)/python -m pytest -m "not gpu" -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-gpu: $(VENV)/.installed-dev ## Run the tests of kernels and models on a CUDA device (ARGS= goes to pytest)
	$(BIN)/python -m pytest -m gpu tests/kernels $(TINY_ON_GPU) -n $(GPU_JOBS) $(ARGS)
	$(BIN)/python -m pytest -m gpu tests/integration $(addprefix --ignore=,$(TINY_ON_GPU)) $(ARGS)

test-clients: $(VENV)/.clients ## Run agent frameworks and lm-eval, those too whose needs are large, against a service
	$(VENV)/clients/bin/python -m pytest tests/clients $(ARGS)

test-lowest: $(VENV)/.lowest ## Run unit tests and a service on the lowest versions pyproject.toml allows (but TORCH)
	$(VENV)/lowest/bin/python -m pytest -m "not gpu and not slow" -n $(JOBS) --dist loadfile --no-loadscope-reorder \
	  tests/unit tests/e2e/test_null_engine.py tests/e2e/test_grpc_client.py $(ARGS)

lint: $(VENV)/.installed-dev ## Check style, types and wire contracts
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/mypy
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	$(BIN)/python tools/buf_breaking.py
	$(BIN)/python tools/stubs.py --check
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml $(SOURCES) tools

audit: $(VENV)/.installed-dev ## Look the installed packages up in the advisory database (needs the network)
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install --quiet pip-audit
	$(VENV)/audit/bin/pip-audit --path $$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')

format: $(VENV)/.installed-dev ## Rewrite Python and protos in the house style
	$(BIN)/ruff check --fix $(LINTED)
	$(BIN)/ruff format $(LINTED)
	$(BIN)/buf format --write

proto: $(VENV)/.installed-dev ## Regenerate the stubs from protos/
	$(BIN)/python tools/stubs.py

console: ## Build the web console from console/ (needs Node 20 or newer; what it builds is committed)
	cd console && npm install --no-audit --no-fund && npm run build

pictures: $(VENV)/.installed-dev ## Take the pictures of the console in docs/pictures (needs Debian's chromium)
	$(BIN)/python -m pytest -n 0 tests/e2e/test_console.py -k look --pictures docs/pictures

docs: $(VENV)/.installed-dev ## Build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

chaos: $(VENV)/.installed-dev ## Kill every process at random for ten minutes under streams (ARGS= as in tools/chaos)
	$(BIN)/python -m tools.chaos $(ARGS)

bench: $(VENV)/.installed-dev ## Run the CPU benchmarks
	@for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python -m benchmarks.$$name || exit; done

clean: ## Remove .venv and caches
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || { \
	  echo "pagewire needs Python 3.11 or 3.12, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one, for example: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Torch comes first where there is no GPU, so that the rest resolves against the build chosen here. Kernels for the CPU
# are compiled beside it; where they cannot be, the first start says why.
$(VENV)/.torch: | $(BIN)/python
	@if command -v nvidia-smi >/dev/null; then \
	  echo "nvidia-smi found: torch comes with the package"; \
	else \
	  echo "no NVIDIA GPU found: installing $(TORCH)"; \
	  { $(PYTHON) -m engine.cpu.kernels.build >/dev/null 2>&1 & }; \
	  $(INSTALL) $(TORCH_PIP_ARGS) '$(TORCH)'; \
	fi
	@touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.torch
	$(INSTALL) -e .
	@touch $@

# instructor holds others back, and lm-eval brings half of data science with it: both stay out of .venv.
$(VENV)/.clients: pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)/clients
	$(VENV)/clients/bin/python tools/install.py $(TORCH_PIP_ARGS) '$(TORCH)'
	$(VENV)/clients/bin/python tools/install.py -e '.[dev]' instructor lm-eval
	@touch $@

# The lowest huggingface_hub is older than transformers 5: what compares with that is skipped. schemathesis, which
# only tools/fuzz_http.py uses, asks for a newer rich than pagewire does, litellm for a newer jinja2, and tritonclient for
# a newer protobuf; the other clients' frameworks stay out too, whose tests do not run here.
$(VENV)/.lowest: pyproject.toml tools/lowest_versions.py
	$(PYTHON) -m venv --clear $(VENV)/lowest
	$(VENV)/lowest/bin/python tools/install.py $(TORCH_PIP_ARGS) '$(TORCH)'
	$(VENV)/lowest/bin/python tools/install.py 'transformers<5' \
	  $$($(VENV)/lowest/bin/python tools/lowest_versions.py torch transformers schemathesis \
	    litellm langchain-openai pydantic-ai-slim tritonclient)
	$(VENV)/lowest/bin/pip install --no-deps -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.torch
	$(INSTALL) -e '.[dev,docs]'
	@touch $@ $(VENV)/.installed
