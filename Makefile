# make demo and make test each do all their own set-up.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test lint verify bench

install: .venv/installed

.venv/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --constraint constraints.txt --editable '.[train,dev]'
	touch $@

demo: install
	$(BIN)/sft-kernels demo --out out/demo

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

verify: install
	$(BIN)/sft-kernels verify

bench: install
	$(BIN)/python -m pytest bench/bench_*.py -q -rfE --benchmark-quiet
