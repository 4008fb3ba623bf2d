"""What a token's loss may be beside its nll, in both losses and every loop: smoothing, caps, scales, penalties, class
weights, probabilities, more dimensions."""

import pytest
import torch
import torch.nn.functional as F

from sft_kernels import CrossEntropyLoss, KeptTokens, LinearCrossEntropyLoss, cross_entropy, linear_cross_entropy
from sft_kernels._budget import check
from sft_kernels.ops.softmax_grad import reduction

from .helpers import CROSS_ENTROPY, DTYPES, LINEAR, LOSSES, D, N, V, labels, run, same_bits

CLASS_WEIGHT = torch.linspace(0, 2, V)
SCALARS = [
    {"label_smoothing": 0.1},
    {"label_smoothing": 1.0},
    {"softcap": 3.0},
    {"logit_scale": 0.25},
    {"z_loss": 0.01},
    {"label_smoothing": 0.2, "softcap": 5.0},  # what the CUDA kernels carry
    {"label_smoothing": 0.2, "softcap": 5.0, "logit_scale": 2.0, "z_loss": 0.1},
]
WEIGHTS = [{"weight": CLASS_WEIGHT}, {"weight": CLASS_WEIGHT, "z_loss": 0.1, "softcap": 4.0}]
COMPOSED = [{"weight": CLASS_WEIGHT, "label_smoothing": 0.3, "z_loss": 0.1, "logit_scale": 0.5}]
WHOLE_LOSSES = [CROSS_ENTROPY, LINEAR[0]]  # where no loop can be chosen


def names(options):
    return "+".join(options)


def each(losses):
    return pytest.mark.parametrize("loss", losses, ids=lambda loss: loss.name)


def probabilities(n=N, v=V):
    return (2 * torch.randn(n, v)).softmax(1)


# ---- right


@each(LOSSES)
@pytest.mark.parametrize("options", SCALARS + WEIGHTS, ids=names)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_options(loss, options, reduction):
    upstream = torch.rand(N) + 0.5 if reduction == "none" else -1.7
    loss.check(loss.tensors(), labels(), upstream, reduction=reduction, **options)


@each(LOSSES)
@pytest.mark.parametrize("options", [SCALARS[-1], WEIGHTS[-1]], ids=names)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options_in_every_dtype(loss, options, dtype):
    loss.check(loss.tensors(dtype), labels(), **options)


@each(LOSSES)
@pytest.mark.parametrize("more", [{"num_items": 11}, {"token_weight": torch.linspace(-1, 2, N)}], ids=names)
@pytest.mark.parametrize("options", [SCALARS[-1], WEIGHTS[-1]], ids=names)
def test_divisors_and_token_weights_with_options(loss, options, more):
    loss.check(loss.tensors(), labels(), **options, **more)


@each(WHOLE_LOSSES)
@pytest.mark.parametrize("options", COMPOSED, ids=names)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_class_weights_with_smoothing(loss, options, reduction, dtype):
    upstream = torch.rand(N) + 0.5 if reduction == "none" else -1.7
    loss.check(loss.tensors(dtype), labels(), upstream, reduction=reduction, **options)
    if reduction == "mean":
        loss.check(loss.tensors(dtype), labels(), num_items=9, token_weight=torch.rand(N), **options)


