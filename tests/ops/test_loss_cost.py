"""What the fused losses cost on Triton's core: FLOPs and bytes by the written model, no host sync, one product to
evaluate."""

from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sft_kernels import KeptTokens, cross_entropy, linear_cross_entropy
from sft_kernels.ops.linear_cross_entropy.plan import Plan, cost
from sft_kernels.ops.softmax_grad import reduction

from .helpers import D, N, Watch, labels

V = 96  # rows of logits need no padding


@pytest.fixture(autouse=True)
def _poison_unwritten_memory():
    """Off: it writes."""


class Traffic(Watch):
    """Counts also the bytes of matrices that are read and written; an operation it does not know is an error."""

    # What an operation does to its arguments and its result, both by number of passes over them.
    _PASSES: ClassVar = {
        "mm": ((1, 1), 1),
        "index": ((), 2),  # the rows that are gathered
        "new_zeros": ((), 1),
        "zeros": ((), 1),
        "zeros_like": ((), 1),
        "index_copy_": ((0, 0, 0, 2), 0),
        "softmax_stats": ((1,), 0),
        "scale_": ((0, 0), 0),  # by one: nothing is read
        "copy_": ((1, 1), 0),
    }

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = super().__torch_dispatch__(function, types, args, kwargs)
        name = function.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor) and t.dim() == 2]
        if function.is_view or name in ("new_empty", "empty", "empty_like", "detach") or not tensors:
            return out
        if name in ("addmm", "addmm_"):
            passes, written = ((1 if kwargs.get("beta", 1) == 0 else 2), 1, 1), 0
        elif name == "softmax_grad_":
            passes, written = (3 if kwargs.get("lse", args[3]) is None else 2,), 0
        else:
            passes, written = self._PASSES[name]
        for t, n in [*zip(args, passes, strict=False), (kwargs.get("out", out), written)]:
            if n and t.dim() == 2:
                self.bytes += n * t.numel() * t.element_size()
        return out


class NoSync(TorchDispatchMode):
    """Raises where the host would wait for a value on the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        boolean = name in ("index", "index_put_") and any(
            isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in args[1]
        )
        assert not boolean, f"{name} by a mask"
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero"), name
        return function(*args, **(kwargs or {}))


def leaves(needs=(True, True)):
    pair = torch.randn(N, D), torch.randn(V, D) * 2 / D**0.5
    return [t.requires_grad_(need) for t, need in zip(pair, needs, strict=True)]


@pytest.mark.parametrize("loop", ["tokens", "vocab"])
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_flops_and_bytes_are_those_of_the_cost_model(loop, chunks, needs):
    y, pair = labels(v=V), leaves(needs)
    kept = KeptTokens.from_labels(y)
    K = kept.count
    length = -(-K // chunks) if loop == "tokens" else V // chunks
    bound = 4 * length * (V if loop == "tokens" else K)
    with Traffic() as found:
        loss = linear_cross_entropy(*pair, kept=kept, chunking=loop, max_logits_bytes=bound, impl="triton")
        if any(needs):
            loss.backward()
    flops, moved = cost(Plan(loop, length), K, D, V, 4, dx=needs[0], dw=needs[1])
    gather = 4 * 2 * K * D * (2 if loop == "vocab" and any(needs) else 1)
    scatter = 4 * (N * D + 2 * K * D) if needs[0] else 0
    assert (found.flops, found.bytes) == (flops, moved + gather + scatter)


@pytest.mark.parametrize("loop", ["tokens", "vocab"])
@pytest.mark.parametrize("reduction_", ["mean", "none"])
@pytest.mark.parametrize("capacity", [None, N])
def test_with_kept_tokens_nothing_waits_for_the_device(monkeypatch, loop, reduction_, capacity):
    monkeypatch.setattr(reduction, "checks_enabled", lambda device: False)  # as on a GPU
    kept, pair = KeptTokens.from_labels(labels(v=V), capacity=capacity), leaves()
    with NoSync():
        loss, _ = linear_cross_entropy(
            *pair,
            kept=kept,
            chunking=loop,
            max_logits_bytes=4 * 48 * N,
            reduction=reduction_,
            token_weight=torch.rand(N),
            num_items=None if reduction_ == "none" else torch.tensor(7),
            return_stats=True,
            impl="triton",
        )
        torch.autograd.grad(loss.sum() * 3, pair)


def test_over_given_logits_nothing_waits_for_the_device(monkeypatch):
    monkeypatch.setattr(reduction, "checks_enabled", lambda device: False)
    logits, y = torch.randn(N, V, requires_grad=True), labels(v=V)
    with NoSync():
        loss, _ = cross_entropy(logits, y, return_stats=True, impl="triton")
        torch.autograd.grad(loss * 3, logits)


def test_counting_the_kept_tokens_is_what_waits():
    y, pair = labels(v=V), leaves()
    with pytest.raises(AssertionError, match="nonzero"), NoSync():
        linear_cross_entropy(*pair, y, impl="triton")


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_evaluation_takes_one_product_and_a_chunk_of_logits(impl):
    """Per-token log-probabilities, loss, accuracy and entropy at once."""
    n, d, v = 400, 16, 512
    hidden, weight, y = torch.randn(n, d), torch.randn(v, d), labels(n, v)
    bound = 4 * v * 50
    with Watch() as watch, torch.no_grad():
        losses, stats = linear_cross_entropy(
            hidden, weight, y, reduction="none", return_stats=True, max_logits_bytes=bound, impl=impl
        )
    kept = y != -100
    assert watch.flops == 2 * int(kept.sum()) * d * v
    assert watch.largest <= bound
    log_p = (hidden @ weight.T).log_softmax(1)
    torch.testing.assert_close(-losses[kept], log_p[kept].gather(1, y[kept, None])[:, 0])
    assert stats.kept == kept.sum()
    assert stats.correct == (log_p.argmax(1) == y)[kept].sum()
    torch.testing.assert_close(stats.nll_sum, losses.sum())
    torch.testing.assert_close(stats.entropy_sum, -(log_p.exp() * log_p).sum(1)[kept].sum())
