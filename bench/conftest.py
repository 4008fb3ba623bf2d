"""The suites as pytest-benchmark runs them: a test a row, its cell measured once, its samples handed over."""

import os
from pathlib import Path

import pytest
import torch

from .facts import ROOT, code_state
from .results import Results, plot, table
from .timing import CLOCK

_OPENED = pytest.StashKey()


def pytest_addoption(parser):
    group = parser.getgroup("suites")
    group.addoption("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--tiny", action="store_true", help="shapes for a rehearsal; its timings are no figures")
    group.addoption(
        "--rivals",
        choices=("all", "quick", "slow"),
        default="all",
        help="slow: those that compile for half a minute and more; quick: the others",
    )
    group.addoption("--results", type=Path, default=ROOT / "bench" / "results", help="folder of the JSON files")
    group.addoption("--plots", type=Path, default=ROOT / "out" / "bench", help="folder of the PNG files")


def pytest_configure(config):
    config.stash[_OPENED] = {}
    code_state()  # now: later it might be that of a commit made during the run


def _suite(config, module):
    """The module's suite and its results file, opened by whoever needs it first."""
    opened = config.stash[_OPENED]
    if module.__name__ not in opened:
        suite = module.SUITE(*map(config.getoption, ("--device", "--tiny", "--rivals")))
        opened[module.__name__] = [suite, None]
    return opened[module.__name__]


def pytest_generate_tests(metafunc):
    if "row" in metafunc.fixturenames:
        suite, _ = _suite(metafunc.config, metafunc.module)
        metafunc.parametrize("cell", suite.cells(), indirect=True, scope="module")
        metafunc.parametrize("name", suite.adapters())


@pytest.fixture(scope="module")
def cell(request):
    """One cell, measured with all its rivals, and written down."""
    opened = _suite(request.config, request.module)
    measured = opened[0].measure(request.param)
    if opened[1] is None:
        opened[1] = Results(opened[0], request.config.getoption("--results"))
    opened[1].add(measured)
    print(table(opened[1].document | {"cells": [measured]}), flush=True)  # shown with -s, also of a run that is killed
    return measured


@pytest.fixture
def row(benchmark, cell, name):
    """Hands one rival's samples to pytest-benchmark. Ours must run and be right; the table names a peer that is not."""

    def hand_over():
        benchmark.group = cell["cell"]
        found = cell["rows"][name]
        if name.startswith("ours"):
            if "raised" in found:
                pytest.fail(found["raised"])
            if not found.get("error", 0) <= 1:  # NaN is no pass
                pytest.fail(f"{name} is off by {found['error']:.3g} times the error budget")
        if "seconds" not in found:
            pytest.skip(found.get("absent") or f"raised {found['raised']}")
        benchmark.extra_info.update({key: value for key, value in found.items() if key != "seconds"})
        benchmark.extra_info["floor_seconds"] = cell["floor_seconds"]
        samples = iter(found["seconds"])
        benchmark.pedantic(lambda: CLOCK.advance(next(samples)), rounds=len(found["seconds"]))

    return hand_over


def pytest_terminal_summary(terminalreporter, config):
    for _, results in config.stash[_OPENED].values():
        if results is None:
            continue
        terminalreporter.section(results.path.stem)
        terminalreporter.write_line(table(results.document))
        terminalreporter.write_line(f"\n{_relative(results.path)}")
        try:
            png = plot(results.document, config.getoption("--plots") / f"{results.path.stem}.png")
        except ImportError as error:
            terminalreporter.write_line(f"no plot: {error}")
        else:
            terminalreporter.write_line(_relative(png))


def _relative(path):
    return os.path.relpath(path, ROOT)
