"""The oracle of the core and of both losses: NumPy, float64, forward and analytic gradient, for clarity alone.

For one row of logits x with target y, s = ``logit_scale``, c = ``softcap``, ε = ``label_smoothing``, ζ = ``z_loss``::

    u = c · tanh(s x / c)                  (s x without a softcap)
    lse = log Σ_v exp u_v                  p_v = exp(u_v − lse)
    loss = (1 − ε) (lse − u_y) + ε (lse − mean_v u_v) + ζ lse²

    ∂loss/∂u_v = (1 + 2 ζ lse) p_v − (1 − ε) [v = y] − ε / V
    ∂u/∂x      = s (1 − (u / c)²)          (s without a softcap)
"""

from typing import NamedTuple

import numpy as np


class Rows(NamedTuple):
    """Per-row results, each ``[N]``, and the gradient ``[N, V]`` of ``scale · loss``."""

    loss: np.ndarray
    nll: np.ndarray
    lse: np.ndarray
    correct: np.ndarray
    entropy: np.ndarray
    dlogits: np.ndarray


def softmax_grad(logits, target, scale, *, label_smoothing=0.0, softcap=None, logit_scale=1.0, z_loss=0.0):
    """:class:`Rows` of ``logits`` [N, V], ``target`` [N] in [0, V), ``scale`` [N]."""
    x = np.asarray(logits, np.float64)
    N, V = x.shape
    rows = np.arange(N)

    u = logit_scale * x
    du_dx = np.full_like(x, logit_scale)
    if softcap is not None:
        u = softcap * np.tanh(u / softcap)
        du_dx *= 1 - (u / softcap) ** 2

    largest = u.max(1, keepdims=True)
    lse = (largest + np.log(np.exp(u - largest).sum(1, keepdims=True)))[:, 0]
    p = np.exp(u - lse[:, None])
    nll = lse - u[rows, target]
    loss = (1 - label_smoothing) * nll + z_loss * lse**2
    if label_smoothing:  # with a logit of -inf the smoothed loss is infinite, the plain one is not
        loss += label_smoothing * (lse - u.mean(1))

    du = (1 + 2 * z_loss * lse)[:, None] * p - label_smoothing / V
    du[rows, target] -= 1 - label_smoothing
    dlogits = np.asarray(scale, np.float64)[:, None] * du * du_dx

    mean = np.where(p > 0, p * np.where(p > 0, u, 0), 0).sum(1)  # a logit of -inf contributes nothing
    return Rows(loss, nll, lse, u[rows, target] >= largest[:, 0], lse - mean, dlogits)


class Loss(NamedTuple):
    """A reduced loss, the rows behind it, and its gradient by the logits."""

    loss: np.ndarray  # [], or [N] without a reduction
    rows: Rows  # of the kept tokens
    dlogits: np.ndarray  # [N, V]


def masked_loss(
    logits,
    target,
    *,
    ignore_index=-100,
    reduction="mean",
    num_items=None,
    token_weight=None,
    upstream=1.0,
    **options,
):
    """The loss over the kept tokens::

        L = Σ_{i kept} w_i loss_i / n          n: kept tokens, or num_items; 1 for "sum"

    ``upstream`` multiplies the gradient: a scalar, or ``[N]`` with ``reduction="none"``. ``options`` go to
    :func:`softmax_grad`. Nothing kept gives 0 and zeros.
    """
    target = np.asarray(target)
    N = target.shape[0]
    kept = np.flatnonzero(target != ignore_index)
    weight = np.ones(N) if token_weight is None else np.asarray(token_weight, np.float64)
    divisor = (kept.size if num_items is None else num_items) if reduction == "mean" else 1
    factor = weight[kept] / (divisor or 1)

    rows = softmax_grad(
        np.asarray(logits)[kept], target[kept], factor * np.broadcast_to(upstream, (N,))[kept], **options
    )
    losses = np.zeros(N)
    losses[kept] = factor * rows.loss
    dlogits = np.zeros(np.shape(logits))
    dlogits[kept] = rows.dlogits
    return Loss(losses if reduction == "none" else losses.sum(), rows, dlogits)
