"""What both losses promise alike: ``cross_entropy`` and every loop of ``linear_cross_entropy``."""

import math

import pytest
import torch
import torch.nn.functional as F

from sft_kernels import KeptTokens, LossStats, cross_entropy, linear_cross_entropy
from sft_kernels._budget import check
from sft_kernels.ops.softmax_grad import reduction, torch_impl

from .helpers import DTYPES, LINEAR, LOSSES, D, N, V, Watch, labels, run, same_bits


@pytest.fixture(params=LOSSES, ids=lambda loss: loss.name)
def loss(request, monkeypatch):
    monkeypatch.setitem(torch_impl._BLOCK_BYTES, "cpu", 4 * V * 11)  # a few blocks of rows
    return request.param


def bound(function, y, **options):
    return lambda *tensors: function(*tensors, y, **options)


# ---- right


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradients_stay_within_the_budget(loss, dtype, reduction):
    y = labels()
    upstream = torch.rand(N) + 0.5 if reduction == "none" else 1.0
    loss.check(loss.tensors(dtype), y, upstream, reduction=reduction)


@pytest.mark.parametrize("upstream", [-3.7, 0.0, 1e-3])
@pytest.mark.parametrize(
    "options",
    [
        {"num_items": 7},
        {"num_items": 33.5},
        {"num_items": torch.tensor(200)},
        {"token_weight": torch.linspace(-1, 2, N)},
        {"token_weight": torch.linspace(0, 1, N, dtype=torch.bfloat16), "num_items": torch.tensor(9.5)},
        {"token_weight": torch.linspace(0, 2, N), "reduction": "sum"},
        {"token_weight": torch.linspace(0, 2, N), "reduction": "none"},
    ],
    ids=str,
)
def test_divisors_weights_and_upstream_gradients(loss, options, upstream):
    y = labels()
    loss.check(loss.tensors(), y, upstream, **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(loss, reduction):
    tensors = [t.requires_grad_() for t in loss.tensors(torch.float64, n=5, v=4)]
    y = torch.tensor([2, -100, 0, 3, -100])
    assert torch.autograd.gradcheck(bound(loss.ours, y, reduction=reduction), tensors, fast_mode=True)


@pytest.mark.parametrize("masked", [0.0, 1 - 1 / N])
def test_everything_kept_and_one_row_kept(loss, masked):
    y = labels(masked=0)
    y[1 : 1 + round(masked * N)] = -100
    loss.check(loss.tensors(), y)


@pytest.mark.parametrize("v", [1, 2, 3])
def test_tiny_vocabularies(loss, v):
    y = labels(v=v)
    _, *gradients = loss.check(loss.tensors(v=v), y)
    if v == 1:
        assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_labels_of_any_integer_dtype(loss, dtype):
    y = labels()
    ignore_index = -100
    if dtype == torch.uint8:  # which has no negative label
        ignore_index = 255
        y[y == -100] = 255
    tensors = loss.tensors()
    given, as_int64 = (run(bound(loss.ours, t, ignore_index=ignore_index), tensors) for t in (y.to(dtype), y))
    assert same_bits(given, as_int64)


def test_a_label_that_equals_ignore_index_only_modulo_256_is_kept(loss):
    y = torch.tensor([156, 3, 156], dtype=torch.uint8)  # 156 = -100 mod 256
    tensors = loss.tensors(n=3, v=200)
    assert same_bits(loss.ours(*tensors, y), loss.ours(*tensors, y.long()))


def test_ignore_index_may_be_a_class(loss):
    y = labels(masked=0)
    y[1::3] = 3
    tensors = loss.tensors()
    ours = run(bound(loss.ours, y, ignore_index=3), tensors)
    assert same_bits(ours, run(bound(loss.ours, y.masked_fill(y == 3, -100)), tensors))


def test_non_contiguous_inputs(loss):
    def strided(t):
        return t.repeat_interleave(2, -1)[..., ::2]

    y, tensors = labels(), loss.tensors()
    loss.check([strided(t) for t in tensors], strided(y))
    loss.check([t.mT.contiguous().mT if t.dim() == 2 else t for t in tensors], y)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_same_inputs_same_bits(loss, reduction):
    y, tensors = labels(), loss.tensors(torch.bfloat16)
    once, again = (run(bound(loss.ours, y, reduction=reduction), tensors) for _ in range(2))
    assert same_bits(once, again)


# ---- masked rows


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_stands_at_masked_rows_enters_nothing(loss, poison, reduction):
    y = labels()
    rows, *rest = loss.tensors()
    poisoned = rows.clone()
    poisoned[y == -100] = poison
    upstream = torch.rand(N) if reduction == "none" else 1.0
    clean = run(bound(loss.ours, y, reduction=reduction), (rows, *rest), upstream)
    assert same_bits(run(bound(loss.ours, y, reduction=reduction), (poisoned, *rest), upstream), clean)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_comes_back_to_the_losses_of_masked_rows_enters_nothing(loss, poison):
    y, upstream = labels(), torch.rand(N)
    tensors = loss.tensors()
    clean = run(bound(loss.ours, y, reduction="none"), tensors, upstream)
    assert same_bits(run(bound(loss.ours, y, reduction="none"), tensors, upstream.where(y != -100, poison)), clean)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("linear", LINEAR, ids=lambda loss: loss.name)
def test_a_capacity_changes_nothing_also_where_the_last_row_is_kept(linear, reduction):
    """Padding stands at row -1."""
    y, tensors = labels(), linear.tensors()
    y[-1] = 3
    upstream = torch.rand(N) if reduction == "none" else 1.0

    def loss(capacity):
        kept = KeptTokens.from_labels(y, capacity=capacity)
        return bound(linear.ours, None, kept=kept, reduction=reduction)

    for found, wanted in zip(run(loss(N), tensors, upstream), run(loss(None), tensors, upstream), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("capacity", [None, N])
@pytest.mark.parametrize("linear", LINEAR, ids=lambda loss: loss.name)
def test_what_stands_in_the_last_row_does_not_enter_what_is_padded(linear, capacity, reduction):
    """Padded rows are those at -1."""
    y, token_weight = labels(), torch.rand(N)
    y[-1] = -100
    kept = KeptTokens.from_labels(y, capacity=capacity)

    def loss(*tensors):
        out, stats = linear.ours(
            *tensors, None, kept=kept, token_weight=token_weight, reduction=reduction, return_stats=True
        )
        found.append(stats)
        return out

    found, tensors = [], linear.tensors()
    clean = run(loss, tensors)
    for t in (tensors[0], token_weight):
        t[-1] = float("nan")
    assert same_bits(run(loss, tensors), clean)
    assert same_bits(*found)


def test_statistics_take_no_gradient_and_a_loss_that_gets_none_gives_none(loss):
    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    leaves = [t.requires_grad_() for t in loss.tensors()]
    value, stats = loss.ours(*leaves, labels(), return_stats=True)
    assert not any(s.requires_grad for s in stats)
    Nothing.apply(value).backward()
    assert not any(t.grad is not None and t.grad.any() for t in leaves)


@pytest.mark.parametrize("options", [{}, {"num_items": 5}, {"num_items": 0}, {"num_items": torch.tensor(0)}], ids=str)
@pytest.mark.parametrize("n", [N, 0])
def test_nothing_kept_gives_zero_and_zero_gradients(loss, n, options):
    y = torch.full((n,), -100)
    value, *gradients = run(bound(loss.ours, y, **options), loss.tensors(n=n))
    assert value == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_nothing_kept_has_empty_statistics(loss):
    _, stats = loss.ours(*loss.tensors(), torch.full((N,), -100), return_stats=True)
    assert stats == LossStats(0, 0.0, 0, 0.0, float("-inf"))


def test_unreduced_losses_are_zero_where_ignored_and_shaped_as_labels(loss):
    y = labels()
    value = loss.ours(*loss.tensors(), y, reduction="none")
    assert value.shape == y.shape
    assert torch.equal(value == 0, y == -100)


# ---- statistics


def test_statistics(loss):
    y, tensors = labels(), loss.tensors()
    logits = tensors[0] if len(tensors) == 1 else F.linear(*tensors)
    reference = tensors[0].double() if len(tensors) == 1 else F.linear(*(t.double() for t in tensors))
    kept = y != -100
    y[kept.nonzero()[1::3, 0]] = logits.argmax(1)[kept.nonzero()[1::3, 0]]  # some of them right

    def of(x):
        log_p = x[kept].log_softmax(1)
        nll = -log_p.gather(1, y[kept, None]).sum()
        return nll, -(log_p.exp() * log_p).sum(), x[kept].logsumexp(1).amax()

    value, stats = loss.ours(*(t.requires_grad_() for t in tensors), y, return_stats=True)
    assert stats.kept == kept.sum()
    assert stats.correct == (logits.argmax(1) == y).sum()
    assert stats.correct > 3
    for name, ref, eager in zip(("nll_sum", "entropy_sum", "max_lse"), of(reference), of(logits), strict=True):
        check(name, getattr(stats, name), ref, eager)
    assert not any(field.requires_grad for field in stats)
    assert value.requires_grad


def test_asking_for_statistics_changes_no_bit(loss):
    y, tensors = labels(), loss.tensors()
    with_stats = run(lambda *t: loss.ours(*t, y, return_stats=True)[0], tensors)
    assert same_bits(with_stats, run(bound(loss.ours, y), tensors))


# ---- autograd


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_backward_is_right_whatever_became_of_the_first_gradient(loss, reduction):
    y = labels()
    leaves = [t.requires_grad_() for t in loss.tensors()]
    out = loss.ours(*leaves, y, reduction=reduction).sum()
    first = torch.autograd.grad(out, leaves, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.fill_(float("nan"))
    second = torch.autograd.grad(out * 2, leaves, retain_graph=True)
    for gradient in second:
        gradient.div_(2)
    third = torch.autograd.grad(out, leaves)
    for a, b, c in zip(kept, second, third, strict=True):
        assert torch.equal(a, c)
        check("second gradient", b, a, a)


def test_gradients_of_gradients_are_those_of_plain_code(loss):
    def second(function, dtype=torch.float32):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        first = torch.autograd.grad(function(*leaves, y), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    y, tensors = labels(), loss.tensors()
    reference = second(loss.plain, torch.float64)
    for found, ref, eager in zip(second(loss.ours), reference, second(loss.plain), strict=True):
        check("second gradient", found, ref, eager)


def test_micro_batches_with_a_common_divisor_add_up(loss):
    y = labels()
    num_items = int((y != -100).sum())
    rows, *rest = loss.tensors()
    whole = run(bound(loss.ours, y), (rows, *rest))
    parts = [run(bound(loss.ours, y[s], num_items=num_items), (rows[s], *rest)) for s in (slice(0, 20), slice(20, N))]
    check("loss", parts[0][0] + parts[1][0], whole[0], whole[0])
    check("gradient of rows", torch.cat([part[1] for part in parts]), whole[1], whole[1])
    for part_a, part_b, of_whole in zip(parts[0][2:], parts[1][2:], whole[2:], strict=True):
        check("gradient of weight", part_a + part_b, of_whole, of_whole)


# ---- bad input


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("wrong", [V, -1, -99, 2**31 - 1])
def test_a_label_outside_the_vocabulary_raises_before_any_work(loss, wrong, dtype):
    y = labels().to(dtype)
    y[5] = wrong
    leaves = [t.requires_grad_() for t in loss.tensors()]
    with Watch() as watch, pytest.raises(IndexError, match=rf"target: label {wrong} .* outside \[0, {V}\)"):
        loss.ours(*leaves, y)
    assert watch.flops == 0


@pytest.mark.parametrize("wrong", [-1, V, 2**40])
def test_on_a_device_that_is_not_asked_a_label_outside_gives_nan_and_no_access_out_of_bounds(loss, wrong, monkeypatch):
    monkeypatch.setattr(reduction, "checks_enabled", lambda device: False)
    y = labels()
    y[0] = wrong
    leaves = [t.requires_grad_() for t in loss.tensors()]
    losses = loss.ours(*leaves, y, reduction="none")
    assert losses.isnan().nonzero().flatten().tolist() == [0]
    assert losses[1:].equal(loss.ours(*leaves, y.where(y != wrong, 1), reduction="none")[1:])
    mean = loss.ours(*leaves, y)
    assert mean.isnan()
    assert any(gradient.isnan().any() for gradient in torch.autograd.grad(mean, leaves))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"reduction": "avg"}, ValueError, "reduction"),
        ({"num_items": 5, "reduction": "sum"}, ValueError, "num_items"),
        ({"num_items": -1}, ValueError, "num_items"),
        ({"num_items": torch.tensor(-3.0)}, ValueError, r"num_items: expected a count, got -3\.0"),
        ({"num_items": torch.tensor(-3)}, ValueError, "num_items: expected a count, got -3"),
        ({"num_items": torch.tensor(math.nan)}, ValueError, "num_items: expected a count, got nan"),
        ({"num_items": torch.tensor(math.inf)}, ValueError, "num_items: expected a count, got inf"),
        ({"num_items": math.nan}, ValueError, "num_items: expected a count, got nan"),
        ({"num_items": torch.tensor(3j)}, TypeError, "num_items: expected a real number"),
        ({"num_items": torch.ones(1)}, ValueError, "num_items"),
        ({"token_weight": torch.ones(N - 1)}, ValueError, "token_weight"),
        ({"token_weight": torch.ones(N, dtype=torch.int64)}, TypeError, "token_weight"),
        ({"token_weight": torch.ones(N, requires_grad=True)}, ValueError, "token_weight"),
        ({"token_weight": torch.ones(N, device="meta")}, ValueError, "token_weight"),
        ({"impl": "fast"}, ValueError, "impl"),
    ],
    ids=str,
)
def test_a_bad_option_is_named(loss, options, error, match):
    with pytest.raises(error, match=match):
        loss.ours(*loss.tensors(), labels(), **options)


