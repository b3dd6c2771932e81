# zcompile: `make train` trains the example on 8 local processes, `make test` runs every test.
# Each target installs what it needs into .venv first. Outside this folder only pip's own cache is written, and what torch keeps in the
# system's temporary folder, wherever its caches are said to be (Inductor's precompiled C++ headers).

PYTHON ?= python3
# `make test-quick TORCH=2.11.0`: with that release of torch, in an environment and caches of its own.
TORCH ?=
OF_TORCH := $(if $(TORCH),-torch-$(TORCH))
VENV := .venv$(OF_TORCH)
BIN := $(VENV)/bin
CACHE := $(CURDIR)/build/cache$(OF_TORCH)
ARGS ?=

# `kernels` is also a public package: the repository root must not be on the module path (see pyproject.toml).
export PYTHONSAFEPATH := 1
# Eight ranks share the cores of one machine: one thread each.
export OMP_NUM_THREADS := 1
export TORCHINDUCTOR_CACHE_DIR := $(CACHE)/inductor
export TRITON_CACHE_DIR := $(CACHE)/triton
export TORCH_EXTENSIONS_DIR := $(CACHE)/torch_extensions
export HYPOTHESIS_STORAGE_DIRECTORY := $(CACHE)/hypothesis
export HF_HOME := $(CACHE)/huggingface

.PHONY: train convergence test test-quick lint clean help
.DEFAULT_GOAL := help

help:
	@echo "make train       train examples/train_gpt.py on 8 local processes (ARGS='--steps 40' passes options on)"
	@echo "make convergence training with quantised formats beside native ones, seed by seed (ARGS='--steps 40'); hours on two cores"
	@echo "make test        every test;  make test-quick: all but the slow ones (ARGS='tests/unit -k plan')"
	@echo "                 either of them with another release of torch, in an environment of its own: make test-quick TORCH=2.11.0"
	@echo "make lint        ruff and mypy"
	@echo "make clean       remove .venv, those of other releases, build/ and what Python leaves behind"

train: $(VENV)/.installed
	$(BIN)/torchrun --standalone --nproc-per-node 8 examples/train_gpt.py --topology 2x2x2 --plan zero_topo $(ARGS)

convergence: $(VENV)/.installed
	$(BIN)/python examples/convergence.py $(ARGS)

test: $(VENV)/.installed-test
	$(call pytest,"")

test-quick: $(VENV)/.installed-test
	$(call pytest,"not slow")

# Tests of one process run on two cores, file by file; then, one after another, those that start ranks of their own, which fill the cores.
# With ARGS pytest runs once, on what they name.
RANKS := tests/gloo tests/gpu
ifeq ($(ARGS),)
define pytest
@$(BIN)/python -m pytest -m $(1) -n 2 --dist loadfile $(RANKS:%=--ignore=%); status=$$?; \
	$(BIN)/python -m pytest -m $(1) $(RANKS) && exit $$status
endef
else
pytest = $(BIN)/python -m pytest -m $(1) $(ARGS)
endif

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-torch-* build dist *.egg-info .pytest_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# Stamps: an environment is stale when pyproject.toml is newer, and made anew when its Python no longer runs.
ifneq ($(shell $(BIN)/python -c '' 2>/dev/null && echo ok),ok)
.PHONY: $(VENV)/.installed $(VENV)/.installed-test
endif

$(VENV)/.installed: pyproject.toml
	$(call install,.)
	@touch $@

$(VENV)/.installed-test: pyproject.toml
	$(call install,.[test])
	@touch $(VENV)/.installed $@

define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	|| { echo "zcompile needs Python 3.10 or newer on PATH (or PYTHON=/path/to/python3); found: $$($(PYTHON) --version 2>&1)"; exit 1; }
@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '$(1)' $(if $(TORCH),'torch==$(TORCH)')
endef
