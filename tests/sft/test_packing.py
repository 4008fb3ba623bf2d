import random
import time

import pytest
import torch

from sft_kernels.sft.masking import IGNORE, Example
from sft_kernels.sft.packing import collate, pack


def plain_best_fit(lengths, capacity):
    """Best-fit-decreasing by looking at every row."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fits = [room for room in rooms if room >= length]
        if fits:
            rooms.remove(min(fits))
            rooms.append(min(fits) - length)
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@pytest.mark.parametrize("capacity", [1, 2, 7, 64, 100])
@pytest.mark.parametrize("seed", range(5))
def test_packs_as_best_fit_decreasing_does(capacity, seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, capacity) for _ in range(200)]
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(200))
    assert sorted(capacity - sum(lengths[i] for i in row) for row in rows) == plain_best_fit(lengths, capacity)


def test_no_example_no_row():
    assert pack([], 10) == []


@pytest.mark.parametrize("length", [0, 11])
def test_a_length_that_cannot_be_packed_is_named(length):
    with pytest.raises(ValueError, match=f"got {length} at 1"):
        pack([3, length], 10)


def test_many_examples_pack_in_time_that_hardly_grows_with_the_row():
    """Looking at every row, or every room, would take minutes."""
    rng = random.Random(0)
    lengths = [min(65536, max(16, int(rng.lognormvariate(7, 1)))) for _ in range(100_000)]
    start = time.perf_counter()
    rows = pack(lengths, 65536)
    assert time.perf_counter() - start < 20
    assert len(rows) == -(-sum(lengths) // 65536)  # so many short ones fill every gap


def example(length, kept, first=100):
    ids = list(range(first, first + length))
    return Example(ids, [IGNORE] * (length - kept) + ids[length - kept :], "x:1")


ROWS = [[example(4, 2), example(3, 1, 200)], [example(6, 3, 300)]]


def test_every_segment_restarts_and_padding_is_one_of_its_own():
    batch = collate(ROWS, 8, pad_id=0)
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 8, 14, 16]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 0, 1, 2, 3, 4, 5, 0, 1]
    assert (batch.max_seqlen, batch.examples, batch.rows, batch.tokens) == (6, 3, 2, 16)


def test_labels_are_shifted_once_and_never_across_a_boundary():
    batch = collate(ROWS, 8, pad_id=0)
    ids, segment = batch.input_ids[0], torch.bucketize(torch.arange(16), batch.cu_seqlens[1:], right=True)
    assert batch.kept.count == 6
    assert batch.kept.targets.equal(ids[batch.kept.rows + 1])
    assert segment[batch.kept.rows].equal(segment[batch.kept.rows + 1])


def test_a_full_row_has_no_padding():
    batch = collate([[example(8, 1)]], 8, pad_id=0)
    assert batch.cu_seqlens.tolist() == [0, 8]


def test_examples_weigh_the_same():
    batch = collate(ROWS, 8, pad_id=0, weigh_examples=True)
    weights = batch.token_weight[0, batch.kept.rows + 1]
    assert weights.tolist() == pytest.approx([1 / 2, 1 / 2, 1, 1 / 3, 1 / 3, 1 / 3])


def test_a_row_that_overflows_is_refused():
    with pytest.raises(ValueError, match="7 tokens in a row of 6"):
        collate(ROWS[:1], 6, pad_id=0)
