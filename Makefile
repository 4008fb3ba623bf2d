# make demo and make test each do all their own set-up.
PYTHON ?= python3
BIN := .venv/bin
# pyenv's python3.12 needs to be told which; any other ignores it.
PYTHON312 ?= PYENV_VERSION=3.12 python3.12
TORCH211 := .venv-torch211

.PHONY: install demo test test-torch211 compile-report-torch211 lint verify bench census cuda

install: .venv/installed

# Without isolation: the CUDA kernels, built where nvcc is, need the headers of the torch that will load them.
.venv/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --constraint constraints.txt 'setuptools>=77' torch
	$(BIN)/pip install --constraint constraints.txt --no-build-isolation --editable '.[train,integration,dev]'
	touch $@

# The same library again, in place; without nvcc an error.
cuda: install
	SFT_KERNELS_CUDA=1 $(BIN)/python setup.py build_ext --inplace

demo: install
	$(BIN)/sft-kernels demo --out out/demo

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

# A GPU image's versions, without a GPU. The package is not installed there: python -m takes it from this folder.
$(TORCH211)/installed: requirements-torch211.txt
	@$(PYTHON312) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || \
		{ echo 'make: *-torch211 needs Python 3.12: make PYTHON312=/path/to/python3.12' >&2; exit 1; }
	$(PYTHON312) -m venv --clear $(TORCH211)
	$(TORCH211)/bin/pip install --no-deps --requirement requirements-torch211.txt
	touch $@

test-torch211: $(TORCH211)/installed
	$(TORCH211)/bin/python -m pytest -n 2 --dist loadfile tests/ops tests/integrations \
		tests/test_interpreter.py tests/test_backend.py tests/test_verify.py

compile-report-torch211: $(TORCH211)/installed
	$(TORCH211)/bin/python -m bench.compile_report

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

verify: install
	$(BIN)/sft-kernels verify

bench: install
	$(BIN)/python -m pytest bench/bench_*.py -q -rfE --benchmark-quiet

# patch() and the attention's name on a small model of every class of transformers, and the masks on every chat
# template of trl; writes three pages into bench/results.
census: install
	$(BIN)/python -m bench.census
	$(BIN)/python -m bench.census_attention
	$(BIN)/python -m bench.census_templates
