"""The loop over chunks of tokens: whole rows of logits, gradients in the same pass (three products)."""

import torch

from ..softmax_grad.rows import RowStats
from . import matmul


def loss(core, x, weight, bias, targets, plan, statistics):
    """Row statistics of ``x Wᵀ + b``: ``x`` [K, D], ``weight`` [V, D], ``bias`` [V] or None, ``targets`` [K].

    ``statistics`` are the core's arguments that ask for them.
    """
    weight = _cast(weight, x, plan)
    spans = _chunks(x.shape[0], plan.chunk)
    return RowStats.cat([core(matmul.logits(x[s], weight, bias), targets[s], **statistics) for s in spans])


def logits(x, weight, bias, plan):
    """``x Wᵀ + b`` of a plan with one chunk: [K, V]."""
    return matmul.logits(x, _cast(weight, x, plan), bias)


def loss_and_gradients(core, x, weight, bias, targets, factors, plan, needs, dtypes, statistics, logits=None):
    """Row statistics, and the gradients by x, W and b of what :class:`RowFactors` say, as ``Σ scale · loss``; one that
    ``needs`` does not name is None.

    ::

        dlogits = scale · ∂loss / ∂logits      dx = dlogits W      dW = dlogitsᵀ x      db = Σ_i dlogits_i

    The gradients have ``dtypes``. With one chunk dW is one product, rounded once; with several it is summed in fp32, as
    db always is. ``logits`` of a single chunk may be given; they are overwritten. There are no row statistics if the
    factors hold the logsumexp.
    """
    spans = _chunks(x.shape[0], plan.chunk)
    dx = x.new_empty(x.shape, dtype=dtypes.dx) if needs.dx else None
    dw = db = None
    if needs.dw:
        dtype = dtypes.dw if len(spans) == 1 else matmul.accumulator_dtype(dtypes.dw)
        dw = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    weight = _cast(weight, x, plan)
    parts = []
    for i, s in enumerate(spans):
        # [chunk, V], the gradient once the core has passed
        dlogits = matmul.logits(x[s], weight, bias) if logits is None else logits
        parts.append(core(dlogits, targets[s], **factors.of(s), **statistics))
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
    return None if factors.lse is not None else RowStats.cat(parts), (dx, dw, db)


def is_one_chunk(plan, K):
    """Returns True if a chunk of the token loop holds all ``K`` rows."""
    return plan.loop == "tokens" and plan.chunk >= K


def _cast(weight, x, plan):
    """The head in the dtype of the products, if the plan has room for that copy; else as it is."""
    return weight.to(x.dtype) if plan.copy else weight


def _chunks(K, chunk):
    # As a compiler can trace them with K a symbol: a range over K, or a slice beyond it, would be a graph for each K.
    count = max(1, -(-K // chunk))
    return [slice(i * chunk, (i + 1) * chunk if i < count - 1 else K) for i in range(count)]
