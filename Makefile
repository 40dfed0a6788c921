# `make demo` and `make test` set up everything on a machine with python3 and g++ alone.
#
#   PYTHON=python3.12   interpreter the virtual environment is made from
#   VENV=.venv          where it is made. VENV= (empty) installs nothing and uses PYTHON with its own torch, as inside
#                       a ready GPU environment: make test-gpu VENV=
#   ARGS=...            handed on to the demo, pytest or the benchmarks
#   FLOWATTN_CUDA, FLOWATTN_CUDA_ARCHS, FLOWATTN_NATIVE, CXX, CUDA_HOME, MAX_JOBS: see setup.py

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PYTHONUNBUFFERED = 1
CPP = $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
TORCH = $(shell sed -n 's/^torch==//p' constraints.txt)
NVCC = $(shell PATH="$$CUDA_HOME/bin:$$PATH:/usr/local/cuda/bin" command -v nvcc)

ifeq ($(strip $(VENV)),)
RUN = PYTHONPATH=$(CURDIR)/python $(PYTHON)
ready = native
else
BIN = $(VENV)/bin/
RUN = $(BIN)python
PIP = $(BIN)python -m pip install --no-build-isolation -c constraints.txt
ready = native $(VENV)/.$(1)
endif

.PHONY: help demo test test-gpu bench lint format cuda-check native clean
.NOTPARALLEL:

help:  ## this text
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14
	@sed -n '2,/^$$/s/^#//p' Makefile

demo: $(call ready,demo)  ## set up, then run the demo: a table, and pictures under out/
	$(RUN) examples/demo.py $(ARGS)

test: lint $(if $(NVCC),cuda-check)  ## set up, then lint, cuda-check (where nvcc is) and the whole test suite
	$(RUN) -m flowattn.info
	$(RUN) -m pytest -n auto --dist loadfile $(ARGS)

test-gpu: $(call ready,test)  ## the test suite on an NVIDIA GPU
	$(RUN) -m flowattn.info
	@$(RUN) -c "import torch, sys; sys.exit(None if torch.cuda.is_available() else 'test-gpu: torch sees no GPU')"
	$(RUN) -m pytest --ignore tests/test_packaging.py $(ARGS)

bench: $(call ready,bench)  ## the microbenchmarks: make bench ARGS="varlen_attention --plot"
	$(RUN) -m flowattn.bench $(ARGS)

lint: $(call ready,test)  ## ruff and clang-format, changing nothing
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(BIN)clang-format --dry-run -Werror $(CPP)

format: $(call ready,test)  ## ruff and clang-format, in place
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(BIN)clang-format -i $(CPP)

cuda-check: $(call ready,test)  ## compile every .cu for sm_80 and sm_90a and load the result; needs nvcc, no GPU
	$(RUN) setup.py cuda_check

clean:  ## remove everything built, except the virtual environment
	rm -rf build dist *.egg-info out .pytest_cache .ruff_cache .benchmarks
	rm -f python/flowattn/*.so python/flowattn/_build.json python/flowattn/triton_kernels
	find . -path "./$(VENV)" -prune -o -name __pycache__ -prune -exec rm -rf {} +

# ninja decides what is out of date, in a quarter of a second where nothing is. Before pip, which hides the progress.
native: $(if $(VENV),$(VENV)/.torch)
	@$(RUN) setup.py -q build_ext --inplace

# One stamp a step. torch comes first and pinned, so that nothing later can bring another build of it.
$(VENV)/.made:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
	{ echo "error: $(PYTHON) must be Python 3.10 or later (make PYTHON=python3.12 ...)"; exit 1; }
	@$(PYTHON) -c "import ensurepip" 2>/dev/null || \
	{ echo "error: $(PYTHON) cannot make a virtual environment (apt-get install python3-venv python3-dev)"; exit 1; }
	@echo "== creating $(VENV)"
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Without a GPU the CPU build, where the configured index has it.
$(VENV)/.torch: $(VENV)/.made constraints.txt
	@echo "== installing torch $(TORCH) and the build tools"
	@if nvidia-smi >/dev/null 2>&1; then $(PIP) torch; else $(PIP) torch==$(TORCH)+cpu 2>/dev/null || $(PIP) torch; fi
	$(PIP) "setuptools>=77" ninja "pybind11>=2.13"
	@touch $@

EXTRAS_test = test,lint
EXTRAS_demo = demo
EXTRAS_bench = bench
$(VENV)/.test $(VENV)/.demo $(VENV)/.bench: $(VENV)/.%: $(VENV)/.torch pyproject.toml setup.py build_backend.py
	@echo "== installing flowattn[$(EXTRAS_$*)]"
	$(PIP) -e ".[$(EXTRAS_$*)]"
	@touch $@
