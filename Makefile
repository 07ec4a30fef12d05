# The lines that a user types; .ci/run runs the same ones.
PYTHON ?= python3
BIN := .venv/bin
# Processes that run tests: as many as there are cores, at least 2 and at most 4 (tests/conftest.py).
WORKERS ?= auto
# Benign on every platform: idle OpenMP threads sleep instead of spinning.
export OMP_WAIT_POLICY ?= passive

.PHONY: help setup serve stack test check bench screenshots clients kinds ray clean
help:    ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

setup: .venv/installed  ## make .venv and install everything into it
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "headgate needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[runtime,redis,evals,dev]'
	touch $@

serve: setup  ## the gateway and one runtime worker with the pocket model, on port 8080 or HEADGATE_PORT
	@$(BIN)/headgate serve

stack: setup  ## what compose.yaml runs, as processes: Redis, two runtimes, two gateways, one port
	@$(BIN)/python -m deploy.local

test: setup  ## every test that needs no peer and no download; WORKERS=1 runs them one after another
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

check: setup  ## style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py

bench: setup  ## the benchmarks that need no peer; writes docs/benchmarks.md
	$(BIN)/python -m benchmarks

screenshots: setup  ## pictures of the console under load, into docs/img; needs chromium
	$(BIN)/python -m benchmarks.lab.screenshots

clients: setup .venv-clients/installed  ## inspect_ai and lm_eval against the real stack; installs them
	HEADGATE_CLIENTS=$(CURDIR)/.venv-clients/bin $(BIN)/python -m pytest tests/clients -m clients -rA

.venv-clients/installed: tests/clients/requirements.txt
	test -x .venv-clients/bin/python || $(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

kinds: tests/deploy/kinds/node_modules/.package-lock.json  ## schemas of others' Kubernetes kinds, for tests; needs npm
tests/deploy/kinds/node_modules/.package-lock.json: tests/deploy/kinds/package-lock.json
	npm ci --prefix tests/deploy/kinds --ignore-scripts --no-audit --no-fund --silent
	touch $@

ray: setup  ## the fleet on a Ray cluster of three nodes, one of which dies; installs Ray
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]'
	$(BIN)/python -m pytest tests/fleet -rA

clean:   ## forget the environment and every cache
	rm -rf .venv .venv-clients tests/deploy/kinds/node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
