"""The public functions where torch's own work: ``torch.func``, ``vmap``, second derivatives, traces, fake tensors."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.functional import hessian
from torch.func import functional_call, grad, grad_and_value, jacfwd, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from sft_kernels import (
    AttentionTiles,
    CrossEntropyLoss,
    KeptTokens,
    LinearCrossEntropyLoss,
    cross_entropy,
    linear_cross_entropy,
    packed_attention,
)
from sft_kernels._backend import Unavailable

N, V, D = 6, 9, 4
Y = torch.tensor([0, 3, -100, 8, 2, 1])
OPTIONS = {
    "labels": {},
    "smoothing": {"label_smoothing": 0.2},
    "weight": {"weight": torch.linspace(0.1, 2, V)},
    "weight and smoothing": {"weight": torch.linspace(0.1, 2, V), "label_smoothing": 0.1},
    "probabilities": {"target": torch.rand(N, V, generator=torch.Generator().manual_seed(0)).softmax(1)},
}


@pytest.fixture(autouse=True)
def _poison_unwritten_memory():
    """Off: what it wraps cannot be traced."""


def over_logits(function):
    return torch.randn(N, V), function


def over_a_head(function):
    head = torch.randn(V, D)
    if function is F.cross_entropy:
        return torch.randn(N, D), lambda x, y, **options: F.cross_entropy(x @ head.T, y, **options)
    return torch.randn(N, D), lambda x, y, **options: linear_cross_entropy(x, head, y, **options)


def double_backward(f, x, y):
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(x, y), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


def batch_of_gradients(reduction):
    def case(f, x, y):
        x = x.clone().requires_grad_()
        upstream = torch.eye(N) if reduction == "none" else torch.tensor([1.0, -2.0])
        return torch.autograd.grad(f(x, y, reduction=reduction), x, upstream, is_grads_batched=True)[0]

    return case


def dual(f, x, y):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()), y)).tangent


class Called(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x, y):
        return self.f(x, y)


CASES = {
    "grad": lambda f, x, y: grad(f)(x, y),
    "grad_and_value": lambda f, x, y: grad_and_value(f)(x, y),
    "vjp": lambda f, x, y: vjp(lambda x: f(x, y, reduction="none"), x)[1](torch.arange(6.0)),
    "jvp": lambda f, x, y: jvp(lambda x: f(x, y), (x,), (x.cos(),)),
    "jacfwd": lambda f, x, y: jacfwd(lambda x: f(x, y, reduction="none"))(x),
    "hessian": lambda f, x, y: torch.func.hessian(f)(x, y),
    "vmap over inputs": lambda f, x, y: vmap(lambda x: f(x, y), in_dims=1)(torch.stack([x, x + 1], 1)),
    "vmap over rows": lambda f, x, y: vmap(lambda x, y: f(x, y, reduction="none"))(x, y),
    "gradients of samples": lambda f, x, y: vmap(grad(lambda x, y: f(x[None], y[None], reduction="sum")))(x, y),
    "gradients of gradients": double_backward,
    "autograd's hessian": lambda f, x, y: hessian(lambda x: f(x, y), x),
    "batched hessian": lambda f, x, y: hessian(lambda x: f(x, y), x, vectorize=True),
    "batch of gradients": batch_of_gradients("none"),
    "batch of gradients of the mean": batch_of_gradients("mean"),
    "forward mode": dual,
    "make_fx": lambda f, x, y: make_fx(f)(x, y)(x, y),
    "jit.trace": lambda f, x, y: torch.jit.trace(Called(f), (x + 1, y), check_trace=False)(x, y),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("options", [*OPTIONS])
@pytest.mark.parametrize("make", [over_logits, over_a_head])
@pytest.mark.parametrize("case", [*CASES])
def test_it_is_what_torchs_own_gives(case, make, options):
    options = dict(OPTIONS[options])
    target, state = options.pop("target", Y), torch.get_rng_state()
    found, wanted = [], []
    for results, function in ((found, cross_entropy), (wanted, F.cross_entropy)):
        torch.set_rng_state(state)
        x, f = make(function)
        results.append(CASES[case](partial(_called, f, options), x, target))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def _called(f, options, x, y, **more):
    return f(x, y, **options, **more)


@pytest.mark.parametrize("make", [over_logits, over_a_head])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vmap_over_labels_which_torchs_own_does_not_take(make, reduction):
    x, f = make(cross_entropy)
    labels = torch.stack([Y, Y.flip(0)], 1)
    weights = torch.rand(N, 2)
    for given in ({}, {"token_weight": weights[:, 0]}):
        found = vmap(lambda y: f(x, y, reduction=reduction, **given), in_dims=1)(labels)  # noqa: B023
        wanted = [f(x, y, reduction=reduction, **given) for y in labels.T]
        torch.testing.assert_close(found, torch.stack(wanted))
    nested = vmap(lambda y: vmap(lambda x: f(x, y, reduction=reduction))(torch.stack([x, 2 * x])), 1)(labels)
    torch.testing.assert_close(nested, torch.stack([torch.stack([f(z, y, reduction=reduction) for z in (x, 2 * x)])
                                                    for y in labels.T]))  # fmt: skip


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("make", [over_logits, over_a_head])
def test_an_exported_loss_takes_other_labels(make, strict):
    torch._dynamo.reset()
    x, f = make(cross_entropy)
    exported = torch.export.export(Called(f), (x, Y), strict=strict).module()
    torch.testing.assert_close(exported(x, Y.flip(0)), f(x, Y.flip(0)))


def test_compiled_transforms():
    torch._dynamo.reset()
    x = torch.randn(N, V)
    for transform in (grad, lambda f: vmap(lambda row, y: f(row[None], y[None], reduction="sum"))):
        compiled = torch.compile(transform(cross_entropy), backend="aot_eager")
        torch.testing.assert_close(compiled(x, Y), transform(cross_entropy)(x, Y))


@pytest.mark.parametrize("return_stats", [True, "tokens"])
@pytest.mark.parametrize("make", [over_logits, over_a_head])
def test_statistics(make, return_stats):
    x, f = make(cross_entropy)
    _, wanted = f(x, Y, return_stats=return_stats)
    _, found = vmap(lambda x: f(x, Y, return_stats=return_stats))(x[None])
    for name, a, b in zip(wanted._fields, found, wanted, strict=True):
        torch.testing.assert_close(a[0], b.detach(), msg=lambda text: f"{name}: {text}")  # noqa: B023


def test_the_second_derivatives_of_everything():
    """Through every option, through the values of each token, and by inputs that depend on one another."""
    hidden, head = (torch.randn(n, D, dtype=torch.float64, requires_grad=True) for n in (N, V))
    bias = torch.randn(V, dtype=torch.float64, requires_grad=True)
    options = {"softcap": 3.0, "logit_scale": 0.7, "z_loss": 0.1, "label_smoothing": 0.1, "token_weight": torch.rand(N)}

    def values(hidden, head, bias):
        loss, stats = linear_cross_entropy(hidden, head, Y, linear_bias=bias, return_stats="tokens", **options)
        return loss + (stats.entropy * stats.lse + stats.logprob.square()).sum()

    for function, inputs in (
        (values, (hidden, head, bias)),
        (lambda head: linear_cross_entropy(head[:N].sin(), head, Y), (head,)),
        (lambda x: cross_entropy(x @ x.T, Y.clamp(max=N - 1), **options, reduction="none"), (hidden,)),
    ):
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
        value = function(*inputs).sum()
        with_a_graph = torch.autograd.grad(value, inputs, create_graph=True)
        torch.testing.assert_close(with_a_graph, torch.autograd.grad(value, inputs))


@pytest.mark.parametrize("capacity", [None, 8])
def test_kept_tokens(capacity):
    x, head, kept = torch.randn(N, D), torch.randn(V, D), KeptTokens.from_labels(Y, capacity=capacity)
    wanted = grad(lambda x: F.cross_entropy(x @ head.T, Y))(x)
    torch.testing.assert_close(grad(lambda x: linear_cross_entropy(x, head, kept=kept))(x), wanted)
    found = vmap(lambda x: linear_cross_entropy(x, head, kept=kept, reduction="none"))(x[None])[0]
    torch.testing.assert_close(found, F.cross_entropy(x @ head.T, Y, reduction="none"))
    torch.testing.assert_close(
        double_backward(lambda x, _: linear_cross_entropy(x, head, kept=kept), x, Y),
        double_backward(lambda x, _: F.cross_entropy(x @ head.T, Y), x, Y),
    )
    grad(lambda x: linear_cross_entropy(x, head, kept=KeptTokens.from_labels(Y)))(x)  # whose labels have values
    with pytest.raises(TypeError, match=r"labels: .*inside vmap.* target"):
        vmap(lambda y: KeptTokens.from_labels(y).targets)(Y[None])


@pytest.mark.parametrize("shift", [1, 2, 5])
def test_shifted_labels_and_their_weights(shift):
    x, head, y, weights = torch.randn(2, 3, D), torch.randn(V, D), Y.reshape(2, 3), torch.rand(2, 3)
    f = partial(linear_cross_entropy, target=y, shift=shift, token_weight=weights, reduction="none")
    torch.testing.assert_close(vmap(lambda x: f(x, head))(x[None])[0], f(x, head))
    value, tangent = torch.func.linearize(lambda x: f(x, head), x)
    torch.testing.assert_close((value, tangent(x.cos())), jvp(lambda x: f(x, head), (x,), (x.cos(),)))


def test_a_head_of_more_than_two_dimensions():
    x, head, y = torch.randn(N, D), torch.randn(V, 2, D), torch.stack([Y, Y.flip(0)], 1)
    f = partial(linear_cross_entropy, target=y)
    torch.testing.assert_close(vmap(lambda x: f(x, head))(x[None])[0], f(x, head))


@pytest.mark.parametrize("make", [over_logits, over_a_head])
def test_what_stands_at_masked_rows_enters_no_transform(make):
    x, f = make(cross_entropy)
    x[2] = float("nan")
    for case in ("grad", "hessian", "gradients of gradients", "vmap over inputs"):
        assert not CASES[case](f, x, Y).isnan().any()


@pytest.mark.parametrize("make", [over_logits, over_a_head])
def test_a_label_outside_the_vocabulary_is_refused(make):
    x, f = make(cross_entropy)
    wrong = Y.where(Y != 3, V)
    for call in (lambda: grad(f)(x, wrong), lambda: vmap(lambda y: f(x, y))(wrong[None])):
        with pytest.raises(IndexError, match=rf"target: label {V} of token 1 is outside"):
            call()


def test_modules_and_gradients_of_samples():
    x, loss = torch.randn(N, D), LinearCrossEntropyLoss(D, V, bias=True)
    parameters = {name: p.detach() for name, p in loss.named_parameters()}

    def of_sample(loss):
        def value(parameters, x, y):
            return functional_call(loss, parameters, (x[None], y[None]))

        return vmap(grad(value), (None, 0, 0))(parameters, x, Y)

    found = of_sample(loss)
    for i in range(N):
        loss.zero_grad()
        loss(x[i : i + 1], Y[i : i + 1]).backward()
        torch.testing.assert_close(found["linear.weight"][i], loss.linear.weight.grad)
        torch.testing.assert_close(found["linear.bias"][i], loss.linear.bias.grad)
    logits = torch.randn(N, V)
    torch.testing.assert_close(grad(CrossEntropyLoss())(logits, Y), grad(F.cross_entropy)(logits, Y))


def test_num_items_of_each_sample():
    x, counts = torch.randn(N, V), torch.tensor([3.0, 7.0])
    found = vmap(lambda n: cross_entropy(x, Y, num_items=n))(counts)
    torch.testing.assert_close(found, torch.stack([cross_entropy(x, Y, num_items=n) for n in counts]))
    with pytest.raises(ValueError, match=r"num_items: .* -7"):
        vmap(lambda n: cross_entropy(x, Y, num_items=n))(torch.tensor([3, -7]))


def test_a_named_implementation_says_that_it_has_no_transforms():
    with pytest.raises(Unavailable, match=r"impl='triton': torch.func.* use impl='torch'"):
        grad(lambda x: cross_entropy(x, Y, impl="triton"))(torch.randn(N, V))
    with pytest.raises(Unavailable, match=r"impl='flash' .*torch.func.* use impl='torch'"):
        grad(lambda q: packed_attention(q, q, q, CU, impl="flash").sum())(torch.randn(T, 2, 8))


@pytest.mark.parametrize("impl", ["triton", "flash"])
def test_an_implementation_that_the_environment_names_is_named_so(impl, monkeypatch):
    monkeypatch.setenv("SFT_KERNELS_IMPL", impl)
    with pytest.raises(Unavailable, match=rf"SFT_KERNELS_IMPL='{impl}'.*impl='torch', or unset SFT_KERNELS_IMPL"):
        grad(lambda q: packed_attention(q, q, q, CU).sum())(torch.randn(T, 2, 8))


# ---- attention

T = 9
CU, OTHER = torch.tensor([0, 3, 3, 7]), torch.tensor([0, 2, 5, 9])
ATTENTION = [{}, {"causal": False, "window_size": (1, 1)}, {"softcap": 3.0, "scale": 0.4}]


@pytest.fixture
def rows():
    return torch.randn(T, 4, 8), torch.randn(T, 2, 8), torch.randn(T, 2, 8)


@pytest.mark.parametrize("options", ATTENTION, ids=str)
def test_attention(rows, options):
    def loss(q, k, v):
        return packed_attention(q, k, v, CU, **options).square().sum()

    leaves = [t.clone().requires_grad_() for t in rows]
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(grad(loss, argnums=(0, 1, 2))(*rows), wanted)
    tangent = sum((g * t).sum() for g, t in zip(wanted, rows, strict=True))
    torch.testing.assert_close(jvp(loss, rows, rows)[1], tangent, rtol=1e-5, atol=1e-5)
    batch = vmap(lambda q: packed_attention(q, *rows[1:], CU, **options), in_dims=1)(torch.stack([rows[0]] * 2, 1))
    torch.testing.assert_close(batch[1], packed_attention(*rows, CU, **options))
    curvature = torch.func.hessian(loss)(*rows)
    torch.testing.assert_close(curvature, hessian(lambda q: loss(q, *rows[1:]), rows[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", ATTENTION, ids=str)
def test_attention_over_boundaries_that_nothing_may_read(rows, options):
    def attend(q, k, v, cu_seqlens):
        return packed_attention(q, k, v, cu_seqlens, return_lse=True, **options)

    wanted = [attend(*rows, cu_seqlens) for cu_seqlens in (CU, OTHER)]
    batch = vmap(lambda cu_seqlens: attend(*rows, cu_seqlens))(torch.stack([CU, OTHER]))
    for i in range(2):
        torch.testing.assert_close(tuple(t[i] for t in batch), wanted[i], rtol=1e-5, atol=1e-5)
    exported = torch.export.export(CalledWithAll(attend), (*rows, CU), strict=False).module()
    torch.testing.assert_close(exported(*rows, OTHER), wanted[1], rtol=1e-5, atol=1e-5)
    tail = [t.index_fill(0, torch.tensor([7, 8]), float("nan")) for t in rows]  # rows that no segment has
    assert not vmap(lambda cu_seqlens: attend(*tail, cu_seqlens))(CU[None])[0].isnan().any()


class CalledWithAll(Called):
    def forward(self, *args):
        return self.f(*args)


def test_boundaries_are_checked_inside_a_transform(rows):
    with pytest.raises(ValueError, match="cu_seqlens: expected never to decrease"):
        grad(lambda q: packed_attention(q, *rows[1:], torch.tensor([0, 5, 3])).sum())(rows[0])


# ---- tensors without values


def meta(tensor):
    return tensor.to("meta")


def without_values(kind):
    """``(context, a function that takes a tensor's values away)``."""
    mode = FakeTensorMode()
    return (nullcontext(), meta) if kind == "meta" else (mode, mode.from_tensor)


KINDS = pytest.mark.parametrize("kind", ["meta", "fake"])
LOSS_OPTIONS = [
    {},
    {"reduction": "none"},
    {"return_stats": True},
    {"return_stats": "tokens"},
    {"weight": torch.rand(V), "label_smoothing": 0.1},
    {"token_weight": torch.rand(N), "num_items": torch.tensor(3)},
]


@KINDS
@pytest.mark.parametrize("options", LOSS_OPTIONS, ids="-".join)
def test_losses_without_values(kind, options):
    head = torch.randn(V, D)
    for function, inputs in ((cross_entropy, (torch.randn(N, V),)), (linear_cross_entropy, (torch.randn(N, D), head))):
        for target in (Y, torch.rand(N, V)):
            context, emptied = without_values(kind)
            wanted = function(*inputs, target, **options)
            leaves = [emptied(t).requires_grad_() for t in inputs]
            with context:
                given = {name: emptied(v) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
                found = function(*leaves, emptied(target), **given)
                (found[0] if isinstance(found, tuple) else found).sum().backward()
            assert _shapes(found) == _shapes(wanted)
            assert [t.grad.shape for t in leaves] == [t.shape for t in inputs]


def _shapes(tree):
    return [(t.shape, t.dtype) for t in torch.utils._pytree.tree_leaves(tree)]


@KINDS
def test_modules_kept_tokens_and_attention_without_values(kind, rows):
    context, emptied = without_values(kind)
    kept = KeptTokens.from_labels(Y)
    hidden, labels, bounds = emptied(torch.randn(N, D)), emptied(Y), emptied(CU)
    packed = [emptied(t) for t in rows]
    moved = kept._replace(rows=emptied(kept.rows), targets=emptied(kept.targets))
    with context:
        loss = LinearCrossEntropyLoss(D, V, device="meta" if kind == "meta" else None)
        loss(hidden, labels).backward()
        assert loss.linear.weight.grad.shape == (V, D)
        assert loss(hidden, kept=moved).shape == ()
        with pytest.raises(TypeError, match=r"labels: .*meta, fake"):
            KeptTokens.from_labels(labels)
        out, lse = packed_attention(*packed, bounds, return_lse=True)
        assert (out.shape, lse.shape) == (rows[0].shape, (4, T))
        assert AttentionTiles.from_cu_seqlens(bounds, T).lists.shape == (2, 4, 3)
        assert packed_attention(*packed, CU).shape == rows[0].shape  # boundaries on the host


def test_flops_are_counted():
    kept = Y != -100
    for x, y, rows in ((torch.randn(N, D), Y, int(kept.sum())), (torch.empty(N, D, device="meta"), meta(Y), N)):
        leaves = [x.requires_grad_(), torch.empty(V, D, device=x.device).normal_().requires_grad_()]
        with FlopCounterMode(display=False) as counted:
            linear_cross_entropy(*leaves, y).backward()
        assert counted.get_total_flops() == 3 * 2 * rows * D * V