@each(WHOLE_LOSSES)
@pytest.mark.parametrize(
    "options", [{}, *SCALARS, *WEIGHTS, *COMPOSED, {"num_items": 7, "token_weight": torch.rand(N)}], ids=names
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_probabilities(loss, options, reduction):
    if reduction == "none" and "num_items" in options:
        options = {"token_weight": options["token_weight"]}
    loss.check(loss.tensors(), probabilities(), 0.7, reduction=reduction, **options)


@each(WHOLE_LOSSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probabilities_in_every_dtype(loss, dtype):
    loss.check(loss.tensors(dtype), probabilities().to(dtype), label_smoothing=0.1)


@each(WHOLE_LOSSES)
def test_gradients_flow_through_probabilities_as_in_torch(loss):
    target, tensors = probabilities(), loss.tensors()
    ours, plain = (
        run(lambda t: function(*tensors, t, label_smoothing=0.2), [target])  # noqa: B023
        for function in (loss.ours, loss.plain)
    )
    ref = run(lambda t: loss.plain(*(x.double() for x in tensors), t, label_smoothing=0.2), [target.double()])
    check("gradient", ours[1], ref[1], plain[1])


@each(LOSSES)
@pytest.mark.parametrize("options", [*SCALARS, *WEIGHTS], ids=names)
def test_gradcheck(loss, options):
    options = {name: v[:4].double() if name == "weight" else v for name, v in options.items()}
    tensors = [t.requires_grad_() for t in loss.tensors(torch.float64, n=5, v=4)]
    y = torch.tensor([2, -100, 0, 3, -100])
    assert torch.autograd.gradcheck(lambda *t: loss.ours(*t, y, **options), tensors, fast_mode=True)


@each(LOSSES)
@pytest.mark.parametrize("offset", [0, 40, 1000])
def test_a_sure_token_keeps_its_digits_with_options(loss, offset):
    y = labels(masked=0)
    if loss not in LINEAR:
        tensors = [(loss.tensors()[0] + offset).scatter(1, y[:, None], offset + 20.0)]
    else:  # the hidden state is its label's row of the head, times what makes its logit about 20
        _, weight, *bias = loss.tensors()
        tensors = [weight[y] * 20 / weight[y].square().sum(1, keepdim=True), weight, *(b + offset for b in bias)]
    loss.check(tensors, y, z_loss=1e-4)
    loss.check(tensors, y, label_smoothing=1e-3, logit_scale=0.5)


@each(LOSSES)
@pytest.mark.parametrize("options", SCALARS + WEIGHTS, ids=names)
def test_masked_rows_and_second_backwards_with_options(loss, options):
    y = labels()
    rows, *rest = loss.tensors()
    leaves = [t.requires_grad_() for t in (rows, *rest)]
    out = loss.ours(*leaves, y, **options)
    first = torch.autograd.grad(out, leaves, retain_graph=True)
    assert same_bits(torch.autograd.grad(out, leaves), first)
    poisoned = rows.detach().clone()
    poisoned[y == -100] = float("nan")
    assert same_bits(run(lambda *t: loss.ours(*t, y, **options), (poisoned, *rest))[1:], first)


@each(WHOLE_LOSSES)
@pytest.mark.parametrize("options", COMPOSED, ids=names)
def test_masked_rows_enter_nothing_where_torch_computes(loss, options):
    y = labels()
    rows, *rest = loss.tensors()
    clean = run(lambda *t: loss.ours(*t, y, **options), (rows, *rest))
    rows = rows.masked_fill((y == -100)[:, None], float("nan"))
    assert same_bits(run(lambda *t: loss.ours(*t, y, **options), (rows, *rest)), clean)


@each(LOSSES)
@pytest.mark.parametrize("options", [*SCALARS, *WEIGHTS], ids=names)
@pytest.mark.parametrize("n", [N, 0])
def test_nothing_kept_gives_zero_with_options(loss, options, n):
    value, *gradients = run(lambda *t: loss.ours(*t, torch.full((n,), -100), **options), loss.tensors(n=n))
    assert value == 0
    assert all((gradient == 0).all() for gradient in gradients)


@each(WHOLE_LOSSES)
def test_no_weight_kept_gives_zero(loss):
    """Kept tokens whose classes all weigh nothing: torch divides zero by zero."""
    for options in ({"weight": torch.zeros(V)}, {"weight": torch.zeros(V), "label_smoothing": 0.1}):
        value, *gradients = run(lambda *t: loss.ours(*t, labels(), **options), loss.tensors())  # noqa: B023
        assert value == 0
        assert all((gradient == 0).all() for gradient in gradients)
    value, *gradients = run(lambda *t: loss.ours(*t, torch.empty(0, V)), loss.tensors(n=0))
    assert value == 0
    assert all((gradient == 0).all() for gradient in gradients)


@each(WHOLE_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_class_weights_may_be_of_any_floating_dtype(loss, dtype):
    y, tensors, weight = labels(), loss.tensors(), CLASS_WEIGHT.bfloat16()
    given, fp32 = (loss.ours(*tensors, y, weight=w) for w in (weight.to(dtype), weight.float()))
    assert torch.equal(given, fp32)
    assert given.dtype == torch.float32


@each([CROSS_ENTROPY, *LINEAR[2:]])  # those with a bias, which alone rules a class out
def test_classes_ruled_out_by_minus_infinity_with_a_penalty_and_a_scale(loss):
    """Smoothing would give them weight; z-loss and scale do not."""
    y = labels()
    y[y >= 50] = 3
    *rest, last = loss.tensors()
    last[..., 50:] = float("-inf")
    ours = run(lambda *t: loss.ours(*t, y, z_loss=0.1, logit_scale=0.5), (*rest, last))
    kept = run(
        lambda *t: loss.ours(*t, y, z_loss=0.1, logit_scale=0.5),
        [t[..., :50] if i == 0 and not rest else t[:50] if t.shape[0] == V else t for i, t in enumerate((*rest, last))],
    )
    check("value", ours[0], kept[0].double(), kept[0])
    assert all(gradient.isfinite().all() for gradient in ours[1:])


# ---- statistics


@each(LOSSES)
def test_statistics_are_those_of_the_scaled_and_capped_logits(loss):
    y, tensors = labels(), loss.tensors()
    options = {"softcap": 3.0, "logit_scale": 2.0, "label_smoothing": 0.1, "z_loss": 0.1, "weight": None}
    _, stats = loss.ours(*tensors, y, return_stats=True, **options)

    def of(*tensors):
        logits = tensors[0] if len(tensors) == 1 else F.linear(*tensors)
        log_p = (3 * torch.tanh(2 * logits / 3))[y != -100].log_softmax(1)
        nll = F.nll_loss(log_p, y[y != -100], reduction="sum")
        return nll, -(log_p.exp() * log_p).sum()

    for name, ref, eager in zip(
        ("nll_sum", "entropy_sum"), of(*(t.double() for t in tensors)), of(*tensors), strict=True
    ):
        check(name, getattr(stats, name), ref, eager)
    assert stats.max_lse <= 3 + torch.tensor(float(V)).log()


def test_statistics_where_the_first_slices_of_the_vocabulary_are_ruled_out():
    """A padded vocabulary whose bias says so."""
    y, (hidden, weight, _) = labels().clamp(min=V - 5), LINEAR[2].tensors()
    bias = torch.zeros(V).index_fill(0, torch.arange(V - 5), float("-inf"))
    options = {"linear_bias": bias, "return_stats": True}
    _, whole = linear_cross_entropy(hidden, weight, y, chunking="tokens", **options)
    _, sliced = linear_cross_entropy(hidden, weight, y, chunking="vocab", max_logits_bytes=4 * N * 7, **options)
    check("entropy_sum", sliced.entropy_sum, whole.entropy_sum, whole.entropy_sum)


@each(WHOLE_LOSSES)
@pytest.mark.parametrize("soft", [False, True])
def test_statistics_where_torch_computes(loss, soft):
    y, tensors = labels(masked=0), loss.tensors()
    target = F.one_hot(y, V).float() * 0.9 if soft else y
    options = {"weight": CLASS_WEIGHT, "label_smoothing": 0.1}
    value, stats = loss.ours(*(t.requires_grad_() for t in tensors), target, return_stats=True, **options)
    assert same_bits(stats, loss.ours(*tensors, y, return_stats=True)[1])
    assert value.requires_grad
    assert not any(field.requires_grad for field in stats)


# ---- more dimensions


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, SCALARS[-1], *WEIGHTS, *COMPOSED], ids=names)
@pytest.mark.parametrize("soft", [False, True])
def test_more_dimensions(options, reduction, soft):
    logits, y = torch.randn(3, V, 2, 4), labels(24).reshape(3, 2, 4)
    target = torch.randn(3, V, 2, 4).softmax(1) if soft else y
    flat, flat_target = logits.movedim(1, -1).reshape(-1, V), y.flatten()
    if soft:
        flat_target = target.movedim(1, -1).reshape(-1, V)
    ours = run(lambda x: cross_entropy(x, target, reduction=reduction, **options), [logits])
    ref = run(lambda x: cross_entropy(x, flat_target, reduction=reduction, **options), [flat])
    assert same_bits(ours[0].flatten(), ref[0].flatten())
    assert same_bits(ours[1].movedim(1, -1).reshape(-1, V), ref[1])
    assert ours[0].shape == ((3, 2, 4) if reduction == "none" else ())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("options", [{}, {"reduction": "none", "softcap": 3.0}, {"num_items": 7}], ids=names)
def test_a_head_with_more_dimensions(bias, soft, options):
    hidden, weight, b = torch.randn(5, D), torch.randn(V, 2, 3, D) * 0.4, torch.randn(V, 2, 3)
    target = torch.randn(5, V, 2, 3).softmax(1) if soft else labels(30).reshape(5, 2, 3)
    token_weight = torch.rand(5, 2, 3)

    def ours(x, w, b):
        bias_ = b if bias else None
        return (
            linear_cross_entropy(x, w, target, linear_bias=bias_, token_weight=token_weight, **options).sum() + b.sum()
        )

    def by_hand(x, w, b):
        logits = torch.einsum("nd,vijd->nvij", x, w) + (b if bias else 0)
        return cross_entropy(logits, target, token_weight=token_weight, **options).sum() + b.sum()

    results, eager = (run(f, (hidden, weight, b)) for f in (ours, by_hand))
    ref = run(by_hand, (hidden.double(), weight.double(), b.double()))
    for i, each in enumerate(zip(results, ref, eager, strict=True)):
        check(f"gradient {i}" if i else "value", *each)


def test_masked_places_of_a_head_with_more_dimensions_enter_nothing():
    hidden, head = torch.randn(3, D), torch.randn(V, 2, D)
    y = torch.tensor([[1, 2], [-100, -100], [-100, 3]])
    clean = run(lambda h, w: linear_cross_entropy(h, w, y), (hidden, head))
    hidden[1] = float("nan")
    assert same_bits(run(lambda h, w: linear_cross_entropy(h, w, y), (hidden, head)), clean)


# ---- modules


def test_the_module_over_logits_is_the_function():
    (logits,), y = CROSS_ENTROPY.tensors(), labels()
    options = {"ignore_index": 3, "reduction": "sum", "label_smoothing": 0.1, "softcap": 4.0, "logit_scale": 2.0}
    options |= {"z_loss": 0.1, "return_stats": True, "impl": "torch"}
    y = y.clamp(min=0)
    module = CrossEntropyLoss(CLASS_WEIGHT, **options)
    token_weight = torch.rand(N)
    assert same_bits(
        module(logits, y, token_weight=token_weight),
        cross_entropy(logits, y, CLASS_WEIGHT, token_weight=token_weight, **options),
    )
    assert same_bits(CrossEntropyLoss()(logits, y, num_items=5), cross_entropy(logits, y, num_items=5))
    assert module.state_dict().keys() == torch.nn.CrossEntropyLoss(CLASS_WEIGHT).state_dict().keys()


@pytest.mark.parametrize("bias", [False, True])
def test_the_module_with_the_head_is_the_function(bias):
    options = {"ignore_index": 3, "label_smoothing": 0.1, "softcap": 4.0, "logit_scale": 2.0, "z_loss": 0.1}
    options |= {"shift": True, "chunking": "vocab", "max_logits_bytes": 8 * N * 9, "return_stats": True}
    module = LinearCrossEntropyLoss(D, V, bias=bias, **options)
    hidden, y = torch.randn(N, D), labels().clamp(min=0)
    kept = KeptTokens.from_labels(y, 3, shift=True)
    call = {"linear_bias": module.linear.bias, "token_weight": torch.rand(N), "num_items": 9}
    ours = linear_cross_entropy(hidden, module.linear.weight, y, **call, **options)
    del call["linear_bias"]
    assert same_bits(module(hidden, y, **call), ours)
    assert same_bits(module(hidden, kept=kept, **call), ours)
    ours[0].backward()
    assert module.linear.weight.grad is not None
    torchs = getattr(torch.nn, "LinearCrossEntropyLoss", None)
    if torchs is not None:
        assert module.state_dict().keys() == torchs(D, V, bias=bias).state_dict().keys()


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="torch >= 2.13")
@pytest.mark.parametrize("out_features", [(), (2, 3)], ids=str)
def test_the_module_with_the_head_replaces_torchs(out_features):
    weight = torch.rand(V) + 0.5
    theirs = torch.nn.LinearCrossEntropyLoss(D, V, out_features=out_features, bias=True, weight=weight)
    ours = LinearCrossEntropyLoss(D, V, out_features=out_features, bias=True, weight=weight)
    ours.load_state_dict(theirs.state_dict())
    hidden, y = torch.randn(7, D), labels(7 * 6 if out_features else 7).reshape(7, *out_features)
    values = [module(hidden, y) for module in (ours, theirs)]
    gradients = [torch.autograd.grad(v, m.parameters()) for v, m in zip(values, (ours, theirs), strict=True)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "options",
    [{"reduction": "avg"}, {"label_smoothing": 2}, {"softcap": 0.0}, {"logit_scale": -1}, {"z_loss": -1}],
    ids=names,
)
def test_modules_refuse_bad_options_when_they_are_built(options):
    for build in (CrossEntropyLoss, lambda **options: LinearCrossEntropyLoss(D, V, **options)):
        with pytest.raises(ValueError, match=next(iter(options))):
            build(**options)


