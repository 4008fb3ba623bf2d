"""The oracles, checked once against torch's float64 autograd."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sft_kernels.ops.adamw import reference as adamw
from sft_kernels.ops.linear_cross_entropy.reference import linear_cross_entropy
from sft_kernels.ops.packed_attention.reference import packed_attention
from sft_kernels.ops.softmax_grad.reference import masked_loss

from .helpers import labels

CLOSE = {"rtol": 1e-11, "atol": 1e-13}
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"softcap": 3.0},
    {"logit_scale": 0.25},
    {"z_loss": 0.01},
    {"label_smoothing": 0.2, "softcap": 5.0, "logit_scale": 2.0, "z_loss": 0.1},
]


def torch_losses(logits, target, weight=None, *, label_smoothing=0.0, softcap=None, logit_scale=1.0, z_loss=0.0):
    u = logit_scale * logits
    u = u if softcap is None else softcap * torch.tanh(u / softcap)
    losses = F.cross_entropy(u, target, weight, reduction="none", label_smoothing=label_smoothing)
    factor = torch.ones_like(losses)
    if weight is not None:
        factor = target @ weight if target.dim() == 2 else weight[target.clamp(min=0)]
    if target.dim() == 1:
        factor = factor * (target != -100)
    return losses + z_loss * factor * u.logsumexp(1) ** 2


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses(options, reduction):
    x, w, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((30, 8), (17, 8), (17,)))
    y, weight = labels(30, 17), torch.rand(30, dtype=torch.float64)
    upstream = torch.randn(30 if reduction == "none" else (), dtype=torch.float64)
    losses = weight * torch_losses(F.linear(x, w, b), y, **options)
    reduced = {"mean": losses.sum() / (y != -100).sum(), "sum": losses.sum(), "none": losses}[reduction]
    reduced.backward(upstream)

    arrays = (t.detach().numpy() for t in (x, w))
    common = {"token_weight": weight.numpy(), "upstream": upstream.numpy(), "reduction": reduction}
    out = linear_cross_entropy(*arrays, y.numpy(), linear_bias=b.detach().numpy(), **common, **options)
    np.testing.assert_allclose(out.loss, reduced.detach(), **CLOSE)
    for gradient, leaf in zip(out[1:], (x, w, b), strict=True):
        np.testing.assert_allclose(gradient, leaf.grad, **CLOSE)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_with_class_weights_and_probabilities(options, reduction, soft, weighted):
    x = torch.randn(30, 17, dtype=torch.float64, requires_grad=True)
    target = torch.randn(30, 17, dtype=torch.float64).softmax(1).requires_grad_() if soft else labels(30, 17)
    weight = torch.rand(17, dtype=torch.float64) if weighted else None
    upstream = torch.randn(30 if reduction == "none" else (), dtype=torch.float64)
    losses = torch_losses(x, target, weight, **options)
    if soft:
        divisor = 30
    else:
        divisor = (torch.ones(17) if weight is None else weight)[target[target != -100]].sum()
    reduced = {"mean": losses.sum() / divisor, "sum": losses.sum(), "none": losses}[reduction]
    reduced.backward(upstream)

    common = {
        "upstream": upstream.numpy(),
        "reduction": reduction,
        "weight": None if weight is None else weight.numpy(),
    }
    out = masked_loss(x.detach().numpy(), target.detach().numpy(), **common, **options)
    np.testing.assert_allclose(out.loss, reduced.detach(), **CLOSE)
    np.testing.assert_allclose(out.dlogits, x.grad, **CLOSE)
    if soft:
        np.testing.assert_allclose(out.rows.dtarget, target.grad, **CLOSE)


def test_row_statistics():
    x, y = torch.randn(20, 9, dtype=torch.float64), labels(20, 9)
    x[:, 3] = float("-inf")
    y[y == 3] = 4
    rows = masked_loss(x.numpy(), y.numpy()).rows
    kept = y != -100
    p = x[kept].softmax(1)
    np.testing.assert_allclose(rows.lse, x[kept].logsumexp(1), **CLOSE)
    np.testing.assert_allclose(rows.nll, F.cross_entropy(x[kept], y[kept], reduction="none"), **CLOSE)
    np.testing.assert_allclose(rows.entropy, torch.special.entr(p).sum(1), **CLOSE)
    assert rows.correct.tolist() == (p.argmax(1) == y[kept]).tolist()


def test_shift_judges_a_row_by_the_next_label_and_its_weight():
    x, w, weight = (torch.randn(*shape).double().numpy() for shape in ((6, 4), (5, 4), (6,)))
    y = np.array([-100, 1, -100, 3, 4, 0])
    shifted = linear_cross_entropy(x, w, y, shift=True, token_weight=weight)
    plain = linear_cross_entropy(x[:-1], w, y[1:], token_weight=weight[1:])
    assert shifted.loss == plain.loss
    np.testing.assert_array_equal(shifted.dinput, np.vstack([plain.dinput, np.zeros(4)]))


def test_nothing_kept_is_zero():
    out = linear_cross_entropy(np.ones((3, 2)), np.ones((4, 2)), np.full(3, -100))
    assert out.loss == 0
    assert not out.dinput.any()
    assert not out.dweight.any()


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}, {"weight_decay": 0.0}], ids=str)
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_adamw(options, max_grad_norm):
    leaves = [torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.randn(4, dtype=torch.float64)]
    leaves[1].requires_grad_()
    params, states = [p.detach().numpy().copy() for p in leaves], [{}, {}]
    optimizer = torch.optim.AdamW(leaves, **{"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.1, **options})
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, **options}
    for t in range(20):
        for p in leaves:
            p.grad = torch.randn_like(p)
        if t % 3 == 2:
            leaves[1].grad = None
        grads = [None if p.grad is None else p.grad.numpy().copy() for p in leaves]
        expected_norm = torch.nn.utils.get_total_norm([p.grad for p in leaves if p.grad is not None])
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(leaves, max_grad_norm)
        optimizer.step()
        params, states, norm, skipped = adamw.step(params, grads, states, max_grad_norm=max_grad_norm, **options)
        assert not skipped
        np.testing.assert_allclose(norm, expected_norm, **CLOSE)
        for p, leaf in zip(params, leaves, strict=True):
            np.testing.assert_allclose(p, leaf.detach(), **CLOSE)


def test_adamw_skips_a_step_that_is_not_finite():
    params, states = [np.ones(2)], [{}]
    out = adamw.step(params, [np.array([1.0, np.nan])], states, skip_nonfinite=True, lr=1)
    assert out[0] is params
    assert out[1] is states
    assert out[3]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window_size", [(-1, -1), (2, 1), (0, 3)])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_packed_attention(causal, window_size, softcap):
    bounds, T, Hq, Hkv, D = [0, 5, 5, 6, 13], 15, 4, 2, 6
    q, k, v = (torch.randn(T, h, D, dtype=torch.float64, requires_grad=True) for h in (Hq, Hkv, Hkv))
    dout = torch.randn(T, Hq, D, dtype=torch.float64)

    segment = torch.bucketize(torch.arange(T), torch.tensor(bounds[1:]), right=True)
    ahead = torch.arange(T)[None] - torch.arange(T)[:, None]
    left, right = (size if size >= 0 else T for size in window_size)
    seen = (segment[None] == segment[:, None]) & (ahead >= -left) & (ahead <= (min(right, 0) if causal else right))
    scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(2, 1)) * D**-0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    expected = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v.repeat_interleave(2, 1))[: bounds[-1]]
    expected.backward(dout[: bounds[-1]])

    arrays = (t.detach().numpy() for t in (q, k, v))
    options = {"causal": causal, "window_size": window_size, "softcap": softcap}
    out = packed_attention(*arrays, bounds, dout.numpy(), **options)
    np.testing.assert_allclose(out.out[: bounds[-1]], expected.detach(), **CLOSE)
    np.testing.assert_allclose(out.lse[:, : bounds[-1]], scores.logsumexp(-1)[:, : bounds[-1]].detach(), **CLOSE)
    assert (out.lse[:, bounds[-1] :] == -np.inf).all()
    assert not out.out[bounds[-1] :].any()
    for gradient, leaf in zip(out[2:], (q, k, v), strict=True):
        np.testing.assert_allclose(gradient, leaf.grad, **CLOSE)
