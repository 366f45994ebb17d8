# Two commands matter: `make run` and `make test`. Each first makes .venv when it is missing or out of date.
.DEFAULT_GOAL := help
.PHONY: help install run test robust check lab docs clean
SHELL := /bin/bash

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.kilobench-installed
PIP   := $(BIN)/python -m pip --disable-pip-version-check -qq
STAGES := ^[_.]|^0[0-4]_(data|model|train|evaluate|counterfactual)[.]ipynb
# The tests' own outputs: never the checkout's outputs/.
SCRATCH := /tmp/kilobench-test-$(shell id -u)-$(shell echo "$(CURDIR)" | cksum | cut -d' ' -f1)

# On a shared machine threads that spin for long take the other core away (DESIGN §7); a short spin keeps small operations fast.
export OMP_WAIT_POLICY := passive
export KMP_BLOCKTIME := 0
export GOMP_SPINCOUNT := 30000

help:
	@echo "make run      the main job: kilobench run renderer --preset cpu, at most ten minutes on two cores"
	@echo "make test     everything CI checks"
	@echo "make robust   kills, damage, full disks, hostile files over all five projects: half an hour or so; ROBUST_INPUTS=20 ROBUST_KILLS=5 ROBUST_DAMAGES=0.1 for a short one"
	@echo "make lab      JupyterLab on localhost"
	@echo "make docs     the site into outputs/docs/html: notebooks executed, API, how-tos; looked at in Chromium where there is one"
	@echo "make install  only the set-up (.venv); PYTHON=… chooses the interpreter, 3.11 or newer"
	@echo "make clean    removes build leftovers; .venv and outputs/ stay"

install: $(STAMP)

# PYTHON=… wins; else the first of python3.11, python3 that starts (a pyenv shim may exist and not) and is new enough.
$(STAMP): requirements.txt setup.py settings.ini
	@found=""; for p in $(or $(PYTHON),python3.11 python3); do \
	  if "$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then found="$$p"; break; fi; done; \
	if [ -z "$$found" ]; then \
	  echo "make install: no Python 3.11 or newer (with venv) among: $(or $(PYTHON),python3.11 python3); install one, or say PYTHON=/path/to/python3.11" >&2; exit 2; fi; \
	[ -x $(BIN)/python ] || { echo "making $(VENV) with $$found"; "$$found" -m venv $(VENV); }
	@echo "installing requirements.txt (minutes the first time, seconds after)"
	@$(PIP) install -r requirements.txt 'setuptools>=77' wheel
	@$(PIP) install -e . --no-deps --no-build-isolation
	@touch $@

run: $(STAMP)
	@$(BIN)/kilobench run renderer --preset cpu
	@echo "the notebooks themselves: make lab"

# Every notebook once: the five stages of a project run as a series through papermill, in pytest; nbdev_test has the others, two folders at a time.
# Cheap and telling first; pytest last, so that its closing line is the last one.
test: check
	@rm -rf $(SCRATCH) && mkdir -p $(SCRATCH)
	@echo "== nbdev_test: every notebook but the stages, at smoke size"
	@find nbs -name '*.ipynb' -not -path '*/.ipynb_checkpoints/*' -exec dirname {} + | sort -ru | OMP_NUM_THREADS=1 xargs -P 2 -I PART bash -c '\
	  [ PART != nbs ] || only="--skip_folder_re ^."; \
	  said=$$(KILOBENCH_OUTPUTS=$(SCRATCH)/notebooks/$$(basename PART) $(BIN)/nbdev_test --path PART $$only --skip_file_re "$(STAGES)" --n_workers 1 --timing 2>&1); code=$$?; \
	  echo "-- PART"; echo "$$said"; exit $$code'
	@echo "== pytest"
	@KILOBENCH_OUTPUTS=$(SCRATCH)/pytest $(BIN)/python -m pytest -n 2 --dist loadfile --basetemp $(SCRATCH)/tmp; code=$$?; \
	if [ -d $(SCRATCH)/pytest/browser ]; then rm -rf outputs/browser && cp -r $(SCRATCH)/pytest/browser outputs/browser; fi; exit $$code

# Not part of `make test`, which has a small slice of it (tests/test_robust.py). Figures: the last line, and outputs/robust/report.json.
robust: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python tests/robust/run.py

# The types are looked at beside the rest.
check: $(STAMP)
	@types=$$(mktemp); $(BIN)/mypy >$$types 2>&1 & pid=$$!; good=0; \
	echo "== notebooks clean and in sync with kilobench/"; $(BIN)/python tests/notebook_checks.py || good=1; \
	echo "== ruff"; $(BIN)/ruff check --output-format concise kilobench setup.py || good=1; \
	echo "== mypy"; wait $$pid || good=1; cat $$types; rm -f $$types; exit $$good

lab: $(STAMP)
	@$(BIN)/jupyter lab --ip 127.0.0.1 --LabApp.default_url /lab/tree/nbs/index.ipynb --LabApp.check_for_updates_class jupyterlab.NeverCheckForUpdate

docs: $(STAMP)
	@$(BIN)/python docs/build.py

clean:
	@rm -rf build dist kilobench.egg-info .pytest_cache .ruff_cache .hypothesis $(SCRATCH)
	@find kilobench nbs tests -name __pycache__ -prune -exec rm -rf {} + -o -name .ipynb_checkpoints -prune -exec rm -rf {} +
