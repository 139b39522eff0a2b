# Two commands do everything on a fresh machine: make finetune, make test. Needs Python 3.10-3.13; uses a C++ compiler and
# a CUDA toolkit where they are. ARGS goes to the command: make finetune ARGS="--drop-rate 0.5 --steps 100".
PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.setup-done
TEST_SETUP := $(VENV)/.test-setup-done
SOURCES := setup.py $(wildcard csrc/*.h csrc/*/*)
FORMATTED := $(filter %.h %.cpp %.cu %.cuh,$(SOURCES)) $(wildcard tests/*.cpp tests/*.h tests/*/*.cpp)

.DEFAULT_GOAL := help
.PHONY: help setup build finetune test sanitize bench bench-compare page lint format wheel clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and pinned: the build needs its headers, and pip's own build isolation would fetch a second torch.
$(SETUP): pyproject.toml constraints.txt $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt torch "setuptools>=77" wheel ninja "pybind11>=2.13"
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[finetune,triton]"
	@touch $@

# What only tests and benchmarks need comes apart: a fine-tuning does not wait for it.
$(TEST_SETUP): $(SETUP)
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[finetune,triton,test]"
	@touch $@

setup: $(TEST_SETUP) ## make .venv, install everything, build the kernels

build: $(SETUP) ## rebuild the kernels in place (only what changed)
	$(BIN)/python setup.py -q build_ext --inplace

finetune: $(SETUP) ## fine-tune a small model with and without dropping, and compare
	$(BIN)/dropbp-kernels finetune $(ARGS)

# As many processes as cores, a test file to each, in the order of tests/conftest.py; one thread each, and passive:
# threads that spin while they wait make every process slow where cores are shared.
test: $(TEST_SETUP) ## run the tests
	OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadscope --no-loadscope-reorder $(ARGS)

sanitize: $(TEST_SETUP) ## run the kernels under sanitizers: address and undefined behaviour; on a GPU compute-sanitizer
	$(BIN)/python tests/sanitize.py $(ARGS)

bench: $(TEST_SETUP) ## run the benchmarks; rows go to benchmarks/results
	$(BIN)/python -m benchmarks.run $(ARGS)

bench-compare: $(TEST_SETUP) ## compare speed with BASE=<commit>; fails above 10 % loss (ARGS="--quick" for two minutes)
	@test -n "$(BASE)" || { echo "bench-compare: name the commit to compare with: make bench-compare BASE=<commit>"; exit 2; }
	$(BIN)/python -m benchmarks.compare $(BASE) $(ARGS)

page: $(SETUP) ## write docs/kernels.md from the rows in benchmarks/results
	$(BIN)/python -m benchmarks.page

$(VENV)/.lint-done: pyproject.toml $(SETUP)
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[lint]"
	@touch $@

lint: $(VENV)/.lint-done ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)
	$(BIN)/mypy

format: $(VENV)/.lint-done ## rewrite sources in the house format
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(FORMATTED)

wheel: $(SETUP) ## build a wheel into dist/, with CUDA code where a CUDA toolkit is; needs no GPU
	rm -rf build/lib.* build/bdist.*  # a file deleted from the sources would live on there
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w dist .
	@ls -l dist/*.whl

clean: ## remove what was built; .venv stays
	rm -rf build dist *.egg-info dropbp_kernels/*.so $(SETUP)
