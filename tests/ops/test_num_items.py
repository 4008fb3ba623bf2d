"""``num_items`` of the losses: which numbers count."""

from fractions import Fraction

import pytest
import torch

from sft_kernels import cross_entropy, linear_cross_entropy

N, V, D = 6, 9, 4
X, HIDDEN, HEAD, Y = torch.randn(N, V), torch.randn(N, D), torch.randn(V, D), torch.arange(N)
LOSSES = pytest.mark.parametrize(
    "loss",
    [
        lambda n: cross_entropy(X, Y, num_items=n),
        lambda n: linear_cross_entropy(HIDDEN, HEAD, Y, num_items=n),
        lambda n: cross_entropy(X, Y, token_weight=torch.ones(N), num_items=n),
        lambda n: cross_entropy(X, X.softmax(1), num_items=n),
    ],
    ids=["logits", "head", "token weights", "probabilities"],
)


@LOSSES
def test_every_real_number_divides(loss):
    assert torch.equal(loss(Fraction(9, 2)), loss(4.5))
    assert torch.equal(loss(10**30), loss(1e30))
    assert torch.equal(loss(4), loss(torch.tensor(4)))


REFUSED = {
    "meta": (torch.tensor(3.0, device="meta"), ValueError, "a value for input on cpu, got meta"),
    "fp8": (torch.tensor(3.0).to(torch.float8_e4m3fn), TypeError, "got torch.float8_e4m3fn"),
    "too large": (10**400, ValueError, "no float holds"),
    "too large, exact": (Fraction(10**400, 3), ValueError, "no float holds"),
}


@LOSSES
@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_refused_by_name(loss, name):
    num_items, error, match = REFUSED[name]
    with pytest.raises(error, match=f"^num_items: .*{match}"):
        loss(num_items)
