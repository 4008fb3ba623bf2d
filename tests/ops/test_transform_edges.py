"""The losses and attention at the edges of torch's transforms: checkpoints, autocast, bad input, fake tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize, grad, jacfwd, jvp, vmap
from torch.utils.checkpoint import checkpoint

from sft_kernels import AttentionTiles, KeptTokens, cross_entropy, linear_cross_entropy, packed_attention

N, V, D = 6, 9, 4
Y = torch.tensor([0, 3, -100, 8, 2, 1])


@pytest.fixture(autouse=True)
def _poison_unwritten_memory():
    """Off: what it wraps cannot be traced."""


def of_logits(hidden, head):
    return cross_entropy(hidden @ head.T, Y)


def of_a_head(hidden, head):
    return linear_cross_entropy(hidden, head, Y)


LOSSES = pytest.mark.parametrize("loss", [of_logits, of_a_head])


def leaves():
    return [torch.randn(n, D, requires_grad=True) for n in (N, V)]


@LOSSES
def test_a_checkpointed_loss_has_second_derivatives_and_batches_of_gradients(loss):
    inputs = leaves()
    found, wanted = (checkpoint(f, *inputs, use_reentrant=False) for f in (loss, _torchs))
    first = [torch.autograd.grad(value, inputs, create_graph=True) for value in (found, wanted)]
    second = [torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs) for gradients in first]
    torch.testing.assert_close(*first)
    torch.testing.assert_close(*second)
    batches = [
        torch.autograd.grad(checkpoint(f, *inputs, use_reentrant=False), inputs, torch.ones(2), is_grads_batched=True)
        for f in (loss, _torchs)
    ]
    torch.testing.assert_close(*batches)


def _torchs(hidden, head):
    return F.cross_entropy(hidden @ head.T, Y)


def test_autocast_around_the_backward_rounds_no_gradient_that_has_a_graph():
    inputs = leaves()
    value = of_a_head(*inputs)
    wanted = torch.autograd.grad(value, inputs, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(value, inputs, create_graph=True)
    torch.testing.assert_close(found, wanted)


# ---- bad input inside a transform

T = 9
CU, OTHER = torch.tensor([0, 3, 3, 7]), torch.tensor([0, 2, 5, 9])
WRONG = {"start at 0": [2, 3, 3, 8], "never to decrease": [0, 9, 4, 8], "past the 9 tokens": [0, 3, 5, 80]}


@pytest.fixture
def rows():
    return torch.randn(T, 4, 8), torch.randn(T, 2, 8), torch.randn(T, 2, 8)


@pytest.mark.parametrize("match", WRONG)
def test_each_of_a_batch_of_boundaries_is_checked(match, rows):
    both = torch.stack([CU, torch.tensor(WRONG[match])])
    calls = [
        lambda: vmap(lambda cu_seqlens: packed_attention(*rows, cu_seqlens))(both),
        lambda: vmap(lambda cu_seqlens: packed_attention(*rows, cu_seqlens), in_dims=1)(both.T),
        lambda: vmap(vmap(lambda cu_seqlens: packed_attention(*rows, cu_seqlens), 1), 1)(both.T[:, None]),
        lambda: vmap(lambda q: vmap(lambda c: packed_attention(q, *rows[1:], c))(both))(rows[0][None]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"cu_seqlens: .*{match}"):
            call()
    with pytest.raises(ValueError, match=r"max_seqlen: 2 is less than the longest segment, 4"):
        vmap(lambda cu_seqlens: packed_attention(*rows, cu_seqlens, 2))(torch.stack([CU, OTHER]))


def test_tiles_of_other_boundaries_are_refused_inside_a_transform(rows):
    q, *pair = rows
    tiles = AttentionTiles.from_cu_seqlens(CU, T)
    both = torch.stack([CU, OTHER])
    lists = torch.stack([AttentionTiles.from_cu_seqlens(each, T).lists for each in both])

    def attend(cu_seqlens, lists):
        return packed_attention(*rows, cu_seqlens, tiles=AttentionTiles(lists, T))

    wanted = grad(lambda q: packed_attention(q, *pair, CU).sum())(q)
    torch.testing.assert_close(grad(lambda q: packed_attention(q, *pair, CU, tiles=tiles).sum())(q), wanted)
    torch.testing.assert_close(vmap(attend)(both, lists), vmap(lambda c: packed_attention(*rows, c))(both))
    for call in (
        lambda: grad(lambda q: packed_attention(q, *pair, OTHER, tiles=tiles).sum())(q),
        lambda: vmap(attend, (0, None))(both, tiles.lists),
        lambda: vmap(attend)(both, lists.flip(0)),
    ):
        with pytest.raises(ValueError, match="tiles: expected those of cu_seqlens"):
            call()


@pytest.mark.parametrize("name", ["num_items", "weight", "token_weight"])
@LOSSES
def test_no_derivative_is_taken_by_a_constant_of_the_loss(name, loss):
    constant = {"num_items": torch.tensor(3.0), "weight": torch.rand(V), "token_weight": torch.rand(N)}[name]
    hidden, head = (t.detach() for t in leaves())

    def of(constant, hidden=hidden):
        if loss is of_a_head:
            return linear_cross_entropy(hidden, head, Y, **{name: constant})
        return cross_entropy(hidden @ head.T, Y, **{name: constant})

    def tangent(f):
        return jvp(f, (constant,), (constant,))

    for call in (
        lambda: grad(of)(constant),
        lambda: tangent(of),
        lambda: jacfwd(of)(constant),
        lambda: tangent(lambda c: grad(lambda h: of(c, h))(hidden)),
        lambda: tangent(lambda c: vmap(lambda h: of(c, h))(hidden[None])),
        lambda: vmap(lambda c: jvp(of, (c,), (c,)))(constant[None]),
    ):
        with pytest.raises(ValueError, match=f"{name} is a constant of the loss: detach it"):
            call()
    assert jvp(lambda h: of(constant, h), (hidden,), (hidden,))[1].isfinite()


# ---- fake tensors outside their mode, and functionalize


OPTIONS = [
    {},
    {"reduction": "none"},
    {"return_stats": True},
    {"return_stats": "tokens"},
    {"weight": torch.linspace(0.1, 2, V), "label_smoothing": 0.1},
    {"token_weight": torch.linspace(0.1, 2, N), "num_items": torch.tensor(3)},
]
ATTENTION = [{}, {"window_size": (2, 0)}, {"causal": False, "window_size": (1, 1)}, {"softcap": 3.0, "scale": -1.0}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " and ".join(options) or "none")
def test_a_loss_of_fake_tensors_needs_no_mode_around_it(options):
    fake = FakeTensorMode().from_tensor
    given = {name: fake(value) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    kept = KeptTokens.from_labels(Y, capacity=N + 1)
    kept = kept._replace(rows=fake(kept.rows), targets=fake(kept.targets))
    if "token_weight" not in options:
        assert _backward(linear_cross_entropy, [fake(t) for t in leaves()], kept=kept, **given).device.type == "cpu"
    for target in (Y, torch.rand(N, V)):
        logits, inputs, target = fake(torch.randn(N, V, requires_grad=True)), [fake(t) for t in leaves()], fake(target)
        for function, args in ((cross_entropy, [logits]), (linear_cross_entropy, inputs)):
            loss = _backward(function, args, target, **given)
            assert loss.shape == ((N,) if options.get("reduction") == "none" else ())
    assert torch.func.grad(lambda x: cross_entropy(x, fake(Y)))(logits.detach()).shape == (N, V)


def _backward(function, inputs, *rest, **options):
    result = function(*inputs, *rest, **options)
    loss = result[0] if isinstance(result, tuple) else result
    loss.sum().backward()
    assert [t.grad.shape for t in inputs] == [t.shape for t in inputs]
    return loss


@pytest.mark.parametrize("options", ATTENTION, ids=str)
def test_attention_over_fake_tensors_needs_no_mode_around_it(options, rows):
    fake = FakeTensorMode().from_tensor
    rows = [fake(t.requires_grad_()) for t in rows]
    for bounds in (CU, fake(CU)):
        out, lse = packed_attention(*rows, bounds, return_lse=True, **options)
        assert (out.shape, lse.shape) == ((T, 4, 8), (4, T))
    out.sum().backward()
    assert [t.grad.shape for t in rows] == [t.shape for t in rows]


@pytest.mark.parametrize("options", ATTENTION, ids=str)
def test_functionalized_attention(options, rows):
    q, *pair = rows

    def attend(q):
        return packed_attention(q, *pair, CU, **options)

    torch.testing.assert_close(functionalize(attend)(q), attend(q), rtol=1e-5, atol=1e-6)


@LOSSES
def test_functionalized_loss(loss):
    inputs = [t.detach() for t in leaves()]
    torch.testing.assert_close(functionalize(loss)(*inputs), loss(*inputs))
