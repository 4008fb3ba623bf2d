"""The loop over chunks of tokens: whole rows of logits, gradients in the same pass (three products)."""

import torch

from ..softmax_grad.rows import RowStats
from . import matmul


def loss(core, x, weight, bias, targets, plan, stats):
    """Row statistics of ``x Wᵀ + b``: ``x`` [K, D], ``weight`` [V, D], ``bias`` [V] or None, ``targets`` [K]."""
    weight = weight.to(x.dtype) if plan.copy else weight
    parts = [core(matmul.logits(x[s], weight, bias), targets[s], stats=stats) for s in _chunks(x.shape[0], plan.chunk)]
    return RowStats.cat(parts)


def loss_and_gradients(core, x, weight, bias, targets, scale, plan, needs, dtypes, stats):
    """Row statistics, and the gradients of ``Σ scale · loss`` by x, W and b; one that ``needs`` does not name is None.

    ::

        dlogits = scale · ∂loss / ∂logits      dx = dlogits W      dW = dlogitsᵀ x      db = Σ_i dlogits_i

    The gradients have ``dtypes``. With one chunk dW is one product, rounded once; with several it is summed in fp32, as
    db always is.
    """
    spans = _chunks(x.shape[0], plan.chunk)
    dx = x.new_empty(x.shape, dtype=dtypes.dx) if needs.dx else None
    dw = db = None
    if needs.dw:
        dtype = dtypes.dw if len(spans) == 1 else matmul.accumulator_dtype(dtypes.dw)
        dw = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    weight = weight.to(x.dtype) if plan.copy else weight
    parts = []
    for i, s in enumerate(spans):
        dlogits = matmul.logits(x[s], weight, bias)  # [chunk, V], the gradient once the core has passed
        parts.append(core(dlogits, targets[s], scale=scale[s], stats=stats))
        if needs.dx:
            matmul.grad_input(dlogits, weight, dx[s])
        if needs.dw and i == 0:
            matmul.grad_weight(dlogits, x[s], dw)
        elif needs.dw:
            matmul.accumulate(dw, dlogits.T, x[s])
        if needs.db:
            part = matmul.grad_bias(dlogits)
            db = part if db is None else db.add_(part)
        del dlogits  # before the next chunk's logits are made
    dw, db = (None if d is None else d.to(dtype) for d, dtype in ((dw, dtypes.dw), (db, dtypes.db)))
    return RowStats.cat(parts), (dx, dw, db)


def _chunks(K, chunk):
    # As a compiler can trace them with K a symbol: a range over K, or a slice beyond it, would be a graph for each K.
    count = max(1, -(-K // chunk))
    return [slice(i * chunk, (i + 1) * chunk if i < count - 1 else K) for i in range(count)]
