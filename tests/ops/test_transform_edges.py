"""The losses and attention at the edges of torch's transforms: checkpoints, autocast, bad input, fake tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from sft_kernels import cross_entropy, linear_cross_entropy

N, V, D = 6, 9, 4
Y = torch.tensor([0, 3, -100, 8, 2, 1])


@pytest.fixture(autouse=True)
def _poison_unwritten_memory():
    """Off: what it wraps cannot be traced."""


def of_logits(hidden, head):
    return cross_entropy(hidden @ head.T, Y)


def of_a_head(hidden, head):
    return linear_cross_entropy(hidden, head, Y)


LOSSES = pytest.mark.parametrize("loss", [of_logits, of_a_head])


def leaves():
    return [torch.randn(n, D, requires_grad=True) for n in (N, V)]


@LOSSES
def test_a_checkpointed_loss_has_second_derivatives_and_batches_of_gradients(loss):
    inputs = leaves()
    found, wanted = (checkpoint(f, *inputs, use_reentrant=False) for f in (loss, _torchs))
    first = [torch.autograd.grad(value, inputs, create_graph=True) for value in (found, wanted)]
    second = [torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs) for gradients in first]
    torch.testing.assert_close(*first)
    torch.testing.assert_close(*second)
    batches = [
        torch.autograd.grad(checkpoint(f, *inputs, use_reentrant=False), inputs, torch.ones(2), is_grads_batched=True)
        for f in (loss, _torchs)
    ]
    torch.testing.assert_close(*batches)


def _torchs(hidden, head):
    return F.cross_entropy(hidden @ head.T, Y)


def test_autocast_around_the_backward_rounds_no_gradient_that_has_a_graph():
    inputs = leaves()
    value = of_a_head(*inputs)
    wanted = torch.autograd.grad(value, inputs, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(value, inputs, create_graph=True)
    torch.testing.assert_close(found, wanted)
