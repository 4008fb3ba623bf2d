"""Runs an example as it stands and as it was without our lines, and holds one to the other."""

import random
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.utils.data._utils.fetch import _MapDatasetFetcher

FOLDER = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(FOLDER))

from diff import diff, stock  # noqa: E402

MOST_LINES = 3


def source(name, ours=True):
    """Returns the text of ``examples/<name>.py``, with our lines or without."""
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    return text if ours else stock(text)


def load(name, ours=True):
    """Returns the example as a module, with our lines or without."""
    module = types.ModuleType(f"{name}_{'ours' if ours else 'stock'}")
    sys.modules[module.__name__] = module
    exec(compile(source(name, ours), str(FOLDER / f"{name}.py"), "exec"), module.__dict__)
    return module


def run(name, ours=True, reorder=None, **options):
    """Returns what ``main(**options)`` of the example returns; ``reorder`` is applied to the list of each batch."""
    random.seed(0)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        if reorder is not None:
            fetch = _MapDatasetFetcher.fetch
            patch.setattr(_MapDatasetFetcher, "fetch", lambda self, indices: fetch(self, reorder(indices)))
        return load(name, ours).main(**options)


def parameters(model):
    """Returns all parameters as one fp64 vector, in the order of their names."""
    return torch.cat([p.detach().double().flatten() for _, p in sorted(model.named_parameters())])


def assert_trains_as_stock(name, model_of=lambda result: result, **options):
    """Hold the example's parameters after training to those of the stock program.

    They may differ by 3 times as much as those of the stock program with each batch in reverse order.

    Returns:
        What ``main`` of our program returned.
    """
    ours = run(name, **options)
    was = parameters(model_of(run(name, ours=False, **options)))
    reordered = parameters(model_of(run(name, ours=False, reorder=lambda indices: indices[::-1], **options)))
    permutation, swap = (float((other - was).norm()) for other in (reordered, parameters(model_of(ours))))
    assert 0 < permutation < 1e-3 * float(was.norm())
    assert swap <= 3 * permutation, f"off by {swap:.2e}, a permutation of each batch by {permutation:.2e}"
    return ours


def assert_small_diff(name):
    """At most three lines come, and at most three go."""
    changed = diff(source(name)).splitlines()
    for sign in "+-":
        lines = [line for line in changed if line.startswith(sign)]
        assert len(lines) <= MOST_LINES, f"{name}: {len(lines)} lines with {sign}"
