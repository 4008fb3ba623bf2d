"""The core's predictions, and its gradients by coefficients."""

from functools import reduce

import numpy as np
import pytest
import torch

from sft_kernels._backend import Unavailable, resolve
from sft_kernels._budget import check
from sft_kernels.ops.softmax_grad import cuda_impl
from sft_kernels.ops.softmax_grad.options import LossOptions
from sft_kernels.ops.softmax_grad.rows import RowStats

from .helpers import DTYPES, same_bits
from .per_token import OPTIONS, Case
from .test_softmax_grad_geometry import TILE, borders, laid_out, rising

LOSS, LOGPROB, LSE, ENTROPY = torch.eye(4, dtype=torch.float64)
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=["torch", "triton"])
def core(request):
    if request.param == "triton" and request.node.callspec.params.get("dtype") == torch.float64:
        pytest.skip("float64 is torch's own code")
    return resolve("softmax_grad", request.param)


def case(dtype=torch.float32, n=9, v=61, **options):
    return Case(rising(n, v, dtype), borders(v, n), **options)


def hold(case, dlogits):
    check("dlogits", dlogits, case.oracle(), case.autograd())


# ---- gradients by coefficients


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "every option"])
@pytest.mark.parametrize("v", [61, TILE, 2 * TILE + 11])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_is_that_of_the_plain_expressions(core, dtype, v, options):
    c = case(dtype, 5, v, **options)
    exact = c.autograd(torch.float64)
    np.testing.assert_allclose(c.oracle(), exact, rtol=0, atol=1e-13 * float(exact.abs().max()))
    core(x := c.logits.clone(), c.target, c.options, **c.given)
    eager = c.autograd()
    if dtype == torch.float64:  # the errors of fp64 are those of fp32 in the ratio of the epsilons
        eager = exact + (c.autograd(torch.float32) - exact) * 2.0**-29
    check("dlogits", x, c.oracle(), eager)


@pytest.mark.parametrize("g", [LOSS, LOGPROB, LSE, ENTROPY], ids=["loss", "logprob", "lse", "entropy"])
@pytest.mark.parametrize("options", [{}, {"softcap": 6.0}, {"logit_scale": 0.7}], ids=lambda o: " ".join(o) or "plain")
def test_each_term_by_itself(core, options, g):
    c = case(g=g[:, None].expand(4, 9), **options)
    core(x := c.logits.clone(), c.target, c.options, **c.given)
    hold(c, x)


@pytest.mark.parametrize("g", [LOGPROB, ENTROPY], ids=["logprob", "entropy"])
@pytest.mark.parametrize("offset", [40, 1000, -3000])
def test_digits_hold_wherever_the_logits_stand(core, offset, g):
    """fp32 holds an lse of 1000 to 3e-5 alone."""
    c = Case(rising(9, 61, torch.float32) + offset, borders(61, 9), g[:, None].expand(4, 9))
    core(x := c.logits.clone(), c.target, c.options, **c.given)
    hold(c, x)


def test_without_upstream_gradients_of_its_own_it_is_the_gradient_of_the_loss(core):
    c = case(g=LOSS[:, None].expand(4, 9), **OPTIONS)
    core(x := c.logits.clone(), c.target, c.options, **c.given)
    core(y := c.logits.clone(), c.target, c.options, torch.ones(9), lse=c.given["lse"])
    check("dlogits", x, c.oracle(), y)


@pytest.mark.parametrize(("padding", "offset"), [(0, 0), (1, 0), (5, 3), (8, 3)])
@pytest.mark.parametrize("v", [1, 9, 64, 61, TILE + 13])
def test_any_stride_from_any_address(core, v, padding, offset):
    c = case(torch.bfloat16, 5, v)
    x = laid_out(c.logits, v + padding, offset)
    core(x, c.target, c.options, **c.given)
    hold(c, x)


@pytest.mark.parametrize(("stride", "stride_out"), [(64, 72), (61, 61), (69, 61), (61, 77)])
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "every option"])
def test_rows_that_are_not_kept_are_not_read_and_get_zeros(core, options, stride, stride_out):
    c = case(torch.bfloat16, **options)
    keep = torch.tensor([True, False, True, True, False, False, True, False, True])
    x, out = laid_out(c.logits, stride, 0), laid_out(torch.full_like(c.logits, NAN), stride_out, 0)
    x[~keep] = NAN
    given = {name: t.clone() for name, t in c.given.items()}
    for t in given.values():
        t[~keep] = NAN
    target = c.target.masked_fill(~keep, -100)
    assert core(x, target, c.options, keep=keep, out=out, **given) is None
    check("dlogits", out[keep], c.oracle()[keep.numpy()], c.autograd()[keep])
    assert (out[~keep] == 0).all()
    assert same_bits(x[keep], c.logits[keep])  # they are only read


