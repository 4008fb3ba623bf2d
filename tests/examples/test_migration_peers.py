"""Installed libraries do as ``examples/migration.md`` and the stand-ins say.

liger-kernel runs here in Triton's interpreter: put it on ``PYTHONPATH``.
"""

import inspect

import pytest
import torch
import torch.nn.functional as F

from . import stand_ins
from .test_migration import ROWS, found

N, D, V = 12, 16, 24
LIGER = ("liger_kernel.transformers", "liger-kernel is not installed")


def library(module, reason):
    return pytest.importorskip(module, reason=reason, exc_type=ImportError)


def parameters(function):
    """Returns names, defaults and kinds; without the default of ``impl``, which may be an enum."""
    signature = inspect.signature(function).parameters.values()
    return [(p.name, None if p.name == "impl" else p.default, p.kind) for p in signature]


def hold(real, recorded):
    for name in ("__init__", "forward"):
        if inspect.isclass(recorded) and hasattr(recorded, name):
            assert parameters(getattr(real, name)) == parameters(getattr(recorded, name))
    if not inspect.isclass(recorded):
        assert parameters(real) == parameters(recorded)


def real_liger():
    module = library(*LIGER)
    functional = pytest.importorskip("liger_kernel.transformers.functional")
    loss_utils = pytest.importorskip("liger_kernel.transformers.model.loss_utils")
    return {
        "FLCE": module.LigerFusedLinearCrossEntropyLoss,
        "liger_fused_linear_cross_entropy": functional.liger_fused_linear_cross_entropy,
        "LigerForCausalLMLoss": loss_utils.LigerForCausalLMLoss,
        "LigerCrossEntropyLoss": module.LigerCrossEntropyLoss,
    }


def test_signatures_of_liger():
    for name, real in real_liger().items():
        hold(real, stand_ins.LIGER[name])


def test_signatures_of_cut_cross_entropy():
    real = library("cut_cross_entropy", "cut-cross-entropy is not installed").linear_cross_entropy
    apples = "bias" in inspect.signature(real).parameters
    hold(real, stand_ins.cce_linear_cross_entropy if apples else stand_ins.cce_25_1_1)


def test_signatures_of_unsloth():
    module = library("unsloth_zoo.fused_losses", "unsloth is not installed")
    hold(module.unsloth_fused_ce_loss, stand_ins.unsloth_fused_ce_loss)
    hold(module.unsloth_masked_logprobs, stand_ins.unsloth_masked_logprobs)


def test_signatures_of_flash_attn_2():
    module = library("flash_attn.flash_attn_interface", "flash-attn 2 is not installed")
    for name in ("flash_attn_varlen_qkvpacked_func", "flash_attn_func"):
        hold(getattr(module, name), getattr(stand_ins, name))


def test_signatures_of_apex():
    hold(library("apex.optimizers", "apex is not installed").FusedAdam, stand_ins.FusedAdam)


@pytest.mark.parametrize("theirs", [row[1] for row in ROWS if row[0] == "Liger"], ids=str)
def test_liger_computes_the_formula(theirs, monkeypatch):
    real = real_liger()
    if not torch.cuda.is_available() and ("softcap" in theirs[0] or "class_weight" in theirs[0]):
        pytest.skip("Triton's interpreter hands its kernel a Python float, which has no .to()")
    expected, gradients = found("Liger", theirs, True, None)
    monkeypatch.setitem(stand_ins.OF_SECTION, "Liger", real)
    values, their_gradients = found("Liger", theirs, True, None)
    torch.testing.assert_close(values, expected, check_dtype=False)
    for name in gradients:
        torch.testing.assert_close(their_gradients[name], gradients[name])


@pytest.fixture
def liger():
    """``(loss module, x, weight, labels)``; a third is masked."""
    loss = real_liger()["FLCE"]()
    labels = torch.randint(V, (N,)).index_fill(0, torch.arange(0, N, 3), -100)
    x, weight = (torch.randn(rows, D, requires_grad=True) for rows in (N, V))
    return loss, x, weight, labels


def test_liger_has_no_loss_where_nothing_is_kept(liger):
    loss, x, weight, labels = liger
    nothing = torch.full_like(labels, -100)
    loss(weight, x, nothing).backward()
    assert not x.grad.any()
    assert not weight.grad.any()
    real = real_liger()
    assert real["LigerForCausalLMLoss"](x[None], weight, nothing[None], D, torch.tensor(0)).isnan()
    assert real["FLCE"](return_token_accuracy=True)(weight, x, nothing).token_accuracy.isnan()


def test_liger_gives_a_head_alone_no_gradient(liger):
    loss, x, weight, labels = liger
    loss(weight, x.detach(), labels).backward()
    assert weight.grad is None


def test_liger_scales_a_second_backward_twice(liger):
    loss, x, weight, labels = liger
    right = torch.autograd.grad(F.cross_entropy(x @ weight.T, labels), weight)[0]
    value = loss(weight, x, labels)
    (3 * value).backward(retain_graph=True)
    torch.testing.assert_close(weight.grad, 3 * right)
    weight.grad = None
    (3 * value).backward()
    torch.testing.assert_close(weight.grad, 9 * right)


def test_liger_lets_a_masked_row_into_the_weights(liger):
    loss, x, weight, labels = liger
    x = torch.where((labels == -100)[:, None], torch.nan, x)
    loss(weight, x, labels).backward()
    assert weight.grad.isnan().any()


def test_liger_takes_no_sequences(liger):
    loss, x, weight, labels = liger
    with pytest.raises(ValueError, match="too many values to unpack"):
        loss(weight, x.view(2, -1, D), labels.view(2, -1))


def test_liger_overwrites_logits(liger):
    _, x, weight, labels = liger
    logits = x @ weight.T
    before = logits.detach().clone()
    real_liger()["LigerCrossEntropyLoss"]()(logits, labels)
    assert not torch.equal(logits, before)
