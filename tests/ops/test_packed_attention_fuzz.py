"""Packed attention over drawn shapes, segments, options, dtypes and strides: the budget, and what holds to the bit."""

import os

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sft_kernels import packed_attention

from .attention import check_case, differentiate, impl  # noqa: F401
from .helpers import DTYPES, same_bits

bounded = settings(derandomize=True, deadline=None, database=None, max_examples=150)
few = settings(bounded, max_examples=12)  # Triton is interpreted
pytestmark = pytest.mark.usefixtures("impl")


lengths = st.lists(st.integers(0, 12), min_size=1, max_size=6)
options = st.fixed_dictionaries(
    {},
    optional={
        "causal": st.booleans(),
        "scale": st.sampled_from([0.0, 0.4, -0.4, 1, None]),
        "window_size": st.tuples(*[st.sampled_from([-1, 0, 1, 2, 5, 11, 100])] * 2),
        "softcap": st.sampled_from([None, 0.5, 4.0, 50.0]),
    },
)


heads = st.tuples(st.integers(1, 3), st.integers(1, 3))  # Hkv, Hq / Hkv


@st.composite
def tensors(draw, tokens, shape=None):
    """query, key and value: of their own, slices of one projection, heads first, or with a strided last dimension."""
    key_heads, group, D = shape or (*draw(heads), draw(st.sampled_from([1, 3, 8, 16, 33])))
    counts = [key_heads * group, key_heads, key_heads]
    triton = os.environ["SFT_KERNELS_IMPL"] == "triton"
    dtype = draw(st.sampled_from([dtype for dtype in DTYPES if not (triton and dtype == torch.float64)]))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    match draw(st.sampled_from(["own", "projection", "heads first", "strided"])):
        case "own":
            drawn = [torch.randn(tokens, h, D) for h in counts]
        case "projection":
            drawn = torch.randn(tokens, sum(counts), D).to(dtype).split(counts, 1)
        case "heads first":
            drawn = [torch.randn(h, tokens, D).to(dtype).transpose(0, 1) for h in counts]
        case "strided":
            drawn = [torch.randn(tokens, D, h).to(dtype).mT for h in counts]
    return [t.to(dtype) for t in drawn]


def boundaries(lengths, dtype=torch.int32):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=dtype)


def output_lse_and_gradients_stay_within_the_budget(data, lengths, tail, heads, D, options):
    """Scores of order one, and segments repeated until the output has 4000 entries: the budget sets the largest of our
    errors against the largest of the plain code's, and of a few entries that is a matter of luck."""
    left, right = options.get("window_size", (-1, -1))
    # Elsewhere the gradients are nothing but rounding: test_a_window_of_the_token_itself_gives_its_value.
    assume(max(lengths) > 1 and (left != 0 or not (options.get("causal", True) or right == 0)))
    if options.get("scale") is not None:
        options = {**options, "scale": options["scale"] * D**-0.5}
    lengths = lengths * -(-4000 // (heads[0] * heads[1] * D * sum(lengths)))
    given = data.draw(tensors(sum(lengths) + tail, (*heads, D)))
    max_seqlen = data.draw(st.sampled_from([None, max(lengths), 10 * max(lengths)]))
    check_case(
        given, boundaries(lengths, data.draw(st.sampled_from([torch.int32, torch.int64]))), max_seqlen, **options
    )


def attend(given, upstream, lengths, options):
    return differentiate(
        lambda *t: packed_attention(*t, boundaries(lengths), return_lse=True, **options), given, upstream
    )


def the_order_of_the_segments_changes_no_bit(data, lengths, tail, heads, options):
    """Rows lie at multiples of 64 bytes, in the layout of an index: torch's products give other bits elsewhere."""
    T = sum(lengths) + tail
    given = data.draw(tensors(T, (*heads, 32)))
    order = data.draw(st.permutations(range(len(lengths))))
    *parts, rest = torch.arange(T).split([*lengths, tail])
    rows = torch.cat([*(parts[i] for i in order), rest])
    upstream = torch.randn(given[0].shape).to(given[0].dtype)
    given = [t[torch.arange(T)] for t in given]
    out, lse, *gradients = attend(given, upstream, lengths, options)
    moved = attend([t[rows] for t in given], upstream[rows], [lengths[i] for i in order], options)
    assert same_bits(moved, (out[rows], lse[:, rows], *(t[rows] for t in gradients)))


def a_changed_segment_leaves_the_others_bits(data, lengths, tail, options, poison):
    given = data.draw(tensors(sum(lengths) + tail))
    which = data.draw(st.integers(0, len(lengths)))  # the last is the tail
    start = sum(lengths[:which])
    changed = slice(start, start + [*lengths, tail][which])
    upstream = torch.randn(given[0].shape).to(given[0].dtype)
    before = attend(given, upstream, lengths, options)
    for t in given:  # in place: torch's products give other bits in another layout
        t[changed] = poison
    after = attend(given, upstream, lengths, options)
    for x in (*before, *after):
        (x if x.dim() == 3 else x.T)[changed] = 0
    assert same_bits(after, before)


PROPERTIES = {
    output_lse_and_gradients_stay_within_the_budget: (heads, st.sampled_from([8, 16, 33]), options),
    the_order_of_the_segments_changes_no_bit: (heads, options),
    a_changed_segment_leaves_the_others_bits: (options, st.sampled_from([100.0, float("nan"), float("inf")])),
}


@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda function: function.__name__)
def test(holds, impl):  # noqa: F811
    drawn = given(st.data(), lengths, st.integers(0, 4), *PROPERTIES[holds])(holds)
    (few if impl == "triton" else bounded)(drawn)()
