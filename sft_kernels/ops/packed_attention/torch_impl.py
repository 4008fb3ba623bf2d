"""Packed attention in plain torch, a segment at a time: work and memory go with Σ l², not T²."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..._plain import is_transformed
from .segments import attend_nothing, segment_lengths, unseen_lse


def packed_attention(
    query, key, value, cu_seqlens, max_seqlen, lengths, *, tiles, scale, window_size, softcap, return_lse
):
    """See :func:`sft_kernels.packed_attention`; the lse is None unless asked for.

    ``lengths`` are the segments', None where the boundaries are still to be read on the host: for a GPU tensor one sync
    a call. ``tiles`` say the same, and are not needed.
    """
    T = query.shape[0]
    options = {"scale": scale, "window_size": window_size, "softcap": softcap}
    lengths = segment_lengths(cu_seqlens, T, max_seqlen) if lengths is None else lengths
    if lengths is None:
        return _whole_row(query, key, value, cu_seqlens, options, return_lse)
    lengths = [l for l in lengths if l]
    if not lengths:
        return attend_nothing(query, key, value)
    tail = T - sum(lengths)
    # In fp32 torch's flash kernel for the CPU takes a fast exponential: twice the error budget where scores are large.
    exact = query.device.type == "cpu" and query.dtype == torch.float32 and softcap is None
    bias = _bias(max(lengths), window_size, query) if exact else None
    # One split, so that the backward is one concatenation rather than a full-size gradient per segment.
    *segments, _ = zip(*(t.split([*lengths, tail]) for t in (query, key, value)), strict=True)
    attended = [_with_bias(*s, bias, scale) if exact else _segment(*s, **options) for s in segments]
    out = torch.cat([*attended, query.new_zeros(tail, *query.shape[1:])])
    if not return_lse:
        return out, None
    with torch.no_grad():
        lse = [_scores(q, k, **options).logsumexp(-1) for q, k, _ in segments]
    return out, torch.cat([*lse, unseen_lse(query, tail)], 1)


def _segment(query, key, value, *, scale, window_size, softcap):
    """The output of one segment, [l, Hq, D]."""
    (l, Hq, _), Hkv = query.shape, key.shape[1]
    if softcap is not None:
        p = _scores(query, key, scale=scale, window_size=window_size, softcap=softcap).softmax(-1)
        return _weighted(p, value).to(query.dtype)
    left, right = _binding(window_size, l)
    mask = None if left is None and right in (None, 0) else _mask(l, left, right, query.device)
    if Hq != Hkv and query.device.type == "cpu" and query.element_size() < 4:
        key, value = (_each_head(t, Hq // Hkv) for t in (key, value))
    # No kernel has a second derivative, nor one in forward mode.
    with sdpa_kernel(SDPBackend.MATH) if is_transformed() else nullcontext():
        out = F.scaled_dot_product_attention(
            *(t.transpose(0, 1)[None] for t in (query, key, value)),  # [1, H, l, D]
            attn_mask=mask,
            is_causal=mask is None and right == 0,
            scale=scale,
            enable_gqa=Hq != key.shape[1],
        )
    return out[0].transpose(0, 1)


def _with_bias(query, key, value, bias, scale):
    """The output of one segment, [l, Hq, D], by three passes over its scores: both products and a softmax.

    ``bias`` [L, L], L ≥ l, is added to the scores inside the first product.
    """
    (l, Hq, D), Hkv = query.shape, key.shape[1]
    group = Hq // Hkv
    q = query.transpose(0, 1).reshape(Hkv, group * l, D)  # the heads of one key head in one product
    bias = bias[:l, :l].repeat(group, 1).expand(Hkv, -1, -1)
    scores = torch.baddbmm(bias, q, key.permute(1, 2, 0), alpha=D**-0.5 if scale is None else scale)
    del bias  # with many heads to a key head it is as large as the scores, and the softmax is still to come
    p = scores.softmax(-1)
    del scores
    return (p @ value.transpose(0, 1)).reshape(Hq, l, value.shape[2]).transpose(0, 1)


def _bias(l, window_size, query):
    """Returns the summand of the scores of a segment of l tokens, or fewer: 0 for keys that are seen, else −inf."""
    seen = _mask(l, *_binding(window_size, l), query.device)
    return query.new_zeros(l, l).masked_fill_(~seen, -torch.inf)


def _whole_row(query, key, value, cu_seqlens, options, return_lse):
    """Output and lse, if the boundaries may not be read: a mask of T × T made of them on the device."""
    T, last = query.shape[0], cu_seqlens.shape[0] - 1
    position = torch.arange(T, device=query.device)
    segment = (position[:, None] >= cu_seqlens[1:].to(query.device)).sum(1)  # [T], ``last`` behind the last one
    beyond = segment == last
    query, key, value = (t.masked_fill(beyond[:, None, None], 0) for t in (query, key, value))
    scores = _scores(query, key, **options, among=segment[:, None] == segment)
    out = _weighted(scores.softmax(-1), value).to(query.dtype).masked_fill(beyond[:, None, None], 0)
    if not return_lse:
        return out, None
    return out, scores.detach().logsumexp(-1).masked_fill(beyond, -torch.inf)


def _weighted(p, value):
    """Values [l, Hkv, D] weighted by probabilities ``p`` [Hq, l, l]: [l, Hq, D]."""
    Hq, l, _ = p.shape
    Hkv, D = value.shape[1:]
    out = p.reshape(Hkv, Hq // Hkv * l, l) @ value.transpose(0, 1).to(p.dtype)
    return out.reshape(Hq, l, D).transpose(0, 1)


def _each_head(tensor, group):
    """``tensor`` [l, Hkv, D] repeated for each of its query heads, [l, Hkv · group, D].

    By way of fp32, so that the gradients of the heads, each in half precision, are summed in fp32 and rounded once.
    Torch's own GQA sums them in half precision on a CPU, rounding at each head, and in fp32 on a GPU.
    """
    l, Hkv, D = tensor.shape
    return tensor.float()[:, :, None].expand(l, Hkv, group, D).to(tensor.dtype).reshape(l, Hkv * group, D)


def _scores(query, key, *, scale, window_size, softcap, among=None):
    """Scaled, capped and masked scores of one segment, [Hq, l, l], in fp32 or fp64; of the pairs ``among`` [l, l]."""
    (l, Hq, D), Hkv = query.shape, key.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    q = query.transpose(0, 1).reshape(Hkv, Hq // Hkv * l, D).to(dtype)  # the heads of one key head in one product
    scores = (q @ key.permute(1, 2, 0).to(dtype)).view(Hq, l, l) * (D**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    mask = _mask(l, *_binding(window_size, l), query.device)
    return scores.masked_fill(~(mask if among is None else mask & among), -torch.inf)


def _binding(window_size, l):
    """The window of a segment of l tokens, None where it bounds nothing."""
    return tuple(size if 0 <= size < l - 1 else None for size in window_size)


def _mask(l, left, right, device):
    """Whether query i sees key j, ``i − left ≤ j ≤ i + right``: [l, l]."""
    i = torch.arange(l, device=device)
    ahead = i[None, :] - i[:, None]  # j − i
    mask = torch.ones(l, l, dtype=torch.bool, device=device)
    if left is not None:
        mask = mask & (ahead >= -left)
    if right is not None:
        mask = mask & (ahead <= right)
    return mask
