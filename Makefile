# make run | sweep | test | test-all | lint | types | docs | wheel | bench    (make alone lists the targets)
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
.DELETE_ON_ERROR:

VENV ?= .venv
VENV_BENCH ?= .venv-bench
BENCH_FLAGS ?= --suite=all --peers=torch,fedjax,pfl
PYTEST_FLAGS ?=
SWEEP = --study=sweeps/temperature_alpha.py --smoke

# The first of these that is Python 3.11 or later and can make a venv; set PYTHON to choose another.
PYTHONS := python3.11 python3.12 python3.13 python3 python
PYTHON ?= $(shell for p in $(PYTHONS); do \
	"$$p" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$p" && break; done)

# $(call make_venv,where)
make_venv = test -x $(1)/bin/python || { test -n "$(PYTHON)" || { echo "$(NO_PYTHON)" >&2; exit 1; }; $(PYTHON) -m venv $(1); }
NO_PYTHON = fdjax needs Python 3.11 or later with venv (Debian: apt install python3-venv); to name one: make PYTHON=...

# Python compiles what it imports; compiling all that is installed takes as long as the rest of the installation.
PIP_INSTALL = -m pip --disable-pip-version-check install --quiet --no-compile --constraint

.PHONY: help venv run sweep test test-all lint types format docs wheel bench-venv bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(VENV)/.installed ## make or update .venv with the pinned packages

run: $(VENV)/.installed ## federated distillation on the embedded MNIST sample: a table in minutes
	@$(VENV)/bin/python -m benchmarks.feddistill_table1 --preset=quick --out=runs/table1_quick --overwrite

sweep: $(VENV)/.installed ## eight trials of FedDistill and their report, whose path is the last line
	@rm -f runs/sweeps/make_sweep.db
	@$(VENV)/bin/python -m sweeps.run $(SWEEP) --name=make_sweep
	@$(VENV)/bin/python -m sweeps.report $(SWEEP) --name=make_sweep --out=runs/sweeps/make_sweep

test: $(VENV)/.installed ## the tests, two files at a time
	@$(VENV)/bin/python -m pytest -n 2 --dist loadfile -m "not exhaustive" $(PYTEST_FLAGS)

test-all: $(VENV)/.installed ## the same and the full matrix: every method under every lifting
	@$(VENV)/bin/python -m pytest -n 2 --dist loadfile $(PYTEST_FLAGS)

lint: $(VENV)/.installed ## ruff: rules and format
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

format: $(VENV)/.installed ## let ruff fix what it can
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

types: $(VENV)/.installed ## pyright on the library
	@$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python fdjax

docs: $(VENV)/.installed ## the site, built strictly: docs/_build/index.html
	@$(VENV)/bin/python -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build

wheel: $(VENV)/.installed ## a wheel in dist/, installed into an empty environment and run from another folder
	@.ci/wheel $(VENV)/bin/python

bench-venv: $(VENV_BENCH)/.installed ## make .venv-bench: PyTorch, fedjax and pfl, to time the same work in

bench: $(VENV)/.installed $(VENV_BENCH)/.installed ## every suite of benchmarks.speed beside PyTorch, fedjax and pfl
	@$(VENV)/bin/python -m benchmarks.speed --peer_python=$(VENV_BENCH)/bin/python $(BENCH_FLAGS)

clean: ## remove .venv, .venv-bench, caches and build leftovers; runs/ stays
	@rm -rf .venv .venv-bench build dist docs/_build docs/methods docs/results docs/settings.md *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	@$(call make_venv,$(VENV))
	@echo "installing the pinned packages into $(VENV): less than a minute, 1.1 GB" >&2
	@$(VENV)/bin/python $(PIP_INSTALL) constraints.txt --editable '.[test,dev,sweeps,docs,frames,hf,tensorboard]'
	@touch $@

$(VENV_BENCH)/.installed: constraints-bench.txt
	@$(call make_venv,$(VENV_BENCH))
	@echo "installing PyTorch, fedjax and pfl into $(VENV_BENCH)" >&2
	@$(VENV_BENCH)/bin/python $(PIP_INSTALL) constraints-bench.txt torch fedjax pfl
	@touch $@
