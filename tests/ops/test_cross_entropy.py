"""``cross_entropy`` alone; what it shares with the other loss is in test_losses.py."""

import pytest
import torch
import torch.nn.functional as F

from sft_kernels import cross_entropy
from sft_kernels._budget import check
from sft_kernels.ops.cross_entropy import api

from .helpers import CROSS_ENTROPY, DTYPES, N, V, check_against_plain, labels, run, same_bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_returns_the_dtype_that_torch_returns(dtype, reduction):
    (logits,), y = CROSS_ENTROPY.tensors(dtype), labels()
    assert cross_entropy(logits, y, reduction=reduction).dtype == F.cross_entropy(logits, y, reduction=reduction).dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_returns_the_dtype_that_torch_returns_under_autocast(dtype):
    (logits,), y = CROSS_ENTROPY.tensors(dtype), labels()
    with torch.autocast("cpu", torch.bfloat16):
        assert cross_entropy(logits, y).dtype == F.cross_entropy(logits, y).dtype


def test_one_row_without_a_batch():
    logits, y = torch.randn(V), torch.tensor(7)
    for reduction in ("mean", "sum", "none"):
        check_against_plain(
            lambda x: cross_entropy(x, y, reduction=reduction),  # noqa: B023
            lambda x: F.cross_entropy(x, y, reduction=reduction),  # noqa: B023
            [logits],
        )
    assert cross_entropy(logits, torch.tensor(-100)) == 0


def test_blocks_of_copied_rows_change_no_bit(monkeypatch):
    (logits,), y = CROSS_ENTROPY.tensors(), labels()
    whole = run(lambda x: cross_entropy(x, y), [logits])
    monkeypatch.setitem(api._BLOCK_BYTES, "cpu", 1)  # one row at a time
    assert same_bits(run(lambda x: cross_entropy(x, y), [logits]), whole)


@pytest.mark.parametrize("offset", [0, 40, 1000])
def test_tokens_that_the_model_is_sure_of_keep_a_gradient_with_digits(offset):
    (logits,), y = CROSS_ENTROPY.tensors(), labels(masked=0)
    logits = (logits + offset).scatter(1, y[:, None], offset + 20.0)
    CROSS_ENTROPY.check([logits], y)


def test_classes_ruled_out_by_minus_infinity():
    (logits,), y = CROSS_ENTROPY.tensors(), labels()
    logits[:, 50:] = float("-inf")
    y[y >= 50] = 3
    CROSS_ENTROPY.check([logits], y)
    kept = logits[y != -100, :50]
    _, stats = cross_entropy(logits, y, return_stats=True)
    ref, eager = (torch.distributions.Categorical(logits=x).entropy().sum() for x in (kept.double(), kept))
    check("entropy_sum", stats.entropy_sum, ref, eager)


def test_a_label_that_is_ruled_out_costs_infinity_as_in_torch():
    (logits,), y = CROSS_ENTROPY.tensors(), labels()
    logits[0, y[0]] = float("-inf")
    CROSS_ENTROPY.check([logits], y)


@pytest.mark.parametrize("shape", [(), (N, 0), (0,)], ids=str)
def test_logits_of_another_shape_are_named(shape):
    with pytest.raises(ValueError, match="input"):
        cross_entropy(torch.randn(shape), labels())
