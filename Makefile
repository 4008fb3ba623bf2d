# make demo and make test each do all their own set-up.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test lint verify bench cuda

install: .venv/installed

# Without isolation: the CUDA kernels, built where nvcc is, need the headers of the torch that will load them.
.venv/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --constraint constraints.txt 'setuptools>=77' torch
	$(BIN)/pip install --constraint constraints.txt --no-build-isolation --editable '.[train,dev]'
	touch $@

# The same library again, in place; without nvcc an error.
cuda: install
	SFT_KERNELS_CUDA=1 $(BIN)/python setup.py build_ext --inplace

demo: install
	$(BIN)/sft-kernels demo --out out/demo

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

verify: install
	$(BIN)/sft-kernels verify

bench: install
	$(BIN)/python -m pytest bench/bench_*.py -q -rfE --benchmark-quiet
