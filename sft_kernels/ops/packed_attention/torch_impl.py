"""Packed attention, a segment at a time, over ``scaled_dot_product_attention``: work and memory go with Σ l², not
T²."""

from itertools import pairwise

import torch
import torch.nn.functional as F


def packed_attention(query, key, value, cu_seqlens, max_seqlen, *, causal, scale, window_size):
    """See :func:`sft_kernels.packed_attention`. The boundaries are read on the host: for a GPU tensor one sync a
    call."""
    T = query.shape[0]
    lengths = _lengths(cu_seqlens.tolist(), T, max_seqlen)
    tail = T - sum(lengths)
    if scale is not None and scale <= 0:  # torch scales its mask of -inf too
        query, scale = query * scale, 1.0
    # One split, so that the backward is one concatenation rather than a full-size gradient per segment.
    *segments, _ = zip(*(t.split([*lengths, tail]) for t in (query, key, value)), strict=True)
    out = [_segment(*segment, causal, scale, window_size) for segment in segments]
    return torch.cat([query[:0], *out, query.new_zeros(tail, *query.shape[1:])])


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


def _segment(query, key, value, causal, scale, window_size):
    l = query.shape[0]
    if l == 0:
        return query
    left, right = (size if 0 <= size < l - 1 else None for size in window_size)  # None where the window bounds nothing
    windowed = left is not None or (right is not None and not causal)
    mask = _window_mask(l, left, 0 if causal else right, query.device) if windowed else None
    out = F.scaled_dot_product_attention(
        *(t.transpose(0, 1)[None] for t in (query, key, value)),  # [1, H, l, D]
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[0].transpose(0, 1)


def _window_mask(l, left, right, device):
    """Whether query i sees key j, ``i − left ≤ j ≤ i + right``: [l, l]."""
    i = torch.arange(l, device=device)
    ahead = i[None, :] - i[:, None]  # j − i
    mask = torch.ones(l, l, dtype=torch.bool, device=device)
    if left is not None:
        mask &= ahead >= -left
    if right is not None:
        mask &= ahead <= right
    return mask
