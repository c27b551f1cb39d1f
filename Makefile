# corral: every task of a developer. `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# What `sim`, `campaign` and `fuzz` take: `make sim SEED=7 BODY=nodes.locks`.
BODY ?= mounts.shared
SEED ?= 1
SECONDS ?= $(if $(filter fuzz,$(MAKECMDGOALS)),60,600)

.PHONY: help install check lint types floors unit test sim campaign campaign-report dlm-model plants fuzz demo interrupts linear oracle soak test-compiled bench bench-dlm bench-diff system clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "corral needs Python 3.11 or newer; try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv module is missing. Install it with: sudo apt-get install -y python3-venv"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)  # pip comes last: without it, one was interrupted
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

install: $(STAMP)  ## create .venv and install corral with its tools

lint: $(STAMP)  ## ruff: rules and format
	$(BIN)/ruff check src tests bench corral_build.py setup.py
	$(BIN)/ruff format --check src tests bench corral_build.py setup.py

types: $(STAMP)  ## mypy --strict
	$(BIN)/mypy

floors: $(STAMP)  ## import-linter: imports go down only
	$(BIN)/lint-imports --no-cache

unit: $(STAMP)  ## unit tests and scenarios
	$(BIN)/pytest -n 2 tests/unit tests/scenario

check: lint types floors unit  ## what every commit passes: under a minute

test: lint types floors $(STAMP)  ## everything a change must pass: check, simulation, conformance, integration
	$(BIN)/pytest -n 2 tests/unit tests/scenario tests/conformance tests/sim
	$(BIN)/pytest tests/integration --ignore tests/integration/test_partitions.py
	$(BIN)/python -m tests.sim.campaign --fresh --seconds 90 $(foreach body,cman lift dlm fence comm gfs.crash nodes.locks,--body $(body))

stories: $(STAMP)  ## real processes and mounts under faults, as in `test`; and broken networks (namespaces, 90 seconds more)
	$(BIN)/pytest tests/integration/test_stories.py tests/integration/test_partitions.py

test-compiled: $(STAMP)  ## the wheel with compiled engines: unit tests, scenarios, golden bytes and the simulated locks against it
	$(BIN)/python -m tests.compiled

sim: $(STAMP)  ## one simulated seed again: SEED=n [BODY=mounts.shared] [TRACE=file]
	$(BIN)/python -m tests.sim.campaign --show $(BODY) $(SEED) $(if $(TRACE),--trace $(TRACE))

campaign: $(STAMP)  ## seed after seed of every simulated body, recorded in campaign/results.jsonl; SECONDS=600 [ONLY=body]
	$(BIN)/python -m tests.sim.campaign --seconds $(SECONDS) $(if $(ONLY),--body $(ONLY))

campaign-report: $(STAMP)  ## what the campaign has run so far, and what failed
	$(BIN)/python -m tests.sim.campaign --report

dlm-model: $(STAMP)  ## the lock engine against a dumb second one, random stories, going on where it stopped: SECONDS=600
	$(BIN)/python -m tests.unit.dlm.against_dumb --seconds $(SECONDS)

RUNS ?= 200
NODES ?= 1
oracle: $(STAMP)  ## the lock engine against the DLM of a Linux in user mode, live: RUNS=200 SEED=1 NODES=1|2; skipped where its packages are missing
	$(BIN)/python -m tests.oracle --runs $(RUNS) --seed $(SEED) --nodes $(NODES)

plants: $(STAMP)  ## every planted bug, and the seed at which its checker catches it
	$(BIN)/python -m tests.plants

fuzz: $(STAMP)  ## hostile bytes for every decoder and engine: SECONDS=60
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

demo: $(STAMP)  ## the main job on this machine: three nodes, one filesystem, one kill -9, everything checked
	$(BIN)/corral demo

MOMENTS ?= 25
interrupts: $(STAMP)  ## SIGINT to the demo at MOMENTS (25) moments, with and without FUSE: nothing may be left of it
	$(BIN)/python -m tests.integration.interrupted --moments $(MOMENTS) -- --quick --no-fuse
	$(BIN)/python -m tests.integration.interrupted --moments $(MOMENTS) -- --quick

linear: $(STAMP)  ## real clients of a cluster under kill and pause, every history checked, going on where it stopped: MINUTES=10
	$(BIN)/python -m tests.linear.run --minutes $(MINUTES)

MINUTES ?= $(if $(filter linear,$(MAKECMDGOALS)),10,30)
soak: $(STAMP)  ## MINUTES (30) of a local cluster on saturated cores: nothing slow may be taken for dead
	$(BIN)/python -m bench.soak --minutes $(MINUTES)

bench: $(STAMP)  ## what it costs: locks, recovery, files; one table, results in bench/results
	$(BIN)/python -m bench.dlm
	$(BIN)/python -m bench.locks
	$(BIN)/python -m bench.recovery
	$(BIN)/python -m bench.files
	$(BIN)/python -m bench.report

bench-dlm: $(STAMP)  ## what the lock engine costs, interpreted and compiled, beside one with nothing but locks
	$(BIN)/python -m bench.dlm

bench-diff: $(STAMP)  ## the results in bench/results against the committed ones
	@$(BIN)/python -m bench.report --diff

system:  ## install the Debian packages that tests and demo need
	@set -e; packages=$$(sed 's/#.*//' system-packages.txt); \
	missing=$$(for p in $$packages; do dpkg -s $$p >/dev/null 2>&1 || echo $$p; done); \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ]; then echo "missing packages; install them with: sudo apt-get install -y" $$missing; exit 1; fi; \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$missing

clean:  ## remove what was built
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
