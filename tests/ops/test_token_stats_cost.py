"""The cost of values of each token: products, memory, launches and waits, by loop and by what has a gradient."""

import pytest
import torch

from sft_kernels import KeptTokens, cross_entropy, linear_cross_entropy
from sft_kernels.ops.softmax_grad import reduction, torch_impl

from .helpers import D, N, Watch, labels
from .watches import Held, Launches, NoSync

V = 96  # rows of logits need no padding
IMPLS = pytest.mark.parametrize("impl", ["torch", "triton"])
LOOPS = {
    "one chunk": {"chunking": "tokens"},
    "chunks": {"chunking": "tokens", "max_logits_bytes": 4 * V * 9},
    "vocab": {"chunking": "vocab", "max_logits_bytes": 4 * N * 32},
}
ASKED = {"loss": [0], "a statistic": [1], "two": [2, 3], "all": [0, 1, 2, 3]}


@pytest.fixture(autouse=True)
def _poison_unwritten_memory(monkeypatch):
    """Off: it writes. The plain core works in small blocks, so that what it takes for one is not seen."""
    monkeypatch.setitem(torch_impl._BLOCK_BYTES, "cpu", 1 << 11)


def leaves(n=N, v=V, d=D, needs=(True, True)):
    pair = torch.randn(n, d), torch.randn(v, d) * 2 / d**0.5
    return [t.requires_grad_(need) for t, need in zip(pair, needs, strict=True)]


def backward(outputs, asked, inputs, **options):
    """The gradients through those of loss, log-probability, logsumexp and entropy that are asked for."""
    outputs = [outputs[i] for i in asked]
    return torch.autograd.grad(outputs, inputs, [torch.rand_like(t) for t in outputs], **options)


@pytest.mark.parametrize("asked", [*ASKED])
@pytest.mark.parametrize("reduction_", ["mean", "none"])
@pytest.mark.parametrize("loop", [*LOOPS])
def test_products(loop, reduction_, asked):
    """The logits of a single chunk are kept, so that three products are all, whatever has a gradient."""
    y, pair = labels(v=V), leaves()
    product = 2 * int((y != -100).sum()) * D * V
    with Watch() as forward:
        value, found = linear_cross_entropy(*pair, y, reduction=reduction_, return_stats="tokens", **LOOPS[loop])
    with Watch() as first:
        backward((value, *found), ASKED[asked], pair, retain_graph=True)
    with Watch() as second:
        backward((value, *found), ASKED[asked], pair)
    ready = loop == "chunks" and reduction_ == "mean"  # gradients of the loss, made in the forward
    assert forward.flops == product * (3 if ready else 1)
    if ready and asked == "loss":
        assert first.flops == 0
    else:
        assert first.flops == product * (2 if loop == "one chunk" else 3)
    assert second.flops == product * 3


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=str)
@pytest.mark.parametrize("loop", [*LOOPS])
def test_a_gradient_that_nobody_asked_for_costs_no_product(loop, needs):
    y, pair = labels(v=V), leaves(needs=needs)
    with Watch() as watch:
        value, found = linear_cross_entropy(*pair, y, reduction="none", return_stats="tokens", **LOOPS[loop])
        backward((value, *found), [0, 1, 2, 3], [t for t in pair if t.requires_grad])
    assert watch.flops == 2 * int((y != -100).sum()) * D * V * (2 + (loop != "one chunk"))


@IMPLS
@pytest.mark.parametrize("loop", [*LOOPS])
def test_without_gradients_there_is_one_product_and_nothing_is_kept(impl, loop):
    y, pair = labels(v=V), leaves()
    kept = KeptTokens.from_labels(y)
    with Watch() as watch, Held([*pair, y, *kept[:2]]) as held, torch.no_grad():
        out = linear_cross_entropy(*pair, kept=kept, return_stats="tokens", impl=impl, **LOOPS[loop])
    assert watch.flops == 2 * kept.count * D * V
    assert held.left() <= sum(t.untyped_storage().nbytes() for t in (out[0], *out[1])) + 8 * N


