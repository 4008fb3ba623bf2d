"""The loop over chunks of the vocabulary: an online logsumexp forward, logits recomputed backward (four products).

A column of logits costs little, so the budget may be small whatever the vocabulary, and every slice of dW is written
once.
"""

from functools import reduce

import torch

from ..softmax_grad.rows import RowStats
from . import matmul


def loss(core, x, weight, targets, chunk, stats):
    """Row statistics of ``x Wᵀ``: ``x`` [K, D], ``weight`` [V, D], ``targets`` [K]."""
    return reduce(
        RowStats.merge,
        (core(matmul.logits(x, weight[s]), targets - s.start, stats=stats) for s in _chunks(weight.shape[0], chunk)),
    )


def gradients(core, x, weight, targets, scale, lse, chunk, need_dx, need_dw):
    """The gradients of ``Σ scale · nll``, given the rows' logsumexp; one that is not needed is None."""
    dtype = matmul.accumulator_dtype(x.dtype)
    dx = torch.zeros(x.shape, dtype=dtype, device=x.device) if need_dx else None
    dw = torch.empty_like(weight) if need_dw else None
    for s in _chunks(weight.shape[0], chunk):
        w = weight[s].to(x.dtype)
        dlogits = matmul.logits(x, w)  # [K, chunk], the gradient once the core has passed
        core(dlogits, targets - s.start, scale, lse=lse)
        if need_dx:
            matmul.accumulate(dx, dlogits, w)
        if need_dw:
            matmul.grad_weight(dlogits, x, dw[s])
        del dlogits  # before the next chunk's logits are made
    return dx, dw


def _chunks(V, chunk):
    return [slice(i, i + chunk) for i in range(0, V, chunk)]