# ---- autocast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, *COMPOSED], ids=names)
def test_autocast_takes_a_bias_of_another_dtype(dtype, options):
    y, hidden, weight, bias = labels(), torch.randn(N, D).bfloat16(), torch.randn(V, D), torch.randn(V).to(dtype)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        value = linear_cross_entropy(hidden, weight, y, linear_bias=bias, **options)
    gradients = torch.autograd.grad(value, leaves)
    assert value.dtype == torch.float32
    assert [gradient.dtype for gradient in gradients] == [t.dtype for t in leaves]
    exact = run(
        lambda *t: linear_cross_entropy(*t[:2], y, linear_bias=t[2], **options), [t.detach().double() for t in leaves]
    )
    for x, ref in zip((value, *gradients), exact, strict=True):
        check("gradient", x.detach(), ref, ref)  # on the CPU products are fp32: nothing to excuse


# ---- bad input


@each(LOSSES)
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing"),
        ({"label_smoothing": None}, TypeError, "label_smoothing"),
        ({"softcap": "3"}, TypeError, "softcap"),
        (
            {"logit_scale": torch.tensor(0.5, requires_grad=True)},
            TypeError,
            "logit_scale",
        ),  # its gradient would be lost
        ({"num_items": "4"}, TypeError, "num_items"),
        ({"num_items": float("inf")}, ValueError, "num_items"),
        ({"num_items": torch.tensor(4.0, requires_grad=True)}, ValueError, "num_items"),
        ({"weight": [1.0] * V}, TypeError, "^weight"),
        ({"token_weight": [1.0] * N}, TypeError, "^token_weight"),
        ({"label_smoothing": 1.1}, ValueError, "label_smoothing"),
        ({"label_smoothing": float("nan")}, ValueError, "label_smoothing"),
        ({"softcap": 0.0}, ValueError, "softcap"),
        ({"softcap": float("inf")}, ValueError, "softcap"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale"),
        ({"logit_scale": float("nan")}, ValueError, "logit_scale"),
        ({"z_loss": -1e-4}, ValueError, "z_loss"),
        ({"weight": torch.ones(V + 1)}, ValueError, "^weight"),
        ({"weight": torch.ones(V, 1)}, ValueError, "^weight"),
        ({"weight": torch.ones(V, dtype=torch.int64)}, TypeError, "^weight"),
        ({"weight": torch.ones(V, device="meta")}, ValueError, "^weight.*device"),
        ({"weight": torch.ones(V, requires_grad=True)}, ValueError, "^weight"),
    ],
    ids=lambda value: names(value) if isinstance(value, dict) else "",
)
def test_a_bad_option_is_named(loss, options, error, match):
    with pytest.raises(error, match=match):
        loss.ours(*loss.tensors(), labels(), **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kept": [0, 1]}, "kept"),
        ({"shift": 2.0}, "shift: expected True, False or a number of tokens"),
        ({"max_logits_bytes": 1e9}, "max_logits_bytes"),
        ({"linear_bias": [0.0] * V}, "linear_bias"),
    ],
    ids=names,
)
def test_an_option_of_another_type_is_named(options, match):
    with pytest.raises(TypeError, match=match):
        linear_cross_entropy(*LINEAR[0].tensors(), labels(), **options)
    with pytest.raises(TypeError, match="linear_weight"):
        linear_cross_entropy(LINEAR[0].tensors()[0], None, labels())
    with pytest.raises(TypeError, match="ignore_index"):
        cross_entropy(*CROSS_ENTROPY.tensors(), labels(), ignore_index=None)


