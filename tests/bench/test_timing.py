"""Who is timed, in which order, over which inputs, and what a process of its own measures."""

import time
from itertools import pairwise

import pytest
import torch

from bench import timing
from bench.timing import Rival

CPU = torch.device("cpu")


def test_the_clock_moves_only_when_told():
    clock = timing.Clock()
    assert clock() == clock() == 0
    clock.advance(0.25)
    assert clock() == 0.25


def test_seconds_on_the_cpu_are_wall_clock():
    called, host = timing.seconds(lambda: time.sleep(0.02), CPU)
    assert 0.02 <= called == host < 0.2


def test_every_round_has_everyone_once_and_the_order_changes():
    calls = []
    rivals = {name: Rival(lambda _, name=name: calls.append(name)) for name in "abc"}
    samples, failed = timing.interleaved(rivals, [()], CPU, budget=0, rounds=(5, 5))
    assert not failed
    assert {name: len(taken.called) for name, taken in samples.items()} == dict.fromkeys("abc", 5)
    assert all(taken.device is taken.called and not taken.host for taken in samples.values())
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 6  # the first warms up
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 1


def test_turns_take_the_next_input_set():
    seen = []
    rivals = {name: Rival(seen.append, lambda i: i) for name in "ab"}
    timing.interleaved(rivals, [(0,), (1,), (2,)], CPU, budget=0, rounds=(3, 3))
    assert all((i + 1) % 3 == j for i, j in pairwise(seen))


def test_preparing_and_the_first_round_are_not_counted():
    warm = []

    def run(_):
        if not warm:
            time.sleep(0.2)
        warm.append(1)

    samples, _ = timing.interleaved(
        {"slow to prepare": Rival(run, lambda: time.sleep(0.05))}, [()], CPU, budget=0, rounds=(3, 3)
    )
    assert max(samples["slow to prepare"].called) < 0.03


def test_who_raises_is_named_and_the_others_go_on():
    turns = []

    def late(_):
        turns.append(1)
        if len(turns) == 3:
            raise MemoryError("out of memory\nwith details")

    def early(_):
        raise ValueError("no such shape")

    rivals = {"early": Rival(early), "late": Rival(late), "fine": Rival(lambda _: None)}
    samples, failed = timing.interleaved(rivals, [()], CPU, budget=0, rounds=(4, 4))
    assert failed == {"early": "ValueError: no such shape", "late": "MemoryError: out of memory"}
    assert samples.keys() == {"fine"}
    assert len(samples["fine"].called) == 4


@pytest.mark.parametrize(("budget", "count"), [(0, 2), (60, 4)])
def test_the_budget_sets_the_rounds_within_their_bounds(budget, count):
    samples, _ = timing.interleaved({"a": Rival(lambda _: None)}, [()], CPU, budget=budget, rounds=(2, 4))
    assert len(samples["a"].called) == count


@pytest.mark.parametrize("nbytes", [1, 33, 100, 10_000])
def test_between_two_turns_on_a_set_the_others_fill_the_cache(monkeypatch, nbytes):
    monkeypatch.setattr(timing, "last_level_cache", lambda device: 100)
    sets = timing.sets_beyond_cache(nbytes, CPU)
    assert sets >= 2
    assert (sets - 1) * nbytes >= 100
    assert sets == 2 or (sets - 2) * nbytes < 100


def test_copies_and_products_do_what_the_floor_counts():
    assert timing.copy(1000, CPU).run(()).nbytes == 1000
    product = timing.matmul(8, torch.float32, CPU).run(())
    assert product.shape == (8, 8)
    assert product.abs().min() > 0


def test_median_and_quartiles():
    assert timing.spread([5.0, 1.0, 2.0, 4.0, 3.0]) == (3.0, 2.0, 4.0)
    assert timing.spread([7.0]) == (7.0, 7.0, 7.0)


MB = 1 << 20


def allocate(prepared, extra):
    """A case for ``peak_extra_bytes``: megabytes held before, and megabytes that come and go in the run."""
    return lambda: torch.ones(prepared * MB, dtype=torch.uint8), lambda held: torch.ones(extra * MB, dtype=torch.uint8)


def test_peak_of_a_process_of_its_own():
    grown = timing.peak_extra_bytes(f"{__name__}:allocate", 200, 64)
    assert 63 * MB <= grown <= 72 * MB  # the system counts pages in batches


def test_a_case_that_fails_says_so():
    with pytest.raises(RuntimeError, match="has no attribute 'nothing'"):
        timing.peak_extra_bytes(f"{__name__}:nothing")
