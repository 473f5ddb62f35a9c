# Two commands on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LMMS_EVAL := $(VENV)/.lmms-eval
VLLM := .venv-vllm
# The interpreter must be new enough before anything is downloaded.
CHECK := import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Give another: make PYTHON=/path/to/python3.11")

.PHONY: demo test test-fast test-vllm lint format docs clean help
.DEFAULT_GOAL := help

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c '$(CHECK)'
	@$(PYTHON) -m venv $(VENV) || { echo "cannot create a virtual environment; on Debian: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[train,eval,serve,web,demo,data,deepspeed,quantize,dev]"
	@touch $@

# Without its dependencies but those in the list: they would bring another torch.
$(LMMS_EVAL): $(INSTALLED) tests/integrations/lmms-eval.txt
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt -r tests/integrations/lmms-eval.txt
	@touch $@

demo: $(INSTALLED) ## set up, then train, evaluate and question a model on real weights and images (about 10 minutes)
	$(BIN)/python examples/demo $(ARGS)

test: $(LMMS_EVAL) ## set up, then run all tests, on this machine's devices and on the simulated NPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder --simulated-npu $(ARGS)

test-fast: $(INSTALLED) ## the tests that take less than about 2 seconds each, on this machine's devices (under 3 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadscope -m "not slow" $(ARGS)

$(VLLM)/.installed: tests/in_vllm/install.sh constraints.txt
	rm -rf $(VLLM)
	tests/in_vllm/install.sh $(VLLM) $(PYTHON)

test-vllm: $(VLLM)/.installed ## open exported models in a real vLLM, in an environment of its own (Linux; 1 GB)
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/in_vllm $(ARGS)

lint: $(INSTALLED) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## fix style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED) ## generate the reference pages and build the site into site/; broken links are errors
	$(BIN)/python -m llava_npu.config.reference > docs/configuration.md
	$(BIN)/python -m llava_npu.evaluation.reports.reference > docs/evaluation.md
	$(BIN)/mkdocs build --strict --quiet

clean: ## remove the environment and caches
	rm -rf $(VENV) $(VLLM) site .pytest_cache .mypy_cache .ruff_cache .hypothesis
