# `make demo` and `make test` do all their set-up themselves: they need git, make and Python 3.11 to 3.13.
# PYTHON=... names the Python to build .venv on; VENV=... another folder for it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STORE ?= store
ARGS ?=

export PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup demo test quick chaos lint types toyland bench figures lock clean

help: ## this list
	@grep -E '^[a-z]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed 's/:[^#]*## /\t/' | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  make %-9s %s\n' "$$name" "$$text"; done

setup: $(STAMP) ## .venv with the locked versions and this project (once; the other targets call it)
	@:

$(STAMP): requirements.lock pyproject.toml hatch_build.py scripts/setup.sh
	@bash scripts/setup.sh "$(VENV)"
	@touch $@

demo: $(STAMP) ## the sweep `quickstart` on this machine: PI-FT and DPOK at several beta, a table and a report
	$(BIN)/pift launch sweep=quickstart executor=ray store=$(STORE) $(ARGS)

test: $(STAMP) ## every test, a process per core; ARGS="-k name" narrows it down
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

quick: $(STAMP) ## the tests that take seconds
	$(BIN)/python -m pytest -m "not ray and not slow and not chaos" $(ARGS)

chaos: $(STAMP) ## the chaos tests, longer: 60 kills, every 64th byte of every file
	PIFT_CHAOS=full $(BIN)/python -m pytest -m chaos -n 2 --dist loadfile $(ARGS)

lint: $(STAMP) ## ruff
	$(BIN)/ruff check .

types: $(STAMP) ## mypy
	$(BIN)/mypy

toyland: $(STAMP) ## train toyland's networks anew (up to two hours on two cores) and replace its weights
	$(BIN)/python -m workers.models.toyland.train --out workers/models/toyland/weights --cache build/toyland $(ARGS)

bench: $(STAMP) ## cost of a gradient step beside its bare network passes
	$(BIN)/python -m benchmarks.step $(ARGS)

figures: $(STAMP) ## the figures and numbers of docs/theory.md
	$(BIN)/python -m benchmarks.theory $(ARGS)

lock: $(STAMP) ## resolve requirements.lock anew from pyproject.toml (UPGRADE=1: newest versions)
	@sed '/^[^#]/,$$d' requirements.lock > $(VENV)/lock.head
	$(BIN)/uv pip compile pyproject.toml --group dev --universal --python-version 3.11 $(if $(UPGRADE),--upgrade) \
		--no-header --no-annotate --no-emit-index-url --quiet --output-file requirements.lock
	@cat $(VENV)/lock.head requirements.lock > $(VENV)/lock.new && mv $(VENV)/lock.new requirements.lock

clean: ## remove .venv, caches and build leftovers; the store stays
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
