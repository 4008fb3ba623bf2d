"""The loop over chunks of the vocabulary: an online logsumexp forward, logits recomputed backward (four products).

A column of logits costs little, so the budget may be small whatever the vocabulary, and every slice of dW is written
once.
"""

from functools import reduce

import torch

from ..softmax_grad.rows import RowStats
from . import matmul


def loss(core, x, weight, bias, targets, chunk, statistics):
    """Row statistics of ``x Wᵀ + b``: ``x`` [K, D], ``weight`` [V, D], ``bias`` [V] or None, ``targets`` [K].

    ``statistics`` are the core's arguments that ask for them.
    """
    return reduce(
        RowStats.merge,
        (
            core(
                matmul.logits(x, weight[s].to(x.dtype), None if bias is None else bias[s]),
                _within(targets, s),
                **statistics,
            ).starting_at(s.start)
            for s in _chunks(weight.shape[0], chunk)
        ),
    )


def gradients(core, x, weight, bias, targets, factors, chunk, needs, factor):
    """The gradients by x, W and b of ``factor`` times what :class:`RowFactors` say, the rows' logsumexp among them, as
    ``Σ scale · loss``.

    One that ``needs`` does not name is None. ``factor`` (0-d, or None for 1) multiplies sums in fp32, before they are
    rounded.
    """
    dx = x.new_empty(x.shape, dtype=matmul.accumulator_dtype(x.dtype)) if needs.dx else None
    dw = torch.empty_like(weight) if needs.dw else None
    db = torch.empty_like(bias) if needs.db else None
    for s in _chunks(weight.shape[0], chunk):
        w = weight[s].to(x.dtype)
        # [K, chunk], the gradient once the core has passed
        dlogits = matmul.logits(x, w, None if bias is None else bias[s])
        core(dlogits, _within(targets, s), **factors.of(slice(None)))
        if needs.dx:
            matmul.accumulate(dx, dlogits, w, beta=min(s.start, 1))
        if needs.dw:
            # A product with few rows and a sum over all tokens: as in ``grad_input``, by way of fp32.
            sums = matmul.accumulator_dtype(x.dtype)
            whole = dw.dtype == sums and factor is None
            part = dw[s] if whole else torch.empty_like(dw[s], dtype=sums)
            matmul.grad_weight(dlogits, x, part)
            if not whole:
                dw[s] = part if factor is None else part.mul_(factor)
        if needs.db:
            part = matmul.grad_bias(dlogits)
            db[s] = part if factor is None else part * factor
        del dlogits  # before the next chunk's logits are made
    return dx if dx is None or factor is None else dx.mul_(factor), dw, db


def _within(targets, s):
    """``targets`` as columns of slice ``s``."""
    return targets - s.start if s.start else targets


def _chunks(V, chunk):
    return [slice(i, i + chunk) for i in range(0, V, chunk)]
