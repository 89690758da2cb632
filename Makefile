# What users and developers run. Each target sets up .venv the first time it needs it and is quick from then on.

PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.PHONY: help demo test test-all test-ecosystem test-matrix test-gpu lint errors format wheel clean

help: ## Lists the targets (what `make` alone does)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' Makefile

demo: .venv/.demo ## Fine-tunes a small BERT on movie reviews; options: make demo ARGS="--help"
	$(BIN)/sadam run bert $(ARGS)

test: lint ## Everything quick: lint, types, the tests that take seconds
	$(PYTEST)

test-all: lint ## The long tests too: faults, many processes, other programs
	$(PYTEST) -m ""

test-ecosystem: .venv-ecosystem/.done ## Other people's programs, in a venv of its own; the head of tests/ecosystem/conftest.py says more
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-ecosystem/bin/python -m pytest tests/ecosystem tests/test_timm.py -m "" -rs

test-matrix: ## Older and newer versions, into docs/reliability.md; one: make test-matrix ARGS=oldest
	$(PYTHON) tests/matrix.py $(ARGS)

test-gpu: .venv/.dev ## What has to be seen on a GPU; skipped where there is none
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/test_gpu.py -rs

lint: .venv/.dev ## ruff (its security rules too), mypy, pip check, the small checks of .pre-commit-config.yaml
	@if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then \
		$(BIN)/pre-commit run --all-files --show-diff-on-failure; \
	else \
		$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && \
		$(BIN)/python -m pip check --disable-pip-version-check; \
	fi

errors: .venv/.dev ## Writes docs/errors.md from tests/errors, which provokes every message
	PYTHONPATH=tests $(BIN)/python -m errors > .errors.md
	mv .errors.md docs/errors.md

format: .venv/.dev ## Formats the code and mends what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: .venv/.dev ## Builds the wheel into dist/
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation

clean: ## Removes what building and testing leave behind; .venv and runs/ stay
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find sadam_integrations recipes tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.dev: pyproject.toml constraints.txt
	$(call install,dev)
	@touch .venv/.demo $@

.venv/.demo: pyproject.toml constraints.txt
	$(call install,demo)
	@touch $@

.venv-ecosystem/.done: pyproject.toml constraints.txt
	@echo "Setting up .venv-ecosystem: a few minutes and 3 GB (more if torch comes with CUDA), once."
	@$(@D)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[transformers,lightning,timm]' \
		datasets evaluate optuna peft pytest sentence-transformers setfit trl torchvision==0.28.0
	@touch $@

define install
	@echo "Setting up .venv with [$(1)]: a few minutes and 2 GB (more if torch comes with CUDA), once."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(1)]'
endef
