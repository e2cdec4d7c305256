# The verbs of this repository; `make` alone lists them. Needs make and python3 (3.11 or newer), nothing else:
# what is missing is installed with apt where we are root, and named where we are not.

PYTHON ?= python3
ARGS ?=
WORKERS ?= 2
ROUNDS ?= 2000
SEED ?= 1

VENV := .venv
RUN := $(VENV)/bin/python

# Tests start a thousand commands, and without it each of them compiles the whole of the project anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-real soak fuzz matrix bench lint clean
.DEFAULT_GOAL := help

help: ## list what make can do
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.runtime ## patch a running server under load, and take the patch back
	@bash .ci/tools compiler
	@$(RUN) -m fixtures.demo

test: $(VENV)/.development ## run all tests, two at a time (ARGS='tests/unit -k name' for some, WORKERS=0 for one by one)
	@bash .ci/tools all
	@$(RUN) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-real: $(VENV)/.development ## the long tests: Apache and OpenSSH in operation, tor, frr and postgres built twice from source, minutes each
	@bash .ci/tools real
	@LIVEGRAFT_REAL=1 $(RUN) -m pytest -m long tests/real $(ARGS)

soak: $(VENV)/.development ## the long runs: faults at every operation (LIVEGRAFT_EVERY=n: at every n-th), kills at random, cycles (ROUNDS=n kills)
	@bash .ci/tools all
	@LIVEGRAFT_SOAK=1 LIVEGRAFT_ROUNDS=$(ROUNDS) $(RUN) -m pytest -s -m soak tests/live $(ARGS)

fuzz: ROUNDS = 10000
fuzz: $(VENV)/.development ## damaged ELF files through diff, 10000 of them (ROUNDS=n, SEED=n to replay)
	@bash .ci/tools all
	@$(RUN) -m tests.fuzz --rounds $(ROUNDS) --seed $(SEED)

matrix: $(VENV)/.development ## every shape of code and data in every build, patched live (half an hour)
	@bash .ci/tools all
	@LIVEGRAFT_MATRIX=1 $(RUN) -m pytest -s tests/live/test_coverage_shapes.py tests/live/test_toolchains.py tests/live/test_tls.py \
		tests/live/test_imports.py tests/live/test_end_to_end.py \
		-k 'no_build_of_a_shape or toolchain or change_places or import_is_bound or comes_and_goes' $(ARGS)

bench: $(VENV)/.development ## diff beside objdump -d, and the pause beside a C program and gdb (ARGS=differ|pause for one, ROUNDS=n)
	@bash .ci/tools all
	@$(RUN) -m bench $(if $(filter-out file,$(origin ROUNDS)),--rounds $(ROUNDS)) $(ARGS)

lint: $(VENV)/.development ## check style and types
	@$(RUN) -m ruff check .
	@$(RUN) -m mypy
	@$(RUN) -m mypy -p fixtures
	@$(RUN) -m mypy -p bench
	@for file in examples/*/*.py; do $(RUN) -m mypy $$file || exit 1; done

clean: ## remove what was set up, built and fetched
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info patcher/threads/_batch.*.so

$(VENV)/.runtime: pyproject.toml setup.py patcher/threads/batch.c .ci/venv
	@PYTHON='$(PYTHON)' bash .ci/venv $(VENV) .
	@touch $@

$(VENV)/.development: pyproject.toml setup.py patcher/threads/batch.c .ci/venv
	@PYTHON='$(PYTHON)' bash .ci/venv $(VENV) '.[dev]'
	@touch $(VENV)/.runtime $@