@pytest.mark.parametrize(
    ("y", "error"),
    [
        (torch.zeros(N - 1, dtype=torch.int64), ValueError),
        (torch.zeros(N, 1, dtype=torch.int64), ValueError),
        (torch.zeros(N), TypeError),
        (torch.zeros(N, dtype=torch.bool), TypeError),
        (torch.zeros(N, dtype=torch.int64, device="meta"), ValueError),
    ],
    ids=["length", "dimensions", "float", "bool", "device"],
)
def test_a_bad_target_is_named(loss, y, error):
    with pytest.raises(error, match="target"):
        loss.ours(*loss.tensors(), y)


def test_an_input_that_is_not_floating_point_is_named(loss):
    rows, *rest = loss.tensors()
    with pytest.raises(TypeError, match="input"):
        loss.ours(rows.long(), *rest, labels())


UNSUPPORTED = {
    "fp8": lambda t: t.to(torch.float8_e4m3fn),
    "coo": lambda t: t.to_sparse(),
    "csr": lambda t: torch.atleast_2d(t).to_sparse_csr(),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "jagged": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
}


@pytest.mark.parametrize("kind", [*UNSUPPORTED])
@pytest.mark.parametrize("function", [cross_entropy, linear_cross_entropy])
def test_fp8_sparse_and_nested_tensors_are_refused_by_name(function, kind):
    given = {"input": torch.randn(N, V), "target": labels()}
    if function is linear_cross_entropy:
        given |= {"input": torch.randn(N, D), "linear_weight": torch.randn(V, D), "linear_bias": torch.randn(V)}
    given |= {"weight": torch.rand(V), "token_weight": torch.rand(N), "num_items": torch.tensor(7.0)}
    function(**given)
    for name, value in given.items():
        if kind in ("csr", "nested", "jagged") and name == "num_items":  # which has no dimensions
            continue
        if kind == "fp8" and name in ("target", "num_items"):  # probabilities below; a number of any dtype is one
            continue
        with pytest.raises(TypeError, match=f"^{name}: expected"):
            function(**given | {name: UNSUPPORTED[kind](value)})


def test_probabilities_in_fp8_are_refused_by_name():
    with pytest.raises(TypeError, match=r"^target: expected floating point"):
        cross_entropy(torch.randn(N, V), torch.rand(N, V).to(torch.float8_e4m3fn))


@pytest.mark.parametrize("kind", ["coo", "csr", "nested", "jagged"])
def test_labels_that_are_not_dense_are_refused_by_name(kind):
    with pytest.raises(TypeError, match=r"^labels: expected a dense tensor"):
        KeptTokens.from_labels(UNSUPPORTED[kind](labels()))


def test_the_losses_agree_with_each_other(loss):
    """One over given logits, one over the head: the same number."""
    y, tensors = labels(), loss.tensors(torch.float64)
    logits = tensors[0] if len(tensors) == 1 else F.linear(*tensors)
    assert loss.ours(*tensors, y).item() == pytest.approx(cross_entropy(logits, y).item(), rel=1e-14)
