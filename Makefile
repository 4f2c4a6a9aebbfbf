# `make` lists what there is.
.DEFAULT_GOAL := help
.PHONY: help setup demo test lab notebooks lint

PYTHON ?= python3
ARGS ?=
BIN := $(CURDIR)/.venv/bin
export PYTHON
# Files of tests run side by side, each on one thread; ARGS="-n 0" has them one after another.
PROCESSES := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# Runs a command so that it, and the shell commands of notebooks, find `megafold` and `python`.
WITH_VENV := PATH="$(BIN):$$PATH"

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: ## make .venv with everything in it; quick when nothing changed
	@scripts/setup.sh

demo: setup ## run all notebooks and write them as web pages into outputs/demo/
	@rm -rf outputs/demo
	@$(WITH_VENV) megafold notebooks run --out outputs/demo

test: ## set up, then run every test (ARGS="-k cache" for some)
	@scripts/setup.sh browser
	@$(WITH_VENV) OMP_NUM_THREADS=1 python -m pytest $(PROCESSES) $(ARGS)

lab: setup ## open JupyterLab on the tour (ARGS="--no-browser" on a remote machine)
	@$(WITH_VENV) JUPYTER_CONFIG_PATH="$(CURDIR)/config/jupyter" \
	  python -m jupyterlab $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

notebooks: ## run all notebooks and store what they show, in them and in figures/
	@scripts/setup.sh browser
	@$(WITH_VENV) megafold notebooks run --in-place

lint: setup ## check style
	@$(WITH_VENV) ruff check .
	@$(WITH_VENV) ruff format --check .
