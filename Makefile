# The same few commands for people and for CI. They need make and Python 3.11 or newer, and make
# their own environment in .venv. Its stamp carries a checksum of what it was installed from, so
# that it is installed again when that changes, and only then.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
KEY := $(shell cat setup.cfg setup.py pyproject.toml constraints.txt chunkcache/native/*.cpp chunkcache/native/*.h | cksum | cut -d' ' -f1)
READY := $(VENV)/ready-$(KEY)
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
PYTEST := $(BIN)/python -m pytest -p no:cacheprovider
BENCHMARKS := $(patsubst benchmarks/%.py,benchmarks.%,$(sort $(wildcard benchmarks/bench_*.py)))

.PHONY: help env demo test lint types docs bench oldest stress fuzz faults replay clean

help:
	@echo "make demo    install into .venv and show the cache at work on the built-in model"
	@echo "make test    install, lint, check types, run all tests"
	@echo "make env     only install"
	@echo "make lint    ruff check and ruff format --check"
	@echo "make types   mypy"
	@echo "make docs    write anew what commands print on the pages of docs/"
	@echo "make bench   run the benchmarks one by one"
	@echo "make oldest  the tests that touch torch and transformers, with the oldest versions of both"
	@echo "make stress  a million random steps on the prefix tree"
	@echo "make fuzz    thousands of random requests to every architecture"
	@echo "make faults  thousands of killed Redis servers, writers and servers, and damage of all kinds"
	@echo "make replay  thousands of requests of agents through the live cache and the simulator, hit by hit"
	@echo "make clean   remove what builds and tools left behind, except .venv"

env: $(READY)

$(READY): | $(BIN)/pip
	$(PIP) setuptools
	$(PIP) --no-build-isolation -e '.[dev]'
	@rm -f $(VENV)/ready-*
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and \
	sys.exit("Python 3.11 or newer is needed; name one with: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

demo: env
	$(BIN)/chunkcache demo

test: lint types
	$(PYTEST) -n auto --maxprocesses=8 --doctest-modules chunkcache tests

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env
	$(BIN)/mypy

docs: env
	$(BIN)/python docs/generate_cli.py
	$(BIN)/python -m docs.generate_models
	$(BIN)/python -m docs.generate_examples

bench: env
	@set -e; for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python -m $$name; done

# Several gigabytes where pip finds only builds for GPUs.
oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --disable-pip-version-check setuptools
	.venv-oldest/bin/python -m pip install --disable-pip-version-check --no-build-isolation \
		torch==2.11.0 transformers==5.17.0 -e '.[dev]'
	.venv-oldest/bin/python -m pytest -p no:cacheprovider tests/kv tests/attention tests/hf tests/server

stress: env
	CHUNKCACHE_STEPS=1000000 $(PYTEST) tests/tree/test_random.py

fuzz: env
	CHUNKCACHE_FUZZ=1000 $(PYTEST) tests/hf/test_zoo.py -k history

# 25 times the kills of `make test`, and as many writers as CHUNKCACHE_KILLS: 5,500 in all.
faults: env
	OMP_NUM_THREADS=1 CHUNKCACHE_FAULTS=25 CHUNKCACHE_KILLS=1500 $(PYTEST) -n auto --maxprocesses=8 \
		tests/faults tests/stores/test_disk.py

replay: env
	OMP_NUM_THREADS=1 CHUNKCACHE_REPLAYED=2000 CHUNKCACHE_CONTEXT=8000 $(PYTEST) -n auto --maxprocesses=8 \
		tests/hf/test_tracing.py

clean:
	rm -rf build dist *.egg-info chunkcache/native/*.so $(READY) .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