@IMPLS
def test_gradients_are_made_in_the_place_of_the_kept_logits(impl):
    n, d, v = 64, 8, 512
    y, pair = labels(n, v, masked=0.5), leaves(n, v, d)
    kept = KeptTokens.from_labels(y)
    logits, rest = 4 * kept.count * v, 4 * d * (3 * n + v) + 8 * n * 40
    with Held([*pair, *kept[:2]]) as held:
        value, found = linear_cross_entropy(*pair, kept=kept, chunking="tokens", return_stats="tokens", impl=impl)
        between = held.left()
        backward((value, *found), [0, 1, 2, 3], pair)
    assert logits <= between <= logits + rest
    assert held.peak <= logits + rest
    del value, found
    assert held.left() <= rest  # the logits are gone with the graph


@pytest.mark.parametrize("loop", ["chunks", "vocab"])
@pytest.mark.parametrize("reduction_", ["mean", "none"])
def test_no_storage_exceeds_the_bound_on_logits(loop, reduction_):
    n, d, v, bound = 211, 8, 504, 40_000
    y, pair = labels(n, v, masked=0.1), leaves(n, v, d)
    options = {**LOOPS[loop], "max_logits_bytes": bound, "reduction": reduction_}
    with Watch() as watch:
        value, found = linear_cross_entropy(*pair, y, return_stats="tokens", **options)
        backward((value, *found), [0, 1, 2, 3], pair)
    assert bound / 2 < watch.largest <= bound


@IMPLS
@pytest.mark.parametrize("reduction_", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_over_given_logits_one_gradient_is_all_the_memory(impl, dtype, reduction_):
    n, v = 32, 512
    logits, y = torch.randn(n, v).to(dtype).requires_grad_(), labels(n, v)
    with Held([logits, y]) as held:
        value, found = cross_entropy(logits, y, reduction=reduction_, return_stats="tokens", impl=impl)
        backward((value, *found), [0, 1, 2, 3], [logits])
    assert held.peak < 1.6 * logits.numel() * logits.element_size()


# ---- launches and waits


def launches(loss, asked, inputs):
    """The launches of forward and backward."""
    with Launches() as log:
        value, found = loss()
        forward, log.names = log.names, []
        outputs = [(value, *found)[i] for i in asked]
        torch.autograd.grad(outputs, inputs, [torch.ones((), dtype=t.dtype).expand(t.shape) for t in outputs])
    for _ in asked:
        log.names.remove("ones")
    return forward, log.names


@pytest.mark.parametrize(("loop", "expected"), [("one chunk", 7), ("chunks", 4)])
def test_statistics_without_a_gradient_launch_nothing_in_the_backward(monkeypatch, loop, expected):
    monkeypatch.setattr(reduction, "checks_enabled", lambda device: False)
    kept, pair = KeptTokens.from_labels(labels(v=V)), leaves()
    _, found = launches(
        lambda: linear_cross_entropy(*pair, kept=kept, return_stats="tokens", impl="triton", **LOOPS[loop]), [0], pair
    )
    # scale · grad, gather, core, dx, dW, zeros, scatter; with chunks two scales, zeros, scatter
    assert len(found) == expected, found


def test_over_given_logits_statistics_without_a_gradient_launch_nothing_in_the_backward(monkeypatch):
    monkeypatch.setattr(reduction, "checks_enabled", lambda device: False)
    logits, y = torch.randn(N, V, requires_grad=True), labels(v=V)
    _, found = launches(lambda: cross_entropy(logits, y, return_stats="tokens", impl="triton"), [0], [logits])
    assert len(found) == 1, found


@pytest.mark.parametrize("loop", [*LOOPS])
@pytest.mark.parametrize("capacity", [None, N])
def test_with_kept_tokens_nothing_waits_for_the_device(monkeypatch, loop, capacity):
    monkeypatch.setattr(reduction, "checks_enabled", lambda device: False)  # as on a GPU
    kept, pair = KeptTokens.from_labels(labels(v=V), capacity=capacity), leaves()
    with NoSync():
        value, found = linear_cross_entropy(*pair, kept=kept, return_stats="tokens", impl="triton", **LOOPS[loop])
        backward((value, *found), [0, 1, 2, 3], pair)


def test_over_given_logits_nothing_waits_for_the_device(monkeypatch):
    monkeypatch.setattr(reduction, "checks_enabled", lambda device: False)
    with NoSync():
        logits, y = torch.randn(N, V, requires_grad=True), torch.zeros(N, dtype=torch.int64)
        value, found = cross_entropy(logits, y, return_stats="tokens", impl="triton")
        backward((value, *found), [0, 1, 2, 3], [logits])
