"""The loop over chunks of tokens: whole rows of logits, gradients in the same pass (three products)."""

import torch

from ..softmax_grad.rows import RowStats
from . import matmul


def loss(core, x, weight, targets, chunk, stats):
    """Row statistics of ``x Wᵀ``: ``x`` [K, D], ``weight`` [V, D], ``targets`` [K]."""
    parts = [core(matmul.logits(x[s], weight), targets[s], stats=stats) for s in _chunks(x.shape[0], chunk)]
    return RowStats.cat(parts)


def loss_and_gradients(core, x, weight, targets, scale, chunk, need_dx, need_dw, stats):
    """Row statistics, and the gradients of ``Σ scale · nll``; a gradient that is not needed is None.

    ::

        dlogits = scale · (softmax(x Wᵀ) − onehot(targets))      dx = dlogits W      dW = dlogitsᵀ x

    With one chunk dW is one product, rounded once; with several it is summed in fp32.
    """
    K, V = x.shape[0], weight.shape[0]
    spans = _chunks(K, chunk)
    single = len(spans) == 1
    dx = x.new_empty(x.shape) if need_dx else None
    acc = None
    if need_dw:
        dtype = weight.dtype if single else matmul.accumulator_dtype(weight.dtype)
        acc = torch.empty(V, weight.shape[1], dtype=dtype, device=weight.device)
    parts = []
    for i, s in enumerate(spans):
        dlogits = matmul.logits(x[s], weight)  # [chunk, V], the gradient once the core has passed
        parts.append(core(dlogits, targets[s], scale[s], stats=stats))
        if need_dx:
            dx[s] = matmul.grad_input(dlogits, weight)
        if need_dw and i == 0:
            matmul.grad_weight(dlogits, x[s], acc)
        elif need_dw:
            matmul.accumulate(acc, dlogits.T, x[s])
        del dlogits  # before the next chunk's logits are made
    return RowStats.cat(parts), dx, acc.to(weight.dtype) if need_dw else None


def _chunks(K, chunk):
    return [slice(i, i + chunk) for i in range(0, max(K, 1), chunk)]
