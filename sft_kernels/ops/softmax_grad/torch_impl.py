"""The core in plain PyTorch: blocks of rows that stay in the cache, one exponential per logit."""

import torch

from .rows import RowStats

# The working set of one block. On a CPU the passes over a block then hit the last-level cache.
_BLOCK_BYTES = {"cpu": 2 << 20}
_BLOCK_BYTES_DEVICE = 256 << 20


def softmax_grad(logits, target, scale=None, *, lse=None, stats=False):
    """Row statistics of ``logits``; given ``scale``, also their gradient, in place.

    ::

        dlogits[i, v] = scale[i] · (softmax(logits[i])[v] − [v = target[i]])

    Args:
        logits: ``[N, V]``, floating point. With ``scale`` it is overwritten by ``dlogits``, else it is only read.
        target: ``[N]`` int64. A target outside ``[0, V)`` is in another slice of the vocabulary: no entry gets −1.
        scale: ``[N]`` fp32, or None for no gradient. Applied in fp32, before the one rounding to the logits' dtype.
        lse: ``[N]`` fp64, the logsumexp over the whole vocabulary where ``logits`` is a slice; None where it is all.
        stats: also compute ``mean_logit``.

    Returns:
        :class:`RowStats` of this slice; None where ``lse`` was given.
    """
    N, V = logits.shape
    bytes_per_block = _BLOCK_BYTES.get(logits.device.type, _BLOCK_BYTES_DEVICE)
    rows = max(1, bytes_per_block // (4 * max(V, 1)))
    parts = []
    for i in range(0, max(N, 1), rows):
        s = slice(i, i + rows)
        parts.append(
            _block(logits[s], target[s], None if scale is None else scale[s], None if lse is None else lse[s], stats)
        )
    return RowStats.cat(parts) if lse is None else None


def _block(logits, target, scale, lse, stats):
    V = logits.shape[1]
    x = logits if logits.dtype == torch.float64 else logits.float()  # [N, V]
    here = (target >= 0) & (target < V)
    index = target.clamp(0, V - 1)[:, None]  # [N, 1]
    target_logit = x.gather(1, index)[:, 0].where(here, float("-inf"))

    if lse is None:
        max_logit = x.amax(1)
        base = max_logit.where(max_logit > float("-inf"), 0)  # a slice may be ruled out as a whole
        e = (x - base[:, None]).exp_()
        total = e.sum(1)
        row_lse = base.double() + total.log()
        mean_logit = None
        if stats:  # a logit of -inf has p = 0 and contributes nothing
            below = (e * (x - base[:, None]).where(e > 0, 0)).sum(1)
            mean_logit = base.double() + below / total.where(total > 0, 1)
        row_stats = RowStats(row_lse, target_logit, max_logit, mean_logit)
    else:
        row_lse, row_stats = lse, None
        near = lse.to(x.dtype)
        e = (x - near[:, None]).exp_()
        total = (lse - near).exp().to(x.dtype)

    if scale is not None:
        # p_y − 1 by expm1 of a difference in fp64: subtracting 1 from a rounded p_y would lose its digits.
        at_target = torch.expm1(target_logit - row_lse).to(x.dtype) * scale
        e *= (scale / total)[:, None]
        e.scatter_(1, index, at_target.where(here, e.gather(1, index)[:, 0])[:, None])
        logits.copy_(e)
    return row_stats
