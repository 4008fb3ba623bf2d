"""The oracle of the core and of both losses: NumPy, float64, forward and analytic gradient, for clarity alone.

For one row of logits x with target distribution t (one-hot at y, or probabilities), s = ``logit_scale``, c =
``softcap``, ε = ``label_smoothing``, ζ = ``z_loss``, class weights w::

    u = c · tanh(s x / c)                  (s x without a softcap)
    q_v = w_v ((1 − ε) t_v + ε / V)        (w_v = 1 without class weights)
    lse = log Σ_v exp u_v                  p_v = exp(u_v − lse)
    loss = Σ_v q_v (lse − u_v) + ζ f lse²        f = Σ_v w_v t_v with class weights, else 1

    ∂loss/∂u_v = (Σ_k q_k + 2 ζ f lse) p_v − q_v
    ∂loss/∂t_v = (1 − ε) w_v (lse − u_v) + ζ lse² ∂f/∂t_v
    ∂u/∂x      = s (1 − tanh²(s x / c))          (s without a softcap)

Values of each token, y being its label or, of probabilities, the most probable class::

    logprob = u_y − lse                 ∂logprob/∂u_v = [v = y] − p_v
    lse                                 ∂lse/∂u_v     = p_v
    H = −Σ_v p_v log p_v                ∂H/∂u_v       = −p_v (log p_v + H)          (0 where p_v = 0)
"""

from typing import NamedTuple

import numpy as np


class Rows(NamedTuple):
    """Per-row results, each ``[N]``, and the gradients ``[N, V]`` of ``scale · loss`` and of the values of each row."""

    loss: np.ndarray
    nll: np.ndarray  # of the target, or of the most probable class
    lse: np.ndarray
    correct: np.ndarray
    entropy: np.ndarray
    prediction: np.ndarray  # the class of the largest logit, the smallest of several
    dlogits: np.ndarray
    dtarget: np.ndarray


def softmax_grad(
    logits,
    target,
    scale,
    *,
    weight=None,
    label_smoothing=0.0,
    softcap=None,
    logit_scale=None,
    z_loss=0.0,
    of_stats=(0.0, 0.0, 0.0),
):
    """:class:`Rows` of ``logits`` [N, V], ``target`` [N] in [0, V) or probabilities [N, V], ``scale`` [N].

    ``of_stats`` are the upstream gradients of logprob, lse and entropy, ``[N]`` or a number each. Their share is added
    to ``dlogits``.
    """
    x = np.asarray(logits, np.float64)
    N, V = x.shape
    if np.ndim(target) == 1:
        y, t = target, np.eye(V)[target]
    else:
        y, t = np.argmax(target, 1), np.asarray(target, np.float64)
    w = np.ones(V) if weight is None else np.asarray(weight, np.float64)
    q = w * ((1 - label_smoothing) * t + label_smoothing / V)
    f = np.ones(N) if weight is None else t @ w

    s = 1.0 if logit_scale is None else logit_scale
    u = s * x
    du_dx = np.full_like(x, s)
    if softcap is not None:
        e = np.exp(-2 * np.abs(u / softcap))
        du_dx *= 4 * e / (1 + e) ** 2  # 1 − tanh² loses its digits where the cap is reached
        u = softcap * np.tanh(u / softcap)

    largest = u.max(1, keepdims=True)
    lse = largest + np.log(np.exp(u - largest).sum(1, keepdims=True))
    p = np.exp(u - lse)
    loss = np.where(q != 0, q * np.where(q != 0, lse - u, 0), 0).sum(1)  # a class of no weight may have a logit of -inf
    loss += z_loss * f * lse[:, 0] ** 2

    du = (q.sum(1, keepdims=True) + 2 * z_loss * f[:, None] * lse) * p - q
    dt = (1 - label_smoothing) * w * (lse - u) + (0 if weight is None else z_loss * lse**2 * w)
    scale = np.asarray(scale, np.float64)[:, None]

    rows = np.arange(N)
    nll = lse[:, 0] - u[rows, y]
    log_p = np.where(p > 0, u - lse, 0)  # a logit of -inf contributes nothing
    entropy = -(p * log_p).sum(1)
    correct = u[rows, y] >= largest[:, 0]

    of_logprob, of_lse, of_entropy = (np.broadcast_to(g, (N,))[:, None] for g in of_stats)
    du = scale * du + of_logprob * (np.eye(V)[y] - p) + of_lse * p - of_entropy * p * (log_p + entropy[:, None])
    return Rows(loss, nll, lse[:, 0], correct, entropy, u.argmax(1), du * du_dx, scale * dt)


class Tokens(NamedTuple):
    """The values of each token, ``[N]``: 0 where nothing is kept, and -1 as the prediction."""

    logprob: np.ndarray
    lse: np.ndarray
    entropy: np.ndarray
    prediction: np.ndarray


class Loss(NamedTuple):
    """A reduced loss, the rows behind it, and its gradients."""

    loss: np.ndarray  # [], or [N] without a reduction
    rows: Rows  # of the kept tokens
    dlogits: np.ndarray  # [N, V]
    tokens: Tokens


def masked_loss(
    logits,
    target,
    *,
    ignore_index=-100,
    reduction="mean",
    num_items=None,
    token_weight=None,
    weight=None,
    upstream=1.0,
    of_stats=(0.0, 0.0, 0.0),
    **options,
):
    """The loss over the kept tokens, all of them where ``target`` holds probabilities::

        L = Σ_{i kept} a_i loss_i / n

    with a = ``token_weight`` and n the number of kept tokens, or Σ_{i kept} ``weight``[y_i], or ``num_items``; 1 for
    "sum". ``upstream`` multiplies the gradient: a scalar, or ``[N]`` with ``reduction="none"``. ``of_stats`` are the
    upstream gradients of the tokens' logprob, lse and entropy, ``[N]`` or a number each; ``a`` and ``n`` do not enter
    these. ``options`` go to :func:`softmax_grad`. Nothing kept gives 0 and zeros.
    """
    target = np.asarray(target)
    N = target.shape[0]
    kept = np.flatnonzero(target != ignore_index) if target.ndim == 1 else np.arange(N)
    token_weight = np.ones(N) if token_weight is None else np.asarray(token_weight, np.float64)
    divisor = 1
    if reduction == "mean":
        divisor = (
            kept.size if weight is None or target.ndim == 2 else np.asarray(weight, np.float64)[target[kept]].sum()
        )
        divisor = divisor if num_items is None else num_items
    factor = token_weight[kept] / (divisor or 1)

    scale = factor * np.broadcast_to(upstream, (N,))[kept]
    of_stats = [np.broadcast_to(g, (N,))[kept] for g in of_stats]
    rows = softmax_grad(np.asarray(logits)[kept], target[kept], scale, weight=weight, of_stats=of_stats, **options)
    losses = np.zeros(N)
    losses[kept] = factor * rows.loss
    dlogits = np.zeros(np.shape(logits))
    dlogits[kept] = rows.dlogits
    tokens = Tokens(*np.zeros((3, N)), np.full(N, -1))
    for place, values in zip(tokens, (-rows.nll, rows.lse, rows.entropy, rows.prediction), strict=True):
        place[kept] = values
    return Loss(losses if reduction == "none" else losses.sum(), rows, dlogits, tokens)
