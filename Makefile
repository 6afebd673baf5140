# megalm: from a fresh machine to a trained model (`make pretrain`) or a tested one (`make test`).
#
# Each step of the installation leaves a stamp in .venv/.stamps, so a second start goes straight to its work and
# an interrupted one resumes where it was. Variables:
#   PYTHON=/path/to/python3.12   the interpreter to build on (3.10-3.12; default: the first that fits)
#   SYSTEM=1                     use that interpreter's own torch instead of installing one
#   WHEELS=folder                packages for gpu-check on a machine without a network
#   ARGS="..."                   more arguments for pretrain (train.steps=50), test (-k resume) and gpu-check (--device cpu)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?=
SYSTEM ?=
WHEELS ?=
ARGS ?=
VENV := .venv
STAMPS := $(VENV)/.stamps
STEP := bash tools/step.sh
# pip compiles one file after another; compileall takes all cores.
PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --no-compile
# Packages' own tests and the models of transformers are more than a quarter of all, and hardly any is imported.
SELDOM := /tests?/|/transformers/models/
COMPILE := $(STEP) "bytecode" sh -c '$(VENV)/bin/python -m compileall -qq -j 0 -x "$(SELDOM)" $(VENV)/lib || true'
# Tests wait at times, for a queue, a signal or a file: with one process more than there are cores, all are busy.
WORKERS := $$(($$(getconf _NPROCESSORS_ONLN) + 1))
# DeepSpeed's launcher starts `python` and its operations are built with `ninja`: both from PATH.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# With it each process compiles all modules of megalm again, for more than a second of the processor.
unexport PYTHONDONTWRITEBYTECODE
SCRIPTS = .ci/run $(shell find tools slurm docs benchmarks launch data_tools -name '*.sh' 2>/dev/null)

.PHONY: help pretrain install test test-all check parity gpu-check lock clean

help: ## Show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

pretrain: install ## Install, then pretrain the default run on what this machine has (ARGS="key=value ...")
	$(VENV)/bin/deepspeed --log_level warning launch/pretrain.py --deepspeed_config ds_configs/zero2.json $(ARGS)

install: $(STAMPS)/megalm ## Make .venv with everything that training needs

# Modules run side by side, in the order of tests/conftest.py. The tests of one stay together: they share what they train.
test: install $(STAMPS)/dev ## Install, then run the tests that every change has to pass (ARGS="-k name")
ifeq ($(strip $(ARGS)),)
	$(VENV)/bin/python -m pytest --durations=20 -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
		tests/distributed tests/e2e tests/gpu_rehearsal tests/unit
else
	$(VENV)/bin/python -m pytest --durations=20 $(ARGS)
endif

test-all: install $(STAMPS)/dev ## The same with the slow tests: the whole parity matrix, NVMe, every compiled layout
	$(VENV)/bin/python -m pytest --durations=20 -m "" $(ARGS)

check: install $(STAMPS)/dev ## Style, types, import rules, spelling, shell scripts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -q tests/unit/test_imports.py
	$(VENV)/bin/codespell
	$(VENV)/bin/shellcheck $(SCRIPTS)

parity: install $(STAMPS)/dev ## Train every parallel layout against one rank; the table goes to docs/parallelism.md
	$(VENV)/bin/python -m tests.distributed.parity_table --write

gpu-check: ## All that only a GPU shows, in nine minutes, as gpu-check/RESULT.md and .json (ARGS="--device cpu")
	@bash tools/gpu_check.sh "$(VENV)" "$(PYTHON)" "$(WHEELS)" $(ARGS)

lock: install ## Resolve requirements.lock anew (needs uv)
	$(VENV)/bin/python tools/lock.py

clean: ## Remove .venv and what tools left; runs and datasets stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis gpu-check

$(STAMPS)/venv:
	@$(STEP) "virtual environment" bash tools/make_venv.sh "$(VENV)" "$(PYTHON)" "$(SYSTEM)"
	@mkdir -p $(STAMPS) && touch $@

# torch by its plain name: a CPU or a CUDA build, whichever the index gives for this machine.
$(STAMPS)/torch: requirements.lock $(STAMPS)/venv
ifeq ($(SYSTEM),1)
	@$(STEP) "torch of $(or $(PYTHON),python3)" $(VENV)/bin/python tools/system_torch.py
else
	@version=$$($(VENV)/bin/python tools/locked.py torch) && $(STEP) "$$version" $(PIP) "$$version"
endif
	@touch $@

# PIP_CONSTRAINT: vendors' images pin their own packages by it, against the lock.
$(STAMPS)/packages: requirements.lock tools/locked.py $(STAMPS)/torch
	@$(VENV)/bin/python tools/locked.py rest $(if $(filter 1,$(SYSTEM)),--system) > $(STAMPS)/packages.txt
	@$(STEP) "$$(wc -l < $(STAMPS)/packages.txt) packages of requirements.lock" \
		env -u PIP_CONSTRAINT $(PIP) --requirement $(STAMPS)/packages.txt
	@touch $@

# No build isolation: DeepSpeed's build looks at the torch that it will run with.
$(STAMPS)/deepspeed: requirements.lock $(STAMPS)/packages
	@version=$$($(VENV)/bin/python tools/locked.py deepspeed) && \
		$(STEP) "$$version" env -u PIP_CONSTRAINT $(PIP) --no-build-isolation "$$version"
	@touch $@

$(STAMPS)/megalm: setup.py $(STAMPS)/deepspeed
	@$(STEP) "megalm itself" $(PIP) --no-deps --no-build-isolation --editable .
	@$(COMPILE)
	@touch $@

$(STAMPS)/dev: requirements-dev.lock $(STAMPS)/megalm
	@$(STEP) "tools of the tests" env -u PIP_CONSTRAINT $(PIP) --requirement requirements-dev.lock
	@$(COMPILE)
	@touch $@