def test_columns_that_are_not_adjacent_and_coefficients_in_any_layout(core):
    c = case()
    given = c.given | {"coefficients": c.coefficients.T.contiguous().T}
    core(x := c.logits.T.contiguous().T, c.target, c.options, **given)
    hold(c, x)


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "every option"])
@pytest.mark.parametrize("widths", [(61,), (20, 41), (1, 59, 1)])
def test_slices_give_the_gradient_of_the_whole(core, widths, options):
    c, x, end = case(**options), None, 0
    x = c.logits.clone()
    for width in widths:  # a target outside a slice belongs to another one
        s, end = slice(end, end + width), end + width
        core(x[:, s], c.target - s.start, c.options, **c.given)
    hold(c, x)


@pytest.mark.parametrize("v", [61, TILE + 5])
def test_logits_of_minus_infinity_have_no_share_in_anything(core, v):
    c = case(n=4, v=v)
    c.logits[0, v // 2 :] = -INF
    c.logits[1, 8:24] = -INF
    c.logits[2] = -INF
    c.logits[2, 3] = 1.0  # the only candidate, and the target
    c.target[:3] = torch.tensor([1, v - 1, 3])
    c = Case(c.logits, c.target)
    core(x := c.logits.clone(), c.target, c.options, **c.given)
    hold(c, x)
    assert (x[c.logits == -INF] == 0).all()


def test_a_target_of_minus_infinity_gets_its_own_share_alone(core):
    c = case(n=3)
    c.logits[torch.arange(3), c.target] = -INF
    c = Case(c.logits, c.target)
    core(x := c.logits.clone(), c.target, c.options, **c.given)
    expected = c.coefficients[:, 1] - c.coefficients[:, 3]
    assert torch.equal(x.gather(1, c.target[:, None])[:, 0], expected)


@pytest.mark.parametrize(("v", "margin"), [(40, 12.0), (40, 16.0), (40, 20.0), (TILE + 5, 20.0)])
@pytest.mark.parametrize("scaled", [None, 0.3])
def test_a_sure_token_keeps_the_digits_of_each_entry(core, margin, v, scaled):
    """p − 1 taken from a p near 1 would have none left at a margin of 20; nor would A + B, if each were multiplied."""
    logits, target = torch.randn(6, v), torch.tensor([0, v // 2, v - 1] * 2)
    logits = logits.scatter_(1, target[:, None], margin) / (scaled or 1.0)
    g = torch.zeros(4, 6, dtype=torch.float64)
    g[LOGPROB.bool(), :3] = torch.tensor([1 / 3, 0.1, -7e3], dtype=torch.float64)
    g[ENTROPY.bool(), 3:] = torch.tensor([1 / 3, 0.1, -7e3], dtype=torch.float64)
    options = LossOptions(v, logit_scale=scaled)
    c = Case(options.shape(logits), target, g)  # of the logits as they are rounded where lse is taken
    lse, coefficients = core(logits, target, options).lse, c.coefficients
    core(x := logits.clone(), target, options, lse=lse, coefficients=coefficients)
    exact = torch.from_numpy(c.oracle(coefficients)) * (scaled or 1.0)
    # exp(−x) costs x · eps, 2e-6 here; a p near 1 is 6e-8 / (1 − p) off, 1e-4 and more.
    torch.testing.assert_close(x.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("column", [0, 2, 3])
def test_a_coefficient_of_nan_makes_its_own_row_nan(core, column):
    c = case()
    given = c.given
    given["coefficients"][4, column] = NAN
    core(x := c.logits.clone(), c.target, c.options, **given)
    assert x.isnan().any(1).tolist() == x.isnan().all(1).tolist() == [i == 4 for i in range(9)]


@pytest.mark.parametrize("n", [0, 1])
def test_no_rows_and_a_single_class(core, n):
    given = {"lse": torch.full((n,), 3.0, dtype=torch.float64), "coefficients": torch.ones(n, 4)}
    x = torch.full((n, 1), 3.0)
    assert core(x, torch.zeros(n, dtype=torch.int64), LossOptions(1), **given) is None
    assert x.tolist() == [[1.0]] * n  # 1 · p + 1 + 1 · 0 − 1


def test_a_row_does_not_depend_on_its_neighbours(core):
    c = case(torch.bfloat16, 23, 200, **OPTIONS)
    core(x := c.logits.clone(), c.target, c.options, **c.given)
    for i in (0, 5, 22):
        s = slice(i, i + 1)
        given = {name: t[s] for name, t in c.given.items()}
        core(y := c.logits[s].clone(), c.target[s], c.options, **given)
        assert same_bits(x[s], y)


# ---- predictions


def prediction(core, logits, target=None, options=None, **more):
    target = torch.zeros(len(logits), dtype=torch.int64) if target is None else target
    found = core(logits, target, options or LossOptions(logits.shape[1]), predict=True, **more).prediction
    assert found.dtype == torch.int64
    return found.tolist()


def first(u):
    """The smallest column that attains the maximum."""
    return np.argmax(u.double().numpy(), 1).tolist()


@pytest.mark.parametrize("v", [1, 7, 8, 9, 17, 64, 200, TILE - 1, TILE + 1, 2 * TILE + 8])
def test_the_largest_logit_wherever_it_stands(core, v):
    logits, places = rising(12, v, torch.bfloat16), borders(v, 12)
    logits[torch.arange(12), places] = 20.0
    assert prediction(core, logits, places.flip(0)) == places.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_the_largest_logit_in_any_dtype(core, dtype):
    logits = rising(9, 61, dtype)
    assert prediction(core, logits) == first(logits)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("v", [5, 61, 64, TILE + 13])
def test_the_smallest_column_of_a_tie(core, v, padding):
    """A handful of values, so that ties lie in one group, in groups of one thread and of two, and in the edges."""
    logits = torch.randint(-3, 3, (9, v)).to(torch.bfloat16)
    ends = torch.tensor([[0, v - 1], [v // 2, v - 1], [v - 2, v - 1], [1, v - 2]]) % v
    logits[:4].scatter_(1, ends, 9.0)
    x = laid_out(logits, v + padding, 3)
    assert prediction(core, x, torch.full((9,), v - 1)) == first(logits)


def test_a_tie_over_tiles_of_one_thread(core):
    v = 3 * TILE
    logits = torch.zeros(6, v)
    for row, columns in enumerate([(TILE + 5, 2 * TILE + 5), (TILE + 13, 2 * TILE + 5), (TILE + 5, 2 * TILE + 13),
                                   (4, TILE), (2 * TILE - 1, 2 * TILE), (8, 2 * TILE + 7)]):  # fmt: skip
        logits[row, list(columns)] = 1.0
    assert prediction(core, logits) == first(logits)


@pytest.mark.parametrize("v", [61, TILE + 13])
def test_logits_that_a_softcap_makes_equal_are_a_tie(core, v):
    logits = torch.where(torch.rand(9, v) < 0.1, 1000.0, torch.randn(9, v))
    logits[:, -1] = 999.0
    options = LossOptions(v, softcap=5.0, logit_scale=2.0)
    assert prediction(core, logits, options=options) == first(logits.clamp(max=999.0))


def test_smallest_of_infinite_logits_and_something_in_range_of_nan(core):
    for v in (5, 61, 64, TILE + 13):
        logits = torch.full((6, v), -INF)
        logits[1:3] = NAN
        logits[2, v // 2] = 1.0
        logits[3, v - 2 :] = -1.0
        logits[4, [v // 2, v - 1]] = INF
        logits[5, v - 1] = -1e30
        found = prediction(core, logits)
        assert found[0] == 0
        assert found[3:] == [v - 2, v // 2, v - 1]
        assert all(0 <= column < v for column in found)


@pytest.mark.parametrize(("v", "options"), [(61, {}), (64, {}), (61, OPTIONS), (TILE + 3, {})])
def test_rows_that_are_not_kept_have_0_and_the_rest_is_the_same_to_the_bit(core, v, options):
    logits, target, options = rising(9, v, torch.bfloat16), borders(v, 9), LossOptions(v, **options)
    keep = torch.tensor([True, False, True, True, False, False, True, False, True])
    logits[~keep] = NAN
    scale = torch.rand(9)
    plain = core(x := logits.clone(), target, options, scale, stats=True, keep=keep)
    rows = core(y := logits.clone(), target, options, scale, stats=True, keep=keep, predict=True)
    assert plain.prediction is None
    assert same_bits((plain, x), (rows._replace(prediction=None), y))
    expected = torch.tensor(first(logits.nan_to_num())) * keep
    assert torch.equal(rows.prediction, expected)
    assert prediction(core, logits, target, options, keep=keep) == expected.tolist()


@pytest.mark.parametrize("widths", [(61,), (20, 41), (1, 59, 1), (3,) * 20 + (1,)])
def test_predictions_of_slices_merge_into_that_of_the_whole(core, widths):
    logits, parts, end = torch.randint(-3, 3, (40, 61)).float(), [], 0
    logits[0] = -INF
    logits[1, :20] = -INF
    for width in widths:
        part = core(logits[:, end : end + width], torch.zeros(40, dtype=torch.int64), LossOptions(61), predict=True)
        parts.append(part._replace(prediction=part.prediction + end))
        end += width
    for order in (parts, parts[::-1]):
        assert reduce(RowStats.merge, order).prediction.tolist() == first(logits)
    assert RowStats.cat(parts).prediction.tolist() == [column for part in parts for column in part.prediction.tolist()]


@pytest.mark.parametrize(("name", "value"), [("predict", True), ("coefficients", torch.ones(9, 4))])
def test_the_cuda_kernels_carry_neither(name, value):
    more = {name: value}
    with pytest.raises(Unavailable, match="no predict and no coefficients; Triton's have"):
        cuda_impl.softmax_grad(torch.randn(9, 61), torch.zeros(9, dtype=torch.int64), LossOptions(61), **more)