@pytest.mark.parametrize(
    ("bias", "error"),
    [
        (torch.ones(V + 1), ValueError),
        (torch.ones(V, 1), ValueError),
        (torch.ones(V, dtype=torch.int64), TypeError),
        (torch.ones(V, dtype=torch.float64), TypeError),
        (torch.ones(V, device="meta"), ValueError),
    ],
    ids=["length", "shape", "integers", "dtype", "device"],
)
def test_a_bad_bias_is_named(bias, error):
    with pytest.raises(error, match="linear_bias"):
        linear_cross_entropy(*LINEAR[0].tensors(), labels(), linear_bias=bias)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"chunking": "vocab"}, "chunking.*not chunked"),
        ({"max_logits_bytes": 10**9}, "max_logits_bytes.*not chunked"),
        ({"shift": True}, "shift"),
        ({"kept": KeptTokens.from_labels(torch.zeros(N, dtype=torch.int64))}, "kept"),
        ({"ignore_index": -100}, "ignore_index"),
    ],
    ids=lambda value: names(value) if isinstance(value, dict) else None,
)
def test_what_says_nothing_about_probabilities_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        linear_cross_entropy(*LINEAR[0].tensors(), probabilities(), **options)


def test_what_says_nothing_about_other_whole_losses_is_refused():
    with pytest.raises(ValueError, match=r"chunking.*not chunked"):
        linear_cross_entropy(*LINEAR[0].tensors(), labels(), chunking="tokens", **COMPOSED[0])
    with pytest.raises(ValueError, match="ignore_index"):
        cross_entropy(*CROSS_ENTROPY.tensors(), probabilities(), ignore_index=3)
    head = torch.randn(V, 2, D)
    with pytest.raises(ValueError, match="max_logits_bytes"):
        linear_cross_entropy(torch.randn(3, D), head, labels(6).reshape(3, 2), max_logits_bytes=10**9)
    with pytest.raises(ValueError, match="shift"):
        linear_cross_entropy(torch.randn(3, D), head, labels(6).reshape(3, 2), shift=True)
    with pytest.raises(ValueError, match="input"):
        linear_cross_entropy(torch.randn(1, 3, D), head, labels(6).reshape(1, 3, 2))


@each(WHOLE_LOSSES)
@pytest.mark.parametrize("options", [*WEIGHTS, *COMPOSED], ids=names)
@pytest.mark.parametrize("wrong", [-1, V, 2**40])
def test_on_a_device_that_is_not_asked_a_label_outside_gives_nan(loss, options, wrong, monkeypatch):
    monkeypatch.setattr(reduction, "checks_enabled", lambda device: False)
    y = labels()
    y[0] = wrong
    losses = loss.ours(*loss.tensors(), y, reduction="none", **options)
    assert losses.isnan().nonzero().flatten().tolist() == [0]
    assert loss.ours(*loss.tensors(), y, **options).isnan()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_cap_far_below_the_scale_overflows_nothing(impl):
    """logit_scale / softcap is beyond fp32; a logit of 0 stays 0."""
    x = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    loss = cross_entropy(x, torch.tensor([0]), softcap=1e-30, logit_scale=1e10, impl=impl)
    loss.backward()
    assert loss.item() == pytest.approx(torch.tensor(3.0).log().item())
    assert x.grad.isfinite().all()
