"""The harness shows what it is there to show: every planted fault, and none where there is none."""

import ctypes

import pytest
import torch

from .host import Fault, Memory, function, needs_compiler

pytestmark = needs_compiler

FAULTS = (
    "none, no barrier, no second barrier, no cluster barrier, early end, no copy wait, read behind, write behind,"
    " write before, shared behind, left out, relaxed"
).split(", ")


def planted(fault, seed, at_end=True, grid=4, blocks=2, threads=96):
    """Sums over clusters and blocks and a count over warps, all twice; the same by torch."""
    given = torch.randint(-9, 10, (grid * threads, 4), generator=torch.Generator().manual_seed(seed)).float()
    out = torch.zeros(grid * threads)
    memory = Memory(at_end)
    arguments = (ctypes.c_void_p(memory(given)), ctypes.c_void_p(memory(out)), grid, blocks, threads)
    error = function("planted")(*arguments, FAULTS.index(fault), ctypes.c_uint64(seed))
    memory.give_back(error, out)
    of_clusters, of_blocks = (
        given[:, 0].reshape(n, -1).sum(1, keepdim=True).expand(-1, grid * threads // n).flatten()
        for n in (grid // blocks, grid)
    )
    positive = (given[:, 0].reshape(-1, 32) > 0).sum(1, keepdim=True).expand(-1, 32).flatten()
    return out, 2 * (of_clusters + of_blocks + positive)


@pytest.mark.parametrize(("grid", "blocks", "threads"), [(4, 2, 96), (8, 8, 64), (3, 1, 32), (2, 1, 1024)])
def test_a_kernel_without_a_fault_is_right_in_every_order(grid, blocks, threads):
    for seed in range(6):
        out, expected = planted("none", seed, seed % 2, grid, blocks, threads)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("fault", ["no barrier", "no second barrier", "no cluster barrier", "no copy wait"])
def test_a_race_gives_a_wrong_result(fault):
    wrong = 0
    for seed in range(6):
        out, expected = planted(fault, seed)
        wrong += not torch.equal(out, expected)
    assert wrong == 6


@pytest.mark.parametrize(
    ("fault", "message", "at_end"),
    [
        ("early end", "out of bounds", True),
        ("shared behind", "out of bounds", True),
        ("left out", "deadlock", True),
        ("relaxed", "relaxed arrival", True),
        ("read behind", "out of bounds", True),
        ("write behind", "out of bounds", True),
        ("write behind", "beside its memory", False),
        ("write before", "beside its memory", True),
        ("write before", "out of bounds", False),
    ],
)
def test_a_fault_is_named(fault, message, at_end):
    for seed in range(6):
        with pytest.raises(Fault, match=message):
            planted(fault, seed, at_end)
