"""The core in plain PyTorch: blocks of rows that stay in the cache, one exponential per logit."""

import torch

from .rows import RowStats

# The working set of one block. On a CPU the passes over a block then hit the last-level cache.
_BLOCK_BYTES = {"cpu": 2 << 20}
_BLOCK_BYTES_DEVICE = 256 << 20


def softmax_grad(
    logits,
    target,
    options,
    scale=None,
    *,
    lse=None,
    coefficients=None,
    stats=False,
    predict=False,
    keep=None,
    out=None,
):
    """Row statistics of ``logits``; given ``scale``, also the gradient of the rows' losses.

    ::

        dlogits[i, v] = scale[i] · ∂loss_i / ∂logits[i, v]

    Given ``coefficients`` instead of ``scale``, the gradient of any function of the rows' losses, log-probabilities,
    logsumexps and entropies. With y the target, p_v = exp(u_v − lse) and the columns A, B, C, E of a row::

        dlogits[v] = (A p_v + B [v = y] + C p_v (lse − u_v) − E) · ∂u_v / ∂logits[v]

    Args:
        logits: ``[N, V]``, floating point, any strides. Overwritten by ``dlogits`` if that is asked for and ``out`` is
            None, else only read.
        target: ``[N]`` int64. A target outside ``[0, V)`` is in another slice of the vocabulary: no entry gets −1.
        options: :class:`LossOptions`: what the loss of a row is.
        scale: ``[N]`` fp32, or None for no gradient. Applied in fp32, before the one rounding to the logits' dtype.
        lse: ``[N]`` fp64, the logsumexp over the whole vocabulary where ``logits`` is a slice; None where it is all.
        coefficients: ``[N, 4]`` fp32, or None. Only together with ``lse``; ``options`` then says what u is, no more.
            A row of NaN makes the row's gradient NaN.
        stats: also compute ``mean_logit``.
        predict: also compute ``prediction``, unless ``lse`` is given. It lies in ``[0, V)`` for every row: 0 if all
            logits are -inf, the first NaN if there is one.
        keep: ``[N]`` bool, or None for all rows. Others are not read; their statistics and gradients are 0.
        out: where ``dlogits`` goes, of the shape and dtype of ``logits``.

    Returns:
        :class:`RowStats` of this slice; None where ``lse`` was given.
    """
    if keep is not None and torch.compiler.is_compiling():
        return _masked(logits, target, options, scale, lse, coefficients, stats, predict, keep, out)
    N, V = logits.shape
    bytes_per_block = _BLOCK_BYTES.get(logits.device.type, _BLOCK_BYTES_DEVICE)
    length = max(1, bytes_per_block // (4 * max(V, 1)))
    out = logits if out is None else out
    rows = None if keep is None else keep.nonzero()[:, 0]
    if rows is not None and rows.numel() == N:
        rows = None
    if rows is not None and not (scale is None and coefficients is None):
        out[~keep] = 0
    K = N if rows is None else rows.numel()
    parts = []
    for i in range(max(1, -(-K // length))):  # under a compiler a range over K itself would be a graph for each K
        s = slice(i * length, (i + 1) * length)
        s = s if rows is None else rows[s]
        given = (None if t is None else t[s] for t in (scale, lse, coefficients))
        row_stats, gradient = _block(logits[s], target[s], options, *given, stats, predict)
        parts.append(row_stats)
        if gradient is not None:
            out[s] = gradient.to(out.dtype)
    if lse is not None:
        return None
    found = RowStats.cat(parts)
    if rows is None:
        return found
    return RowStats(*(None if t is None else t.new_zeros(N).index_copy_(0, rows, t) for t in found))


def _masked(logits, target, options, scale, lse, coefficients, stats, predict, keep, out):
    """The same without counting the rows to keep, which a compiler cannot: the others are computed and left out."""
    row_stats, gradient = _block(
        logits.where(keep[:, None], 0), target, options, scale, lse, coefficients, stats, predict
    )
    if gradient is not None:
        (logits if out is None else out).copy_(gradient.where(keep[:, None], 0))
    return row_stats and RowStats(*(None if t is None else t.where(keep, 0) for t in row_stats))


def _block(logits, target, options, scale, lse, coefficients, stats, predict):
    """The statistics and the gradient of one block, the latter in the dtype of the sums; None where not asked for."""
    V = logits.shape[1]
    x = logits if logits.dtype == torch.float64 else logits.float()  # [N, V]
    u = options.shape(x)
    here = (target >= 0) & (target < V)
    index = target.clamp(0, V - 1)[:, None]  # [N, 1]
    target_logit = u.gather(1, index)[:, 0].where(here, float("-inf"))

    if coefficients is not None:
        gradient = _by_coefficients(u, coefficients, lse, target_logit, index, here, options.logit_scale)
        return None, gradient if options.softcap is None else gradient.mul_(options.slope(x))

    if lse is None:
        max_logit, prediction = u.max(1) if predict else (u.amax(1), None)
        base = max_logit.where(max_logit > float("-inf"), 0)  # a slice may be ruled out as a whole
        below = u - base[:, None]
        sum_logit = base.double() * V + below.sum(1) if options.label_smoothing else None
        e = below.exp() if stats else below.exp_()
        # In fp64: where the model is sure the sum is 1 and what p_y − 1 is made of.
        total = e.sum(1, dtype=torch.float64)
        row_lse = base.double() + total.log()
        mean_logit = None
        if stats:  # a logit of -inf has p = 0 and contributes nothing
            mean_logit = base.double() + (e * below.where(e > 0, 0)).sum(1) / total.where(total > 0, 1)
        row_stats = RowStats(row_lse, target_logit, max_logit, mean_logit, sum_logit, prediction)
    else:
        row_lse, row_stats = lse, None
        near = lse.to(u.dtype)
        e = (u - near[:, None]).exp_()
        total = (lse - near).exp()

    gradient = None
    if scale is not None:
        # ∂loss/∂u_v = (1 + 2 ζ lse) p_v − (1 − ε) [v = y] − ε / V. At the target p − 1 comes from a difference in fp64
        # by expm1: subtracting 1 from a rounded p would lose its digits.
        if options.logit_scale is not None:
            scale = scale * options.logit_scale
        smoothing, pull = options.label_smoothing, 2 * options.z_loss * row_lse
        minus = torch.expm1(target_logit - row_lse)
        at_target = minus + smoothing * (1 - 1 / options.classes) + pull * (minus + 1)
        e *= (scale * (1 + pull) / total).to(u.dtype)[:, None]
        if smoothing:
            e -= (scale * (smoothing / options.classes))[:, None]
        e.scatter_(1, index, (at_target.to(u.dtype) * scale).where(here, e.gather(1, index)[:, 0])[:, None])
        if options.softcap is not None:
            e *= options.slope(x)
        gradient = e
    return row_stats, gradient


def _by_coefficients(u, coefficients, lse, target_logit, index, here, logit_scale):
    """The gradient of one block by the logits, but for the slope of a softcap.

    What is summed for the target is summed in fp64: where the model is sure, A p_y + B is much smaller than A.
    """
    A, B, C, E = (coefficients.double() * (logit_scale or 1.0)).unbind(1)
    near = lse.to(u.dtype)
    left = lse - near
    below = u - near[:, None]  # u − lse + left
    p = below.exp()
    below.masked_fill_(p == 0, 0)  # a logit of -inf has p = 0 and contributes nothing
    total = left.exp()
    slope, constant = ((t / total).to(u.dtype)[:, None] for t in (C, A + C * left))
    gradient = p.mul_(torch.addcmul(constant, slope, below, value=-1)).sub_(E.to(u.dtype)[:, None])

    below_y = target_logit - lse
    minus = torch.expm1(below_y)  # p_y − 1
    spread = (minus + 1) * below_y.where(below_y > float("-inf"), 0)
    at_target = ((A + B) + A * minus - C * spread - E).to(u.dtype)
    return gradient.scatter_(1, index, at_target.where(here, gradient.gather(1, index)[:, 0])[:, None])


def scale_(gradient, factor):
    """``gradient`` times ``factor`` (0-d) in place.

    That the factor is 1 is looked up on the CPU, where it costs nothing; a GPU, or a trace, is not asked.
    """
    if torch.compiler.is_compiling() or factor.device.type != "cpu" or factor != 1:
        gradient.mul_(factor)
