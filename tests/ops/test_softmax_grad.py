"""The core: row statistics, and the gradient in place."""

from functools import reduce

import pytest
import torch

from sft_kernels._backend import resolve
from sft_kernels._budget import check
from sft_kernels.ops.softmax_grad import torch_impl
from sft_kernels.ops.softmax_grad.options import LossOptions
from sft_kernels.ops.softmax_grad.rows import RowStats

from .helpers import DTYPES, same_bits

N, V = 101, 37
PLAIN = LossOptions(V)
FIELDS = ("lse", "nll", "entropy", "max_logit")


@pytest.fixture(params=["torch", "triton", "cuda"])
def core(request):
    if request.param != "torch" and request.node.callspec.params.get("dtype") == torch.float64:
        pytest.skip("float64 is torch's own code")
    return resolve("softmax_grad", request.param)


def inputs(dtype=torch.float32, offset=0.0):
    logits = (3 * torch.randn(N, V) + offset).to(dtype)
    return logits, torch.randint(0, V, (N,)), torch.rand(N, dtype=_fp(dtype)) + 0.1


def _fp(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def plain(logits, target, scale):
    """Statistics and gradient by ``log_softmax``, in the dtype of ``logits``."""
    log_p = logits.log_softmax(1)
    dlogits = (log_p.exp() - torch.nn.functional.one_hot(target, logits.shape[1])) * scale.to(logits.dtype)[:, None]
    values = {
        "lse": logits.logsumexp(1),
        "nll": -log_p.gather(1, target[:, None])[:, 0],
        "entropy": -(log_p.exp() * log_p.masked_fill(log_p == float("-inf"), 0)).sum(1),
        "max_logit": logits.amax(1),
    }
    return values, dlogits


def check_rows(rows, dlogits, logits, target, scale):
    ref, dref = plain(logits.double(), target, scale)
    eager, deager = plain(logits, target, scale)
    for field in FIELDS:
        dtype = _fp(logits.dtype)  # whatever lse is kept in
        check(field, getattr(rows, field), ref[field], eager[field], compute_dtype=dtype, output_dtype=dtype)
    if dlogits is not None:
        check("dlogits", dlogits, dref, deager)
    assert torch.equal(rows.correct, logits.gather(1, target[:, None])[:, 0] == logits.amax(1))


def slices(widths):
    ends = torch.tensor(widths).cumsum(0).tolist()
    return [slice(end - width, end) for width, end in zip(widths, ends, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_and_gradient_stay_within_the_budget(core, dtype):
    logits, target, scale = inputs(dtype)
    x = logits.clone()
    rows = core(x, target, PLAIN, scale, stats=True)
    check_rows(rows, x, logits, target, scale)
    assert rows.nll.dtype == rows.entropy.dtype == _fp(dtype)


@pytest.mark.parametrize("offset", [0, 40, 1000])
def test_a_sure_row_keeps_its_digits_wherever_its_logits_stand(core, offset):
    logits, target, scale = inputs(offset=offset)
    logits.scatter_(1, target[:, None], offset + 16.0)
    x = logits.clone()
    check_rows(core(x, target, PLAIN, scale, stats=True), x, logits, target, scale)


def test_without_scale_logits_are_only_read(core):
    logits, target, _ = inputs()
    x = logits.clone()
    core(x, target, PLAIN, stats=True)
    assert torch.equal(x, logits)


def test_statistics_that_nobody_asked_for_are_not_computed(core):
    logits, target, _ = inputs()
    assert core(logits, target, PLAIN).mean_logit is None


def test_blocks_of_rows_change_no_bit(core, monkeypatch):
    logits, target, scale = inputs()
    whole, x = core(whole_x := logits.clone(), target, PLAIN, scale, stats=True), logits.clone()
    monkeypatch.setitem(torch_impl._BLOCK_BYTES, "cpu", 4 * V * 7)  # the last block is ragged
    assert same_bits((core(x, target, PLAIN, scale, stats=True), x), (whole, whole_x))


@pytest.mark.parametrize("widths", [(20, 17), (1, 35, 1), (1,) * V])
def test_slices_of_the_vocabulary_merge_into_the_whole(core, widths):
    logits, target, scale = inputs()
    parts = [core(logits[:, s].clone(), target - s.start, PLAIN, stats=True) for s in slices(widths)]
    check_rows(reduce(RowStats.merge, parts), None, logits, target, scale)


def test_a_slice_that_is_ruled_out_for_a_row_merges_as_nothing(core):
    logits, target, scale = inputs()
    logits[:5, :20] = float("-inf")
    target[:5] = 30
    parts = [core(logits[:, s].clone(), target - s.start, PLAIN, stats=True) for s in slices((20, 17))]
    check_rows(RowStats.merge(*parts), None, logits, target, scale)
    check_rows(RowStats.merge(*parts[::-1]), None, logits, target, scale)


@pytest.mark.parametrize("widths", [(37,), (20, 17), (1, 35, 1)])
def test_slices_given_the_logsumexp_of_the_whole_give_its_gradient(core, widths):
    logits, target, scale = inputs()
    lse = core(logits, target, PLAIN).lse
    x = logits.clone()
    for s in slices(widths):
        assert core(x[:, s], target - s.start, PLAIN, scale, lse=lse) is None
    (_, ref), (_, eager) = plain(logits.double(), target, scale), plain(logits, target, scale)
    check("dlogits", x, ref, eager)


def test_a_target_outside_the_slice_gets_no_minus_one(core):
    logits, _, scale = inputs()
    x = logits.clone()
    rows = core(x, torch.tensor([-1, V] * N)[:N], PLAIN, scale)
    assert (rows.target_logit == float("-inf")).all()
    assert not rows.correct.any()
    check("dlogits", x, logits.double().softmax(1) * scale[:, None], logits.softmax(1) * scale[:, None])


def test_scale_of_zero_gives_zeros_and_its_sign_carries_over(core):
    logits, target, scale = inputs()
    zero, plus, minus = logits.clone(), logits.clone(), logits.clone()
    for x, s in ((zero, 0 * scale), (plus, scale), (minus, -scale)):
        core(x, target, PLAIN, s)
    assert (zero == 0).all()
    assert torch.equal(minus, -plus)


@pytest.mark.parametrize(("n", "v"), [(0, 5), (3, 1), (0, 1)])
def test_degenerate_shapes(core, n, v):
    logits = torch.randn(n, v)
    rows = core(x := logits.clone(), torch.zeros(n, dtype=torch.int64), LossOptions(v), torch.ones(n), stats=True)
    assert all(field.shape == (n,) for field in rows if field is not None)
    if v == 1:
        assert (rows.nll == 0).all()
        assert (rows.entropy == 0).all()
        assert (x == 0).all()


def test_a_tie_for_the_largest_logit_counts_as_correct(core):
    rows = core(torch.tensor([[1.0, 2.0, 2.0]] * 3), torch.tensor([0, 1, 2]), LossOptions(3))
    assert rows.correct.tolist() == [False, True, True]


def test_the_rows_of_a_single_block_are_not_copied():
    logits, target, _ = inputs()
    part = torch_impl.softmax_grad(logits, target, PLAIN)
    assert RowStats.cat([part]) is part
