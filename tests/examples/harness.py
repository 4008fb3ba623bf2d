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

import small  # noqa: E402
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


def run(name, ours=True, reorder=None, nudge=False, **options):
    """Returns what ``main(**options)`` of the example returns.

    Args:
        reorder: applied to the list of each batch.
        nudge: the model starts from parameters of which two thirds are off in the last bit.
    """
    random.seed(0)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        if reorder is not None:
            fetch = _MapDatasetFetcher.fetch
            patch.setattr(_MapDatasetFetcher, "fetch", lambda self, indices: fetch(self, reorder(indices)))
        if nudge:
            model = small.model
            patch.setattr(small, "model", lambda **config: nudged(model(**config)))
        return load(name, ours).main(**options)


def reverse(indices):
    """Returns the list of a batch in reverse order."""
    return indices[::-1]


@torch.no_grad()
def nudged(model):
    """Returns ``model`` with parameters multiplied by 1 − 2⁻²³, 1 or 1 + 2⁻²³ at random."""
    random_bits = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.mul_(1 + 2.0**-23 * (torch.randint(3, p.shape, generator=random_bits) - 1))
    return model


# Two changes to the stock program that leave it right; ours is measured by the larger effect. Adam
# divides a gradient by its own size the first time it sees it, so a gradient near zero makes a large
# step out of its rounding. Another order leaves the gradients of a single row's tokens as they are, to
# the bit; the nudge rounds all of them differently.
HARMLESS = ({"reorder": reverse}, {"nudge": True})


def parameters(model):
    """Returns all parameters as one fp64 vector, in the order of their names."""
    return torch.cat([p.detach().double().flatten() for _, p in sorted(model.named_parameters())])


def assert_trains_as_stock(name, model_of=lambda result: result, **options):
    """Hold the example's parameters after training to those of the stock program.

    Returns:
        What ``main`` of our program returned.
    """
    ours = run(name, **options)
    stock, *harmless = (parameters(model_of(run(name, ours=False, **change, **options))) for change in ({}, *HARMLESS))
    assert_alike(parameters(model_of(ours)), stock, harmless)
    return ours


def assert_alike(ours, stock, harmless):
    """Parameters may differ from the stock program's by 3 times what the largest harmless change does."""
    swap, *changes = (float((other - stock).norm()) for other in (ours, *harmless))
    assert 0 < max(changes) < 1e-3 * float(stock.norm())
    assert swap <= 3 * max(changes), f"off by {swap:.2e}, harmless changes to the stock program by {changes}"


def assert_small_diff(name):
    """At most three lines come, and at most three go."""
    changed = diff(source(name)).splitlines()
    for sign in "+-":
        lines = [line for line in changed if line.startswith(sign)]
        assert len(lines) <= MOST_LINES, f"{name}: {len(lines)} lines with {sign}"
