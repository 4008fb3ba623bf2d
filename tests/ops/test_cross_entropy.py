"""``cross_entropy`` alone; what it shares with the other loss is in test_losses.py."""

import pytest
import torch
import torch.nn.functional as F

from sft_kernels import CrossEntropyLoss, cross_entropy
from sft_kernels._budget import check
from sft_kernels.ops.softmax_grad import torch_impl
from sft_kernels.verify import loss_oracle, plain_cross_entropy

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


def test_blocks_of_rows_change_no_bit(monkeypatch):
    (logits,), y = CROSS_ENTROPY.tensors(), labels()
    whole = run(lambda x: cross_entropy(x, y), [logits])
    monkeypatch.setitem(torch_impl._BLOCK_BYTES, "cpu", 1)  # one row at a time
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


@pytest.mark.parametrize(("num_items", "upstream"), [(1_000_000, 2.0**15), (None, 2.0**15), (1_000_000, 2.0**20)])
def test_loss_scaling_reaches_fp16_gradients_before_they_are_rounded(num_items, upstream):
    """What GradScaler is for. Every entry is held on its own: the target's would hide that the others are flushed."""
    logits, y = torch.randn(256, 1000).half(), torch.randint(0, 1000, (256,))
    x = logits.float().requires_grad_()  # under autocast the loss is fp32, so that any scale fits
    with torch.autocast("cpu", torch.float16):
        (cross_entropy(x.half(), y, num_items=num_items) * upstream).backward()
    ref = loss_oracle([logits], y, upstream=upstream, num_items=num_items)[1]
    error = (x.grad.double() - torch.from_numpy(ref)).abs()
    # One rounding to fp16, a normal number's or a subnormal one's.
    assert (error <= 1.01 * (torch.finfo(torch.float16).eps / 2 * torch.from_numpy(ref).abs() + 2.0**-25)).all()


@pytest.mark.parametrize("impl", ["torch", "triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_in_half_precision_are_rounded_once_whatever_the_upstream(impl, dtype, reduction):
    """Each entry is within half a unit in its last place, and a little more where the fp32 before it is off."""
    logits, y = (2 * torch.randn(N, V)).to(dtype), labels()
    upstream = torch.rand(N) + 1 if reduction == "none" else torch.tensor(1.5409)
    x = logits.clone().requires_grad_()
    with torch.autocast("cpu", dtype):  # the loss itself in fp32
        (cross_entropy(x, y, reduction=reduction, impl=impl) * upstream).sum().backward()
    ref = torch.from_numpy(loss_oracle([logits], y, upstream=upstream, reduction=reduction)[1])
    finfo = torch.finfo(dtype)
    unit = torch.exp2(ref.abs().clamp(min=finfo.tiny).log2().floor()) * finfo.eps
    assert ((x.grad.double() - ref).abs() <= 0.51 * unit).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(
    "options", [{"logit_scale": 200.0}, {"z_loss": 0.5}, {"z_loss": 1e-4}, {"z_loss": 20.0, "softcap": 30.0}], ids=str
)
def test_steep_losses_stay_within_fp16(impl, options):
    """The power of two that is kept back must leave room for all that multiplies a gradient."""
    logits = torch.zeros(3, V, dtype=torch.float16)
    logits[:, 5] = 0.25 if "logit_scale" in options else 200.0
    y = torch.tensor([6, 5, 6])
    x = logits.clone().requires_grad_()
    cross_entropy(x, y, impl=impl, **options).backward()
    double = logits.double().requires_grad_()
    plain_cross_entropy(double, y, **options).backward()
    torch.testing.assert_close(x.grad.double(), double.grad, rtol=2e-3, atol=1e-6)


# ---- the dtype of the loss


@pytest.mark.parametrize("impl", ["torch", "triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_fp32_loss_of_half_precision_logits_is_not_rounded(impl, dtype, reduction):
    logits, y = (2 * torch.randn(N, V)).to(dtype), labels()
    upstream = torch.rand(N) + 1 if reduction == "none" else 1.7
    call = {"reduction": reduction, "impl": impl, "dtype": torch.float32}
    value, gradient = run(lambda x: cross_entropy(x, y, **call), [logits], upstream)
    assert value.dtype == torch.float32
    ref = loss_oracle([logits], y, upstream=upstream, reduction=reduction)
    eager = run(lambda x: plain_cross_entropy(x, y, reduction=reduction), [logits.float()], upstream)
    check("loss", value, ref[0], eager[0])  # the budget of fp32 logits
    check("gradient", gradient, ref[1], eager[1], output_dtype=dtype)


def test_the_dtype_of_a_loss_of_torchs_own_code():
    logits, weight, y = torch.randn(N, V).bfloat16(), torch.rand(V), labels()
    value = cross_entropy(logits, y, weight, label_smoothing=0.1, dtype=torch.float32)
    assert torch.equal(value, cross_entropy(logits.float(), y, weight, label_smoothing=0.1))


def test_under_autocast_a_dtype_holds_too():
    logits, y = torch.randn(N, V).bfloat16(), labels()
    with torch.autocast("cpu", torch.bfloat16):
        found = [cross_entropy(logits, y, dtype=dtype).dtype for dtype in (None, torch.float32, torch.bfloat16)]
    assert found == [torch.float32, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_a_loss_in_a_dtype_that_nothing_is_computed_in_is_refused(given):
    y = labels()
    for asked in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64):
        if asked in (torch.float32, given):
            for call in (cross_entropy, lambda *t, dtype: CrossEntropyLoss(dtype=dtype)(*t)):
                assert call(torch.randn(N, V).to(given), y, dtype=asked).dtype == asked
        else:
            with pytest.raises(ValueError, match=rf"^dtype: expected None, torch.float32 or {given} as input"):
                cross_entropy(torch.randn(N, V).to(given), y, dtype=asked)
    for call in (lambda: cross_entropy(torch.randn(N, V), y, dtype="float32"), lambda: CrossEntropyLoss(dtype=32)):
        with pytest.raises(TypeError, match=r"^dtype: expected a torch.dtype or None"):
            call()
