"""The loop over chunks of tokens: whole rows of logits, gradients in the same pass (three products)."""

import torch

from ..softmax_grad.rows import RowStats
from . import matmul


def loss(core, x, weight, bias, targets, chunk, stats):
    """Row statistics of ``x Wᵀ + b``: ``x`` [K, D], ``weight`` [V, D], ``bias`` [V] or None, ``targets`` [K]."""
    parts = [core(matmul.logits(x[s], weight, bias), targets[s], stats=stats) for s in _chunks(x.shape[0], chunk)]
    return RowStats.cat(parts)


def loss_and_gradients(core, x, weight, bias, targets, scale, chunk, needs, stats, dx_dtype, rounded):
    """Row statistics, and the gradients of ``Σ scale · loss`` by x, W and b; one that ``needs`` does not name is None.

    ::

        dlogits = scale · ∂loss / ∂logits      dx = dlogits W      dW = dlogitsᵀ x      db = Σ_i dlogits_i

    With one chunk dW is one product, rounded once; with several it is summed in fp32, as db always is. Unless
    ``rounded``, dW and db stay in the dtype of their sums.
    """
    K, V = x.shape[0], weight.shape[0]
    spans = _chunks(K, chunk)
    dx = x.new_empty(x.shape, dtype=dx_dtype) if needs.dx else None
    dw = db = None
    if needs.dw:
        dtype = weight.dtype if rounded and len(spans) == 1 else matmul.accumulator_dtype(weight.dtype)
        dw = torch.empty(V, weight.shape[1], dtype=dtype, device=weight.device)
    if needs.db:
        db = torch.zeros(V, dtype=matmul.accumulator_dtype(x.dtype), device=x.device)
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
            db += matmul.grad_bias(dlogits)
        del dlogits  # before the next chunk's logits are made
    if rounded:
        dw, db = (None if d is None else d.to(t.dtype) for d, t in ((dw, weight), (db, bias)))
    return RowStats.cat(parts), (dx, dw, db)


def _chunks(K, chunk):
    # As a compiler can trace them with K a symbol: a range over K, or a slice beyond it, would be a graph for each K.
    count = max(1, -(-K // chunk))
    return [slice(i * chunk, (i + 1) * chunk if i < count - 1 else K) for i in range(count)]
