# Every target works on a fresh checkout with Python 3.11 or newer and a package index.

PYTHON ?= python3
export HYPOTHESIS_PROFILE ?= ci
# The many processes share what the first of them compiled, whatever the environment asks for.
export PYTHONDONTWRITEBYTECODE :=

BIN := .venv/bin
FLOOR := .venv-floor/bin
CROSS ?= .venv-cross
PIP_INSTALL := -m pip install -qq --disable-pip-version-check --no-compile
# On all cores, where pip compiles on one, and without the packages' own tests. A few files are no
# Python of this version.
COMPILE := -m compileall -qq -j 0 -x '/tests/'
# A worker a core. Each takes a stretch of the files, whose cached models stay with it, and from
# the longer stretch when its own is done.
SPREAD := --numprocesses logical --maxprocesses 8 --dist worksteal
UNIT := $(BIN)/python -m pytest --quiet $(SPREAD)
# Starting workers takes longer than they save.
ALONE := $(BIN)/python -m pytest --quiet -p no:xdist
# Triton reads the variable when a kernel is defined; the shape checks would wrap what it compiles.
INTERPRETER := TRITON_INTERPRET=1 SPECLM_TYPECHECK=0
CORE := --ignore=tests/docs --ignore=tests/cli --ignore=tests/demo \
	--ignore=tests/test_repository.py --ignore=tests/webui/test_page.py

.DEFAULT_GOAL := help
.PHONY: help demo test test-floor cross-check gpu deep docs browser lint types layers unit \
	untyped interpreted aot

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: .venv/.runtime ## Watch the bundled model decode, plain and speculative
	@$(BIN)/speclm demo

# What uses one core runs next to something else, the longest first; the suite has both cores for
# itself.
test: .venv/.dev ## Run every check a change must pass
	@$(MAKE) --no-print-directory --jobs=2 lint interpreted types untyped docs layers
	@$(MAKE) --no-print-directory unit

test-floor: .venv-floor/.ready ## Run the core suite on the oldest supported Transformers
	$(FLOOR)/python -m pytest --quiet $(SPREAD) $(CORE) tests

cross-check: $(CROSS)/.ready ## Load converted heads with other software's own code, and compare
	PYTHONPATH=. $(CROSS)/bin/python tests/cross_check/eagle.py
	PYTHONPATH=. $(CROSS)/bin/python tests/cross_check/medusa.py
	PYTHONPATH=. $(CROSS)/bin/python tests/cross_check/block.py

gpu: ## Check and measure the kernels on this machine's GPU, in the current Python
	PYTHONPATH=. $(PYTHON) benchmarks/kernels/gpu.py

deep: .venv/.dev .venv/torchao ## Search long: slow tests, 5000 examples a property
	HYPOTHESIS_PROFILE=deep $(UNIT) -m "not gpu and not network"
	PYTHONPATH=.venv/torchao $(UNIT) -m slow tests/model/test_places_quantised.py
	$(INTERPRETER) $(UNIT) -m "not gpu and not network" tests/kernels/interpreted
	SPECLM_TYPECHECK=0 $(UNIT) -m "not gpu and not network" tests/kernels/aot

browser: .venv/.browser ## Use the web page in Chromium, which has to be installed, and measure it
	PYTHONPATH=. $(BIN)/python tests/webui/browser.py

# With --quiet, --strict would not see warnings.
docs: .venv/.dev ## Build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict > .venv/docs.log 2>&1 || { cat .venv/docs.log; exit 1; }

lint: .venv/.dev ## Check style and formatting
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .

types: .venv/.dev ## Check types
	$(BIN)/mypy --no-error-summary

layers: .venv/.dev ## Check that imports only point down the stack
	@$(BIN)/lint-imports --no-logo > .venv/layers.log || { cat .venv/layers.log; exit 1; }

unit: .venv/.dev ## Run the test suite with shape checks and coverage
	$(UNIT) --cov --cov-report=term

untyped: .venv/.dev ## Run calls without shape checks, as users do, and those of `aot`
	SPECLM_TYPECHECK=0 $(ALONE) tests/generation/test_untyped.py tests/kernels/aot

aot: .venv/.dev ## Compile the kernels for GPUs ahead of time, and look at the machine code
	SPECLM_TYPECHECK=0 $(ALONE) tests/kernels/aot

interpreted: .venv/.dev ## Run the kernels in Triton's interpreter, in a process of its own
	$(INTERPRETER) $(ALONE) tests/kernels/interpreted

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.runtime: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing speclm into .venv (once, a few minutes)"
	$(BIN)/python $(PIP_INSTALL) --constraint constraints.txt --editable .
	@$(BIN)/python $(COMPILE) .venv/lib || true
	@touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing speclm and its development tools into .venv (once, a few minutes)"
	$(BIN)/python $(PIP_INSTALL) --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python $(COMPILE) .venv/lib || true
	@touch .venv/.runtime $@

.venv/.browser: pyproject.toml constraints.txt | .venv/.dev
	$(BIN)/python $(PIP_INSTALL) --constraint constraints.txt --editable '.[browser]'
	@touch $@

# In a folder of its own: Transformers imports it wherever it is found, which takes seconds and
# prints warnings.
.venv/torchao: constraints.txt | .venv/bin/python
	$(BIN)/python $(PIP_INSTALL) --constraint constraints.txt --no-deps --upgrade --target $@ torchao
	@touch $@

.venv-floor/.ready: pyproject.toml constraints-floor.txt
	@echo "Installing speclm with the oldest supported Transformers into .venv-floor (once)"
	$(PYTHON) -m venv .venv-floor
	$(FLOOR)/python $(PIP_INSTALL) --constraint constraints-floor.txt --editable '.[test]'
	@$(FLOOR)/python $(COMPILE) .venv-floor/lib || true
	@touch $@

# They ask for an older Transformers, and speculators for packages that fail next to a torch without
# CUDA; neither uses them here. Of vLLM only the sources run; pip asks its setup for the version.
$(CROSS)/.ready: pyproject.toml Makefile
	@echo "Installing speculators, SpecForge and ModelOpt into $(CROSS) (once, 1.5 GB)"
	$(PYTHON) -m venv $(CROSS)
	$(CROSS)/bin/python $(PIP_INSTALL) torch==2.13.0
	$(CROSS)/bin/python $(PIP_INSTALL) torch==2.13.0 speculators==0.9.0 --editable .
	$(CROSS)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio
	$(CROSS)/bin/python $(PIP_INSTALL) --no-deps specforge==0.2.0 nvidia-modelopt==0.47.0
	$(CROSS)/bin/python $(PIP_INSTALL) setuptools-scm==10.3.4 setuptools-rust==1.13.0
	@for version in 0.32.0 0.33.0; do \
		VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=$$version $(CROSS)/bin/python -m pip download \
			-qq --no-deps --no-build-isolation --no-binary vllm --dest $(CROSS)/sources \
			vllm==$$version && \
		tar -xzf $(CROSS)/sources/vllm-$$version.tar.gz -C $(CROSS)/sources vllm-$$version/vllm && \
		rm $(CROSS)/sources/vllm-$$version.tar.gz || exit 1; \
	done
	@touch $@
