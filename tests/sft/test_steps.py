from itertools import chain

import pytest

from sft_kernels.sft.masking import Example
from sft_kernels.sft.recipe import Recipe
from sft_kernels.sft.steps import Steps

EXAMPLES = [Example([i] * (3 + i % 5), [-100] + [i] * (2 + i % 5), f"chats.jsonl:{i + 1}") for i in range(23)]


def steps_of(**options):
    return Steps(EXAMPLES, Recipe(row_tokens=16, **{"rows": 1, "accumulate": 2, "steps": 20, **options}))


def sources(step):
    _, micro_batches = step
    return [example.source for rows in micro_batches for row in rows for example in row]


@pytest.mark.parametrize("options", [{}, {"rows": 2, "accumulate": 1}, {"steps": None, "epochs": 2.5}, {"seed": 3}])
def test_the_steps_after_any_are_the_same_from_whichever_one_begins(options):
    steps = steps_of(**options)
    whole = [*steps.after(0)]
    assert [number for number, _ in whole] == [*range(1, steps.total + 1)]
    for done in range(steps.total + 1):
        assert [*steps.after(done)] == whole[done:]


def test_every_epoch_has_every_example_once_in_an_order_of_its_own():
    steps = steps_of()
    assert 3 * steps.per_epoch <= steps.total
    whole = [sources(step) for step in steps.after(0)]
    epochs = [[*chain(*whole[i * steps.per_epoch : (i + 1) * steps.per_epoch])] for i in range(3)]
    everything = sorted(example.source for example in EXAMPLES)
    assert [sorted(epoch) for epoch in epochs] == [everything] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert [sources(step) for step in steps_of(seed=1).after(0)] != whole
