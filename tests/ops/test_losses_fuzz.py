"""Both losses over random shapes, masks, layouts and options, against the oracle."""

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sft_kernels import KeptTokens, linear_cross_entropy
from sft_kernels._budget import check
from sft_kernels.verify import loss_oracle

from .helpers import CROSS_ENTROPY, LINEAR, LOSSES, labels, run, same_bits

MAYBE = st.booleans()
SHAPES = st.tuples(st.integers(0, 40), st.integers(8, 300))
DTYPE = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


def optional(strategy):
    return st.none() | strategy


@st.composite
def options(draw):
    """Options that any loss and loop takes; tensors are made by the test, which knows the shapes."""
    chosen = {
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 0.5])),
        "softcap": draw(optional(st.sampled_from([0.5, 3.0, 30.0]))),
        "logit_scale": draw(optional(st.sampled_from([0.1, 1.0, 4.0]))),
        "z_loss": draw(st.sampled_from([0.0, 0.0, 1e-4, 0.3])),
    }
    if chosen["reduction"] == "mean":
        chosen["num_items"] = draw(optional(st.sampled_from([1, 7, 0.5])))
    return chosen


def tensors_of(loss, dtype, n, v, layout):
    """The loss's tensors, contiguous, with gaps between rows or columns, or transposed in memory."""
    made = loss.tensors(dtype, n, v)
    if layout == "gaps":
        return [t.repeat_interleave(2, -1)[..., ::2] for t in made]
    if layout == "transposed":
        return [t.mT.contiguous().mT if t.dim() == 2 else t for t in made]
    return made


@given(
    loss=st.sampled_from(LOSSES),
    seed=st.integers(0, 2**16),
    shape=SHAPES,
    dtype=DTYPE,
    masked=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    layout=st.sampled_from(["contiguous", "gaps", "transposed"]),
    chosen=options(),
    weighted=MAYBE,
    upstream=st.sampled_from([1.0, -2.0, 4.0]),  # exact in half precision, in which it multiplies the gradient
    per_token=MAYBE,
)
@example(LOSSES[0], 0, (1, 8), torch.float16, 0.0, "contiguous", {"label_smoothing": 0.5}, False, 1.0, False)
def test_any_call(loss, seed, shape, dtype, masked, layout, chosen, weighted, upstream, per_token):
    torch.manual_seed(seed)
    n, v = shape
    y = torch.randint(0, v, (n,))
    y[torch.rand(n) < masked] = -100
    if weighted:
        chosen = {**chosen, "token_weight": torch.rand(n) + 0.1}
    if loss.impl == "cuda":
        chosen = {**chosen, "logit_scale": None, "z_loss": 0.0}  # which its kernels do not carry
    if loss in LINEAR and loss.name.endswith("chunked"):
        chosen = {**chosen, "max_logits_bytes": 8 * max(v, n, 1) * (1 + seed % 5)}
    of_stats = [torch.rand(n) - 0.5 for _ in range(3)] if per_token and loss.impl != "cuda" else None
    held(loss, tensors_of(loss, dtype, n, v, layout), y, upstream, chosen, of_stats)


@given(
    loss=st.sampled_from([CROSS_ENTROPY, LINEAR[0]]),
    seed=st.integers(0, 2**16),
    shape=SHAPES,
    dtype=DTYPE,
    soft=MAYBE,
    chosen=options(),
    per_token=MAYBE,
)
def test_any_call_with_class_weights_or_probabilities(loss, seed, shape, dtype, soft, chosen, per_token):
    torch.manual_seed(seed)
    n, v = shape
    y = labels(max(n, 1), v)[:n]
    weight = torch.rand(v) + 0.2 if seed % 3 or not soft else None
    target = torch.randn(n, v).softmax(1).to(dtype) if soft else y
    of_stats = [torch.rand(n) - 0.5 for _ in range(3)] if per_token else None
    held(loss, loss.tensors(dtype, n, v), target, 1.0, {**chosen, "weight": weight}, of_stats)


def held(loss, tensors, target, upstream, chosen, of_stats):
    """Inside the budget, the same bits again, and the same whatever stands at masked rows.

    Eager code in half precision is the whole of what a tiny tensor's budget excuses, and it may be right by chance: so
    a value in half precision is held to the budget of fp32 inputs, rounded once.
    """
    if of_stats is not None:
        chosen = {**chosen, "return_stats": "tokens"}
    plain = {name: value for name, value in chosen.items() if name != "max_logits_bytes"}
    results = run(lambda *t: loss.ours(*t, target, **chosen), tensors, upstream, of_stats)
    assert same_bits(run(lambda *t: loss.ours(*t, target, **chosen), tensors, upstream, of_stats), results)
    wide = [t if t.dtype == torch.float64 else t.float() for t in tensors]
    eager = run(lambda *t: loss.plain(*t, target, **plain), wide, upstream, of_stats)
    plain.pop("return_stats", None)
    ref = loss_oracle(wide, target, upstream=upstream, of_stats=of_stats, **plain)
    for i, (x, r, e) in enumerate(zip(results, ref, eager, strict=True)):
        if i == 3 and of_stats is not None and x.dtype == torch.float64:
            # A difference of two logits, which there are no wider numbers for.
            torch.testing.assert_close(x, torch.as_tensor(r), rtol=1e-12, atol=1e-13)
        elif x.dtype != torch.int64:
            check(f"result {i}", x, r, e)
        elif not chosen.get("softcap"):  # at the cap fp32 cannot tell which logit is the larger
            assert x.tolist() == r.tolist()
    if target.dim() == 1:
        tensors[0][target == -100] = float("nan")
        assert same_bits(run(lambda *t: loss.ours(*t, target, **chosen), tensors, upstream, of_stats), results)


@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 4),
    length=st.integers(1, 12),
    shift=MAYBE,
    ignore_index=st.sampled_from([None, 0, -1]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)
def test_shift_and_kept_tokens(seed, batch, length, shift, ignore_index, reduction):
    torch.manual_seed(seed)
    y = labels(batch * length, 20).reshape(batch, length)
    if ignore_index is not None:
        y[y == -100] = ignore_index
    hidden, weight = torch.randn(batch, length, 8), torch.randn(20, 8)
    ignored = -100 if ignore_index is None else ignore_index
    common = {"ignore_index": ignore_index, "reduction": reduction}
    found = linear_cross_entropy(hidden, weight, y, shift=shift, **common)
    kept = KeptTokens.from_labels(y, ignored, shift)
    assert torch.equal(linear_cross_entropy(hidden, weight, kept=kept, shift=shift, **common), found)
    if shift:
        moved = torch.full_like(y, ignored)
        moved[:, :-1] = y[:, 1:]
        assert torch.equal(linear_cross_entropy(hidden, weight, moved, **common), found)
