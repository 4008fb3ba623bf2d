"""The cost of the fused losses on Triton's core: FLOPs and bytes by the written model, launches, memory, no host sync,
and one product to evaluate."""

from typing import ClassVar

import pytest
import torch
from torch.utils._pytree import tree_leaves

from sft_kernels import KeptTokens, cross_entropy, linear_cross_entropy
from sft_kernels.ops.linear_cross_entropy import matmul, plan
from sft_kernels.ops.linear_cross_entropy.plan import Plan, cost
from sft_kernels.ops.softmax_grad import reduction

from .helpers import D, N, Watch, labels
from .watches import Held, Launches, NoSync

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


# ---- launches


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Labels are not checked, and products are in bf16."""
    monkeypatch.setattr(reduction, "checks_enabled", lambda device: False)
    monkeypatch.setattr(matmul, "compute_dtype", lambda x: torch.bfloat16)


def launches(loss, inputs):
    """The launches of forward and backward, in two lists."""
    with Launches() as log:
        out = loss()
        out = out[0] if isinstance(out, tuple) else out
        forward, log.names = log.names, []
        torch.autograd.grad(out, inputs, torch.ones((), dtype=out.dtype).expand(out.shape))
    backward = log.names
    backward.remove("ones")
    assert "scalar_tensor" not in forward + backward, "a fill for the scalar of a where"
    return forward, backward


def masked_labels():
    """24 of 64 labels are kept, neither the first nor the last."""
    y = torch.full((64,), -100)
    y[20:44] = torch.randint(0, V, (24,))
    return y


CHUNKS = {"chunking": "tokens", "max_logits_bytes": 2 * V * 8}
SLICES = {"chunking": "vocab", "max_logits_bytes": 2 * 24 * 32}


@pytest.mark.parametrize(
    ("options", "forward", "backward"),
    [
        # outside: clamp, ne; scale: full, fill; gather; logits, core, dx in fp32, dx, dW; loss: sub, mul, sum
        ({}, 13, 4),  # backward: two scales, zeros, scatter
        ({"linear_bias": True}, 15, 5),
        (CHUNKS, 13 + 2 * 5 + 4, 4),  # a chunk: logits, core, dx in fp32, dx, dW; three fields together, dW
        (SLICES, 10 + 2 * 6, 10 + 2 * 6),
        ({"capacity": 64}, 20, 4),
        ({"return_stats": True}, 23, 4),
        ({"capacity": 64, "return_stats": True}, 37, 4),
        ({"reduction": "none"}, 11, 11),
        ({"capacity": 64, "reduction": "none"}, 16, 12),
        ({"num_items": torch.tensor(7)}, 17, 4),
        ({"token_weight": torch.ones(64)}, 14, 4),
        ({"kept": None}, 16, 4),  # ne, nonzero, labels
    ],
    ids=str,
)
def test_launches_of_the_fused_loss(as_on_a_gpu, options, forward, backward):
    y, pair = masked_labels(), [torch.randn(n, D).bfloat16().requires_grad_() for n in (64, V)]
    options = {"kept": KeptTokens.from_labels(y, capacity=options.get("capacity")), "target": y, **options}
    options.pop("capacity", None)
    inputs = list(pair)
    if "linear_bias" in options:
        options["linear_bias"] = torch.randn(V).bfloat16().requires_grad_()
        inputs.append(options["linear_bias"])
    found = launches(lambda: linear_cross_entropy(*pair, impl="triton", **options), inputs)
    assert tuple(map(len, found)) == (forward, backward), found


def test_with_every_token_kept_nothing_is_gathered_scattered_or_copied(as_on_a_gpu):
    pair = [torch.randn(n, D).bfloat16().requires_grad_() for n in (64, V)]
    kept = KeptTokens.from_labels(torch.randint(0, V, (64,)))
    for weights in (None, torch.ones(64)):
        found = launches(lambda: linear_cross_entropy(*pair, kept=kept, token_weight=weights, impl="triton"), pair)  # noqa: B023
        assert tuple(map(len, found)) == (12, 2), found


@pytest.mark.parametrize(
    ("dtype", "options", "forward", "backward"),
    [
        # keep, labels; outside 2; scale: cast, sum, clamp, div, fill; core; loss: sub, mul, sum
        (torch.float32, {}, 13, 1),
        (torch.bfloat16, {}, 14, 3),  # a cast of the loss; backward: its cast, scale, core
        (torch.bfloat16, {"reduction": "none"}, 11, 3),
        (torch.bfloat16, {"return_stats": True}, 33, 3),
    ],
    ids=str,
)
def test_launches_over_given_logits(as_on_a_gpu, dtype, options, forward, backward):
    logits, y = torch.randn(64, V).to(dtype).requires_grad_(), masked_labels()
    found = launches(lambda: cross_entropy(logits, y, impl="triton", **options), (logits,))
    assert tuple(map(len, found)) == (forward, backward), found


# ---- a head in fp32 under autocast


def autocast_loss(pair, kept, **options):
    with torch.autocast("cpu", torch.bfloat16):
        return linear_cross_entropy(*pair, kept=kept, impl="triton", **options)


ROW, COPY = 2 * V, 2 * V * D  # bytes in bf16: a row of logits, the head
ENOUGH = 8  # rows of logits beside which a copy of the head is made


@pytest.fixture
def under_autocast(as_on_a_gpu, monkeypatch):
    """Leaves, kept tokens, and the loss in the token loop within a bound; heads are cast in eight slices."""
    monkeypatch.setattr(matmul, "_SLICE", V // 8)
    monkeypatch.setattr(plan, "_ROWS", {"cpu": ENOUGH})
    pair, kept = [torch.randn(n, D, requires_grad=True) for n in (64, V)], KeptTokens.from_labels(masked_labels())

    def loss(bound, chunking="tokens"):
        with torch.autocast("cpu", torch.bfloat16):
            return linear_cross_entropy(*pair, kept=kept, chunking=chunking, max_logits_bytes=bound, impl="triton")

    return pair, kept, loss


@pytest.mark.parametrize(("bound", "chunks"), [(None, 3), (COPY + 24 * ROW, 1), (COPY + ENOUGH * ROW, 3)])
def test_an_fp32_head_is_cast_once_whatever_the_number_of_chunks(under_autocast, bound, chunks):
    pair, _, loss = under_autocast
    found = launches(lambda: loss(bound), pair)
    # outside and scale 4, gather and cast, the copy; logits, core, dx, dW, none of them rounded or cast; three fields
    assert tuple(map(len, found)) == (4 + 2 + 1 + 4 * chunks + 3 * (chunks > 1) + 3, 4), found


def test_without_room_for_the_copy_each_product_casts_slice_by_slice(under_autocast):
    pair, _, loss = under_autocast
    found = launches(lambda: loss(COPY + ENOUGH * ROW - 1), pair)
    assert tuple(map(len, found)) == (4 + 2 + 2 * 8 + 1 + 2 * 8 + 1 + 3, 4), found


def test_the_vocabulary_loop_casts_each_chunk_once_a_pass(under_autocast):
    pair, _, loss = under_autocast
    forward, backward = launches(lambda: loss(32 * 2 * (24 + D), "vocab"), pair)
    assert (forward.count("_to_copy"), backward.count("_to_copy")) == (1 + 3, 1 + 3)


@pytest.mark.parametrize("chunking", ["tokens", "vocab"])
@pytest.mark.parametrize("bound", [COPY + 24 * ROW, COPY + ENOUGH * ROW, COPY + ENOUGH * ROW - 1, COPY, 12 * ROW])
def test_the_copy_of_a_head_counts_against_the_bound(under_autocast, chunking, bound):
    """Beside the bound: rows, gathered in fp32 and cast, gradients, sums of rows in fp32; with slices, one of them."""
    pair, kept, loss = under_autocast
    with Held([*pair, *kept[:2]]) as held:
        torch.autograd.grad(loss(bound, chunking), pair)
    rows, vectors = 24 * D * (4 + 2 + 4), 24 * 8 * 10
    gradients = 4 * (64 + V) * D + (4 * V * D if chunking == "vocab" else 0)  # a chunk's dW, before it is in its place
    assert held.peak <= bound + rows + vectors + gradients + COPY // 8


def test_gradients_under_autocast_are_not_rounded_to_half_precision(under_autocast):
    pair, _, loss = under_autocast
    for bound in (None, COPY + ENOUGH * ROW, COPY):
        for gradient in torch.autograd.grad(loss(bound), pair):
            assert gradient.dtype == torch.float32
            assert not torch.equal(gradient, gradient.bfloat16().float())
