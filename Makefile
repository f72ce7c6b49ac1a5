# Two commands for newcomers: `make transcribe` and `make test`.

PYTHON ?= $(shell for p in python3.12 python3.11 python3.10 python3 python; do \
  $$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
  && { command -v $$p; break; }; done)
VENV := .venv
CLIENTS := .venv-interop
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help transcribe test interop check stubs lmplz install-gpu clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ —/'

transcribe: $(VENV)/.runtime ## install the runtime and transcribe the clips in examples/ over gRPC
	@echo "== streaming examples/ to a server with the shipped bundle"
	@$(BIN)/python examples/transcribe.py

test: $(VENV)/.development $(BIN)/lmplz ## install what tests need, check the code, run all tests
	@$(MAKE) --no-print-directory check
	@echo "== running the tests"
	@$(BIN)/python -m pytest
	@$(MAKE) --no-print-directory interop

interop: $(VENV)/.development ## run Riva's and Google's own clients against the server
	@if tests/interop/install.sh $(BIN)/python $(CLIENTS); then \
	  echo "== running the tests with Riva's and Google's clients"; \
	  $(BIN)/python -m pytest tests/interop; \
	else \
	  echo "NOT RUN: tests with Riva's and Google's clients, which could not be installed"; \
	fi

check: $(VENV)/.development ## lint and type-check
	@echo "== checking style and types"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

stubs: $(VENV)/.development ## regenerate service/pb from proto
	@$(BIN)/python -m service.generate_stubs

lmplz: $(BIN)/lmplz ## build the KenLM tools that `voxgate lm build` needs

install-gpu: $(VENV)/.runtime ## replace onnxruntime by onnxruntime-gpu
	@echo "== replacing onnxruntime by onnxruntime-gpu"
	@$(PIP) uninstall --yes onnxruntime onnxruntime-gpu
	@$(PIP) install --progress-bar on 'onnxruntime-gpu[cuda,cudnn]'

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) $(CLIENTS) .mypy_cache .ruff_cache .pytest_cache *.egg-info build

$(VENV)/.prerequisites:
	@test -n "$(PYTHON)" || { echo "Voxgate needs Python 3.10, 3.11 or 3.12; none was found. Install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@for tool in cmake c++; do command -v $$tool >/dev/null || { \
	  echo "Voxgate compiles kenlm and needs $$tool, which is missing. On Debian: apt-get install cmake g++" >&2; exit 1; }; done
	@echo "== making a virtual environment in $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV) || { echo "Python's venv module is missing. On Debian: apt-get install python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/.runtime: pyproject.toml | $(VENV)/.prerequisites
	@echo "== installing the runtime (a minute or two the first time; kenlm is compiled)"
	@$(PIP) install --progress-bar on --editable .
	@touch $@

$(VENV)/.development: pyproject.toml | $(VENV)/.prerequisites
	@echo "== installing what training and tests need (torch: some minutes the first time)"
	@$(PIP) install --progress-bar on --editable '.[train,dev]'
	@touch $@ $(VENV)/.runtime

$(BIN)/lmplz: | $(VENV)/.development
	@echo "== building the KenLM tools"
	@training/install_lmplz.sh $(BIN)/python
