"""Values of each token beside both losses (``return_stats="tokens"``): right, differentiable, and what they cost."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from sft_kernels import (
    CrossEntropyLoss,
    KeptTokens,
    LinearCrossEntropyLoss,
    TokenStats,
    cross_entropy,
    linear_cross_entropy,
)
from sft_kernels._backend import Unavailable
from sft_kernels._budget import check
from sft_kernels.ops.linear_cross_entropy import function
from sft_kernels.ops.softmax_grad import reduction, torch_impl
from sft_kernels.verify import loss_oracle

from .helpers import CROSS_ENTROPY, CUDA, DTYPES, LINEAR, LOSSES, D, N, V, labels, run, same_bits

TORCH = [loss for loss in LOSSES if loss.impl == "torch"]
TRITON = [loss for loss in LOSSES if loss.impl == "triton"]
EVERY = {"label_smoothing": 0.1, "softcap": 5.0, "logit_scale": 0.5, "z_loss": 0.01}
FIELDS = ("loss", "logprob", "lse", "entropy")


@pytest.fixture(params=TORCH, ids=lambda loss: loss.name)
def loss(request, monkeypatch):
    monkeypatch.setitem(torch_impl._BLOCK_BYTES, "cpu", 4 * V * 11)  # a few blocks of rows
    return request.param


@pytest.fixture(params=[*TORCH, *TRITON], ids=lambda loss: loss.name)
def any_loss(request, monkeypatch):
    monkeypatch.setitem(torch_impl._BLOCK_BYTES, "cpu", 4 * V * 11)
    return request.param


def upstreams(n=N):
    """Gradients of logprob, lse and entropy, of both signs."""
    return [torch.rand(n) - 0.5 for _ in range(3)]


def per_token(loss, *args, **options):
    return loss.ours(*args, return_stats="tokens", **options)


# ---- right


@pytest.mark.parametrize("reduction_", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_stay_within_the_budget(any_loss, dtype, reduction_):
    upstream = torch.rand(N) if reduction_ == "none" else 7.0
    any_loss.check(any_loss.tensors(dtype), labels(), upstream, upstreams(), reduction=reduction_)


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1},
        {"softcap": 5.0},
        {"logit_scale": 0.5},
        {"z_loss": 0.01},
        EVERY,
        {"num_items": 7, **EVERY},
        {"token_weight": torch.linspace(-1, 2, N), "z_loss": 0.01},
        {"token_weight": torch.linspace(0, 2, N), "reduction": "sum"},
        {"weight": torch.linspace(0.2, 2, V)},
        {"weight": torch.linspace(0.2, 2, V), "label_smoothing": 0.1},  # torch's own code
    ],
    ids=lambda options: ", ".join(options),
)
def test_with_every_option(loss, options):
    if {"weight", "label_smoothing"} <= {*options} and loss not in (CROSS_ENTROPY, LINEAR[0]):
        pytest.skip("not chunked")
    loss.check(loss.tensors(), labels(), 3.0, upstreams(), **options)


@pytest.mark.parametrize("loss", TRITON, ids=lambda loss: loss.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_every_option_at_once(loss, dtype):
    options = {"weight": torch.linspace(0.2, 2, V), "label_smoothing": 0.0, "reduction": "none"}
    options = {**EVERY, **(options if dtype == torch.bfloat16 else {})}
    loss.check(loss.tensors(dtype), labels(), 3.0, upstreams(), **options)


@pytest.mark.parametrize("masked", [0.0, 1 - 1 / N])
def test_everything_kept_and_one_row_kept(loss, masked):
    y = labels(masked=0)
    y[1 : 1 + round(masked * N)] = -100
    loss.check(loss.tensors(), y, 1.0, upstreams())


@pytest.mark.parametrize(
    "options", [{}, {"weight": torch.linspace(0.2, 2, V), "z_loss": 0.01, "softcap": 5.0}], ids=str
)
def test_of_probabilities_the_most_probable_class_is_the_label(options):
    target = torch.randn(N, V).softmax(1)
    for each in (CROSS_ENTROPY, LINEAR[0]):
        each.check(each.tensors(), target, 2.0, upstreams(), **options)


def test_several_places_for_each_hidden_state():
    hidden, head = torch.randn(5, D, requires_grad=True), torch.randn(7, 3, D, requires_grad=True)
    y = torch.tensor([[0, -100, 2], [3, 4, 5], [6, 0, 1], [-100, -100, -100], [2, 2, 2]])
    value, found = linear_cross_entropy(hidden, head, y, reduction="none", return_stats="tokens")
    log_p = torch.einsum("nd,vpd->npv", hidden, head).log_softmax(-1)
    kept = y != -100
    logprob = log_p.gather(2, y.clamp(min=0)[..., None])[..., 0].where(kept, 0)
    torch.testing.assert_close((value, found.logprob), (-logprob, logprob))
    assert found.prediction.tolist() == log_p.argmax(-1).where(kept, -1).tolist()
    g = torch.randn(5, 3)
    expected = torch.autograd.grad(logprob, (hidden, head), g)
    torch.testing.assert_close(torch.autograd.grad(found.logprob, (hidden, head), g), expected)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 2, 3)], ids=str)
def test_values_have_the_shape_of_the_labels(shape):
    y = torch.randint(0, 5, shape)
    n = max(1, y.numel())
    logits = torch.randn(*shape, 5).movedim(-1, min(1, len(shape)))
    of_logits = cross_entropy(logits, y, return_stats="tokens")[1]
    of_hidden = linear_cross_entropy(torch.randn(*shape, D), torch.randn(5, D), y, return_stats="tokens")[1]
    for found in (of_logits, of_hidden):
        assert isinstance(found, TokenStats)
        assert [t.shape for t in found] == [shape] * 4
        assert [t.dtype for t in found] == [torch.float32] * 3 + [torch.int64]
    log_p = logits.movedim(min(1, len(shape)), -1).reshape(n, 5).log_softmax(1)
    torch.testing.assert_close(of_logits.logprob.reshape(n), log_p[range(n), y.reshape(n)])


def test_of_several_largest_logits_the_smallest_class_is_the_prediction(any_loss):
    rows, *head = any_loss.tensors(dtype=torch.float64, n=4)
    if head:
        head[0][40:], head[0][:40] = 1, 0
        head[1:] = [torch.zeros(V, dtype=torch.float64) for _ in head[1:]]
        rows[:] = 1
    else:
        rows[:, 40:], rows[:, :40] = 9, 0
    bound = {"max_logits_bytes": 3 * 8 * V // 2} if any_loss.name.endswith("chunked") else {}  # some rows, some columns
    found = per_token(any_loss, rows, *head, torch.tensor([0, 50, -100, 99]), **bound)[1]
    assert found.prediction.tolist() == [40, 40, -1, 40]


@pytest.mark.parametrize("asked", [a for a in itertools.product([0, 1], repeat=4) if any(a)], ids=str)
@pytest.mark.parametrize("reduction_", ["mean", "none"])
def test_any_of_them_may_have_a_gradient(loss, asked, reduction_):
    """A statistic without a gradient is None to the backward, and adds nothing."""
    y, tensors = labels(), loss.tensors(torch.float64)
    leaves = [t.requires_grad_() for t in tensors]
    value, found = per_token(loss, *leaves, y, reduction=reduction_, **EVERY)
    upstream = [torch.full_like(value, 2.0) if reduction_ == "none" else torch.tensor(2.0, dtype=torch.float64)]
    upstream += [g.double() for g in upstreams()]
    outputs = [(t, g) for t, g, wanted in zip((value, *found[:3]), upstream, asked, strict=True) if wanted]
    grads = torch.autograd.grad([t for t, _ in outputs], leaves, [g for _, g in outputs])
    zeroed = [g * wanted for g, wanted in zip(upstream, asked, strict=True)]
    ref = loss_oracle(tensors, y, upstream=zeroed[0], of_stats=zeroed[1:], reduction=reduction_, **EVERY)[5:]
    for x, r in zip(grads, ref, strict=True):
        torch.testing.assert_close(x, torch.as_tensor(r), rtol=1e-10, atol=1e-12)


def test_a_class_that_is_ruled_out_contributes_nothing():
    logits, y, g = 2 * torch.randn(N, V), labels(), upstreams()
    logits[:, 5], logits[2, 7:] = float("-inf"), float("-inf")
    y[y == 5], y[2] = 4, 3
    ours = CROSS_ENTROPY.check([logits], y, 1.0, g)
    # With class weights and smoothing the loss is infinite, as torch's; the values of each token are the same.
    x = logits.requires_grad_()
    found = cross_entropy(x, y, torch.ones(V), label_smoothing=0.1, return_stats="tokens")[1]
    torch.testing.assert_close([*found], [*ours[1:5]])
    torch.testing.assert_close(
        torch.autograd.grad(found[:3], x, g),
        torch.autograd.grad(cross_entropy(x, y, return_stats="tokens")[1][:3], x, g),
    )


@pytest.mark.parametrize("field", [0, 2])
def test_a_sure_token_keeps_its_digits(any_loss, field):
    """1 − p_y is 1e-7 to 2e-10: log-probability, entropy and their gradients are made of what is left."""
    rows, *head = any_loss.tensors(n=8)
    y, g = torch.arange(8), [torch.ones(8) * (i == field) for i in range(3)]
    rows[:] = 0
    if head:  # the identity: hidden states are logits
        head[0][:] = torch.eye(V, D)
        head[1:] = [torch.zeros(V) for _ in head[1:]]
    rows[range(8), y] = 20 + torch.arange(8.0)
    found = run(lambda *t: per_token(any_loss, *t, y), (rows, *head), 0.0, g)
    ref = [torch.as_tensor(t) for t in loss_oracle((rows, *head), y, upstream=0.0, of_stats=g)]
    for x, r in ((found[1], ref[1]), (found[3], ref[3]), (found[5][range(8), y], ref[5][range(8), y])):
        torch.testing.assert_close(x, r.float(), rtol=1e-5, atol=0)


def test_opposite_gradients_of_loss_and_log_probability_cancel_exactly(loss):
    """loss + logprob is 0 whatever the logits; with smoothing or a divisor it would not be."""
    y = labels()
    zeros = torch.zeros(N)
    found = run(lambda *t: per_token(loss, *t, y, reduction="none"), loss.tensors(), 1.0, [torch.ones(N), zeros, zeros])
    assert all((gradient == 0).all() for gradient in found[5:])


def test_neither_weights_nor_divisors_enter(loss):
    y, tensors = labels(), loss.tensors()
    ref = per_token(loss, *tensors, y)[1]
    options = {"token_weight": torch.rand(N), "num_items": 7, "weight": torch.rand(V), "z_loss": 0.1}
    assert same_bits(per_token(loss, *tensors, y, **options)[1], ref)
    assert same_bits(per_token(loss, *tensors, y, reduction="none", label_smoothing=0.2)[1], ref)


def test_they_agree_with_the_loss_and_its_sums(loss):
    y, tensors = labels(), loss.tensors()
    losses, found = per_token(loss, *tensors, y, reduction="none")
    _, sums = loss.ours(*tensors, y, return_stats=True)
    assert same_bits(found.logprob, -losses + 0.0)
    torch.testing.assert_close(sums.nll_sum, -found.logprob.sum())
    torch.testing.assert_close(sums.entropy_sum, found.entropy.sum())
    assert sums.max_lse == found.lse[y != -100].max()
    assert sums.correct == (found.prediction == y)[y != -100].sum()


def test_asking_for_them_changes_no_bit_of_the_loss(loss):
    y, tensors = labels(), loss.tensors()
    assert torch.equal(per_token(loss, *tensors, y)[0], loss.ours(*tensors, y))


def test_masked_positions_enter_nothing_not_even_as_nan(loss):
    y, g = labels(), upstreams()
    rows, *head = loss.tensors()

    def results():
        return run(lambda *t: per_token(loss, *t, y), (rows, *head), 1.0, g)

    clean = results()
    rows[y == -100] = float("nan")
    assert same_bits(results(), clean)
    for value in clean[1:4]:
        assert (value[y == -100] == 0).all()
    assert (clean[4][y == -100] == -1).all()


@pytest.mark.parametrize("n", [0, 9])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}], ids=str)
def test_nothing_kept_gives_zeros_and_zero_gradients(any_loss, n, options):
    y = torch.full((n,), -100)
    value, *found = run(lambda *t: per_token(any_loss, *t, y, **options), any_loss.tensors(n=n), 1.0, upstreams(n))
    assert (value == 0).all()
    assert all((t == (-1 if i == 3 else 0)).all() for i, t in enumerate(found))


@pytest.mark.parametrize("capacity", [None, N])
def test_with_shift_they_stand_where_the_hidden_state_does(capacity):
    y = labels(12, masked=0.3).reshape(3, 4)
    hidden, weight = LINEAR[0].tensors(n=12)
    leaves = [hidden.reshape(3, 4, D).requires_grad_(), weight.requires_grad_()]
    kept = KeptTokens.from_labels(y, shift=1, capacity=capacity and 12)
    losses, found = linear_cross_entropy(*leaves, kept=kept, shift=True, reduction="none", return_stats="tokens")
    moved = F.pad(y[:, 1:], (0, 1), value=-100)
    expected, ref = linear_cross_entropy(*leaves, moved, reduction="none", return_stats="tokens")
    assert same_bits((losses, *found), (expected, *ref))
    g = [torch.randn(3, 4) for _ in range(3)]
    first, second = (torch.autograd.grad(t[:3], leaves, g) for t in (found, ref))
    torch.testing.assert_close(first, second)


def test_kept_tokens_with_room_to_spare_change_no_value(any_loss):
    if any_loss not in LINEAR:
        pytest.skip("takes no kept tokens")
    y, tensors, g = labels(), any_loss.tensors(), upstreams()
    kept = KeptTokens.from_labels(y, capacity=N + 5)
    padded = run(lambda *t: per_token(any_loss, *t, None, kept=kept), tensors, 1.0, g)
    for x, ref in zip(padded, run(lambda *t: per_token(any_loss, *t, y), tensors, 1.0, g), strict=True):
        torch.testing.assert_close(x, ref)


def test_on_a_device_that_is_not_asked_a_label_outside_gives_nan(any_loss, monkeypatch):
    monkeypatch.setattr(reduction, "checks_enabled", lambda device: False)
    y, tensors = labels(), any_loss.tensors()
    y[0] = V
    leaves = [t.requires_grad_() for t in tensors]
    _, found = per_token(any_loss, *leaves, y)
    _, others = per_token(any_loss, *leaves, y.where(y != V, 1))
    for value, other in zip(found[:3], others[:3], strict=True):
        assert value.isnan().nonzero().flatten().tolist() == [0]
        assert value[1:].equal(other[1:])
        gradient = torch.autograd.grad(value.sum(), leaves[0], retain_graph=True)[0]
        assert gradient[0].isnan().all()
        assert not gradient[1:].isnan().any()


def test_under_autocast_values_are_fp32():
    y, (hidden, weight) = labels(), LINEAR[0].tensors()
    leaves = [t.requires_grad_() for t in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        value, found = linear_cross_entropy(*leaves, y, return_stats="tokens")
        of_logits = cross_entropy(F.linear(hidden, weight), y, return_stats="tokens")
    assert {t.dtype for t in (value, *found[:3], of_logits[0], *of_logits[1][:3])} == {torch.float32}
    assert {g.dtype for g in torch.autograd.grad(found.entropy.sum(), leaves)} == {torch.float32}


def test_a_half_precision_loss_keeps_fp32_values():
    logits, y = torch.randn(N, V).bfloat16(), labels()
    value, found = cross_entropy(logits, y, return_stats="tokens")
    assert value.dtype == torch.bfloat16
    assert {t.dtype for t in found[:3]} == {torch.float32}


def test_the_modules_return_them_too():
    logits, hidden, y = torch.randn(N, V), torch.randn(N, D), labels()
    module = LinearCrossEntropyLoss(D, V, return_stats="tokens", reduction="none")
    expected = linear_cross_entropy(hidden, module.linear.weight, y, return_stats="tokens", reduction="none")
    assert same_bits(module(hidden, y), expected)
    assert same_bits(
        CrossEntropyLoss(return_stats="tokens")(logits, y), cross_entropy(logits, y, return_stats="tokens")
    )


# ---- fp16 products, as on a GPU


@pytest.mark.parametrize("reduction_", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bound", [None, 2 * (V + 3)])
@pytest.mark.parametrize("chunking", ["tokens", "vocab"])
def test_half_precision_products_stay_within_the_budget(half_products, chunking, dtype, bound, reduction_):
    loss = next(loss for loss in LINEAR if loss.name == f"linear-{chunking}-chunked")
    y, g, tensors = labels(), upstreams(), loss.tensors(dtype)
    call = {"reduction": reduction_, **EVERY}
    ours = run(lambda *t: per_token(loss, *t, y, max_logits_bytes=bound, **call), tensors, 1.0, g)
    eager = run(lambda *t: loss.plain(*t, y, return_stats="tokens", **call), tensors, 1.0, g)
    ref = loss_oracle(tensors, y, of_stats=g, **call)
    for i, (x, r, e) in enumerate(zip(ours, ref, eager, strict=True)):
        if i != 4:  # of logits in half precision another class may be the largest
            check(str(i), x, r, e)


@pytest.mark.parametrize("chunking", ["tokens", "vocab"])
@pytest.mark.parametrize("factor", [1e-5, 3e5])
@pytest.mark.parametrize("field", range(3))
def test_fp16_holds_gradients_that_are_tiny_or_huge(half_products, monkeypatch, chunking, factor, field):
    """dlogits of about ``factor`` would underflow, or overflow in the products; the gradients fit fp16."""
    y, (hidden, weight) = labels(masked=0), LINEAR[0].tensors(torch.float16)
    scale = 64.0 if factor < 1 else 1 / 4096
    tensors = hidden * scale, weight * (1 / scale)
    g = [factor * t * (i == field) for i, t in enumerate(upstreams())]

    def ours():
        return run(lambda *t: linear_cross_entropy(*t, y, chunking=chunking, return_stats="tokens"), tensors, 0.0, g)[
            -1
        ].float()

    exact = torch.as_tensor(loss_oracle(tensors, y, upstream=0.0, of_stats=g)[-1]).float()
    worst = (ours() - exact).abs().max()
    assert worst <= 4 * torch.finfo(torch.float16).eps * exact.abs().max()
    monkeypatch.setattr(function, "hold_back", lambda factors, *_: (None, factors))
    assert not (ours() - exact).abs().max() <= 4 * worst


# ---- autograd


@pytest.mark.parametrize("reduction_", ["mean", "none"])
def test_a_second_backward_is_right_whatever_became_of_the_first_gradient(loss, reduction_):
    y, leaves, g = labels(), [t.requires_grad_() for t in loss.tensors()], upstreams()
    value, found = per_token(loss, *leaves, y, reduction=reduction_)
    outputs, upstream = (value, *found[:3]), (torch.ones_like(value), *g)
    first = torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.fill_(float("nan"))
    second = torch.autograd.grad(outputs, leaves, [2 * t for t in upstream], retain_graph=True)
    for a, b in zip(kept, second, strict=True):
        check("second gradient", b / 2, a, a)
    of_loss = torch.autograd.grad(value.sum(), leaves)
    for a, b in zip(
        torch.autograd.grad(loss.ours(*leaves, y, reduction=reduction_).sum(), leaves), of_loss, strict=True
    ):
        check("gradient of the loss", b, a, a)


@pytest.mark.parametrize("field", range(3))
def test_gradients_of_gradients_are_those_of_plain_code(any_loss, field):
    def second(function, dtype=torch.float32):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        first = torch.autograd.grad(function(*leaves).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    def plain(*leaves):
        logits = leaves[0] if len(leaves) == 1 else F.linear(*leaves)
        log_p = logits[kept].log_softmax(1)
        if field == 0:
            return log_p.gather(1, y[kept, None])
        return logits[kept].logsumexp(1) if field == 1 else -(log_p.exp() * log_p)

    y, tensors = labels(), any_loss.tensors()
    kept = y != -100
    found = second(lambda *leaves: per_token(any_loss, *leaves, y)[1][field])
    for x, ref, eager in zip(found, second(plain, torch.float64), second(plain), strict=True):
        check("second gradient", x, ref, eager)


def test_without_gradients_nothing_asks_for_one(loss):
    leaves = [t.requires_grad_() for t in loss.tensors()]
    value, found = per_token(loss, *leaves, labels())
    assert [t.requires_grad for t in (value, *found)] == [True] * 4 + [False]
    with torch.no_grad():
        value, found = per_token(loss, *leaves, labels())
    assert not any(t.requires_grad for t in (value, *found))


# ---- bad input


@pytest.mark.parametrize("wrong", ["sums", "token", 1, None, 2.0, ["tokens"]])
def test_another_value_is_refused_by_name(wrong):
    for each in (CROSS_ENTROPY, LINEAR[0]):
        with pytest.raises(ValueError, match=r"^return_stats: expected False, True or 'tokens', got"):
            each.ours(*each.tensors(), labels(), return_stats=wrong)
    with pytest.raises(ValueError, match=r"^return_stats: expected"):
        LinearCrossEntropyLoss(D, V, return_stats=wrong)


@pytest.mark.parametrize("loss", CUDA, ids=lambda loss: loss.name)
def test_the_cuda_kernels_do_not_carry_them(loss):
    with pytest.raises(Unavailable) as refused:
        per_token(loss, *loss.tensors(), labels())
    assert "impl='cuda': the CUDA kernels have no return_stats='tokens'; Triton's have" in str(refused.value)
