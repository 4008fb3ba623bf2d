"""Ours in the place of torch's, for programs that look it up there: ``F.cross_entropy = sft_kernels.cross_entropy``."""

import pytest
import torch
import torch.nn.functional as F

import sft_kernels

N, D, V = 12, 5, 7


@pytest.fixture
def torchs(monkeypatch):
    """torch's own function, which ours replaces."""
    original = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", sft_kernels.cross_entropy)
    return original


@pytest.mark.parametrize("module", [False, True], ids=["function", "module"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy(torchs, module, options, weighted, soft):
    x, weight = torch.randn(N, V), torch.rand(V) if weighted else None
    y = torch.randn(N, V).softmax(1) if soft else torch.randint(0, V, (N,))
    if not soft:
        y[::3] = -100
    theirs, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = torchs(theirs, y, weight, **options)
    found = (
        torch.nn.CrossEntropyLoss(weight, **options)(ours, y) if module else F.cross_entropy(ours, y, weight, **options)
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*torch.autograd.grad(found, ours), *torch.autograd.grad(expected, theirs))


@pytest.mark.parametrize("soft", [False, True])
def test_compiled_torchs_own_code_is_found_too(torchs, soft):
    """A compiler looks functions up by their names, where ours stands now."""
    torch._dynamo.reset()
    x, weight = torch.randn(N, V, requires_grad=True), torch.rand(V)
    y = torch.randn(N, V).softmax(1) if soft else torch.randint(0, V, (N,))
    loss = torch.nn.CrossEntropyLoss(weight, label_smoothing=0.1)
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, y)
    torch.testing.assert_close(found, torchs(x, y, weight, label_smoothing=0.1))


def test_the_loss_of_a_head(torchs):
    h, head, weight, y = torch.randn(N, D), torch.randn(V, D), torch.rand(V), torch.randint(0, V, (N,))
    found = sft_kernels.linear_cross_entropy(h, head, y, weight=weight, label_smoothing=0.1)
    torch.testing.assert_close(found, torchs(h @ head.T, y, weight, label_smoothing=0.1))
