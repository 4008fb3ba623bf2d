"""Two examples worked by hand: the masked mean, and the schedule."""

import math

import pytest
import torch

from sft_kernels import cross_entropy, linear_cross_entropy
from sft_kernels.sft.lr import cosine_factor

LOSSES = [0.10, 2.80, 1.40, 0.20, 0.10, 1.20, 0.90, 0.40]


def logits_with(losses):
    """Two-class logits whose cross-entropy against class 0 is ``losses``."""
    p = torch.tensor(losses, dtype=torch.float64).neg().exp()
    return torch.stack([p.log(), (1 - p).log()], dim=1)


@pytest.mark.parametrize(("kept", "expected"), [(3, 2.5 / 3), (8, 7.1 / 8)])
@pytest.mark.parametrize("loss", [cross_entropy, lambda x, y: linear_cross_entropy(x, torch.eye(2, dtype=x.dtype), y)])
def test_masked_mean(loss, kept, expected):
    target = torch.full((8,), -100)
    target[8 - kept :] = 0
    assert float(loss(logits_with(LOSSES), target)) == pytest.approx(expected, abs=1e-12)


def test_schedule():
    factors = [cosine_factor(t, total=10, warmup=2) for t in range(10)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[2:] == [pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (t - 2) / 8))) for t in range(2, 10)]
    assert round(factors[9], 3) == 0.134


def test_schedule_without_warmup_starts_at_the_peak():
    assert cosine_factor(0, 10, 0) == 1.0


def test_schedule_stays_at_the_floor_past_its_end():
    assert cosine_factor(12, 10, 2) == 0.1


@pytest.mark.parametrize("warmup", [-1, 11])
def test_warmup_outside_the_run_is_refused(warmup):
    with pytest.raises(ValueError, match="warmup"):
        cosine_factor(0, 10, warmup)
