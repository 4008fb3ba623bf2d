"""What the boundaries of a packed row say, and the answer where they say nothing."""

from itertools import pairwise

import torch

from ..._plain import untransformed, values_of


def segment_lengths(cu_seqlens, T, max_seqlen):
    """The segments' lengths, a list of ints, read on the host; ``ValueError`` for boundaries that are none.

    Returns None if nothing may read them (meta and fake tensors, ``torch.export``), and for a batch inside ``vmap``,
    after a look at each of its boundaries.
    """
    bounds, batched = _read(cu_seqlens)
    if bounds is None:
        return None
    if not batched:
        return _lengths(bounds, T, max_seqlen)
    for each in bounds:
        _lengths(each, T, max_seqlen)
    return None


def _read(cu_seqlens):
    """Returns ``(bounds, batched)``: a list of ints or None, for a batch a list of such lists."""
    if torch.compiler._is_exporting_flag:
        return None, False
    if torch.compiler.is_compiling():
        return cu_seqlens.tolist(), False
    values, batched = values_of(cu_seqlens)
    if values is None:
        return None, batched
    with untransformed():
        return (values.reshape(-1, values.shape[-1]) if batched else values).tolist(), batched


def _lengths(bounds, T, max_seqlen):
    lengths = [end - start for start, end in pairwise(bounds)]
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens: expected to start at 0, got {bounds[0]}")
    if min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens: expected never to decrease, got {bounds}")
    if bounds[-1] > T:
        raise ValueError(f"cu_seqlens: ends at {bounds[-1]}, past the {T} tokens of query")
    if max_seqlen is not None and max(lengths, default=0) > max_seqlen:
        raise ValueError(f"max_seqlen: {max_seqlen} is less than the longest segment, {max(lengths)}")
    return lengths


def attend_nothing(query, key, value):
    """Output [T, Hq, D] and lse [Hq, T] of a row whose tokens are all tail; all three gradients are zeros."""
    out = torch.zeros_like(query) + sum(t[:0].sum() for t in (query, key, value))
    return out, unseen_lse(query, query.shape[0])


def unseen_lse(query, tokens):
    """The lse of ``tokens`` rows that see nothing: −∞, [Hq, tokens], fp32, or fp64 where ``query`` is."""
    return query.new_full((query.shape[1], tokens), -torch.inf, dtype=torch.promote_types(query.dtype, torch.float32))
