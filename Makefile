# Everything runs from here. `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ARGS ?=
WORKERS ?= $(shell getconf _NPROCESSORS_ONLN)
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --dist worksteal
DOCKER ?= docker

.DEFAULT_GOAL := help
.PHONY: help setup train generate test test-all lint format bench golden wheel docker-cpu docker-cuda docker-neuron clean distclean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F'\t' '{printf "  make %-13s %s\n", $$1, $$2}'

setup: $(INSTALLED) ## make .venv with the exact versions of constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/it"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,eval,quantize]'
	@touch $@

train: setup ## train the default model: text of the standard library, about 3 minutes (ARGS="key=value ..." to change it)
	$(BIN)/gpt pretrain $(ARGS)

test: setup ## the test suite, fast part (WORKERS=2: so many processes; default: one a core)
	$(TESTS) -n $(WORKERS) -m "not slow" $(ARGS)

test-all: setup ## the whole test suite
	$(TESTS) -n $(WORKERS) $(ARGS)

lint: setup ## ruff, pyright and hadolint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/hadolint --config docker/hadolint.yaml docker/*.Dockerfile

format: setup ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## the measurements behind benchmarks/RESULTS.md
	$(BIN)/python scripts/benchmark.py $(ARGS)

golden: setup ## rewrite tests/golden/ after a change that is meant to change the numbers
	OMP_NUM_THREADS=1 $(BIN)/python scripts/golden.py

wheel: setup ## build the wheel into dist/
	$(BIN)/python -m build --wheel --outdir dist .

docker-cpu: ## build the image gpt:cpu (ARGS="--build-arg USER_ID=1234 ..."; docs/containers.md)
docker-cuda: ## build the image gpt:cuda, for NVIDIA GPUs
docker-neuron: ## build the image gpt:neuron, for AWS Trainium
docker-cpu docker-cuda docker-neuron: docker-%:
	@$(DOCKER) info > /dev/null 2>&1 || { echo "No container engine answers '$(DOCKER) info': start Docker, or name another engine (DOCKER=podman)"; exit 1; }
	DOCKER_BUILDKIT=1 $(DOCKER) build --file docker/$*.Dockerfile --tag gpt:$* $(ARGS) .

clean: ## remove caches and build output; runs/ stays
	rm -rf dist build .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv too
	rm -rf $(VENV)
