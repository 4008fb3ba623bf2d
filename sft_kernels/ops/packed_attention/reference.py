"""The oracle of packed attention: NumPy, float64, one head of one segment at a time, forward and analytic gradient.

For a segment's q, k, v [l, D], scores z, a softcap c and the mask of what may be seen::

    z = scale · q kᵀ          a = c · tanh(z / c)  (z without a softcap), −∞ where masked
    lse = log Σ_j exp a       P = exp(a − lse)     out = P v

    dv = Pᵀ dout              dP = dout vᵀ         da = P (dP − Σ_j P dP)
    dz = da (1 − (a / c)²)    dq = scale · dz k    dk = scale · dzᵀ q
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np


class Attention(NamedTuple):
    """Output, its logsumexp (−∞ in tail rows), and the gradients of ``Σ out · dout``."""

    out: np.ndarray  # [T, Hq, D]
    lse: np.ndarray  # [Hq, T]
    dquery: np.ndarray  # [T, Hq, D]
    dkey: np.ndarray  # [T, Hkv, D]
    dvalue: np.ndarray  # [T, Hkv, D]


def packed_attention(
    query, key, value, cu_seqlens, dout, *, causal=True, scale=None, window_size=(-1, -1), softcap=None
):
    """:class:`Attention` of ``query`` [T, Hq, D], ``key``, ``value`` [T, Hkv, D], boundaries ``cu_seqlens`` [B + 1]."""
    query, key, value, dout = (np.asarray(x, np.float64) for x in (query, key, value, dout))
    T, Hq, D = query.shape
    group = Hq // key.shape[1]
    scale = D**-0.5 if scale is None else scale
    result = Attention(
        np.zeros(query.shape),
        np.full((Hq, T), -np.inf),
        np.zeros(query.shape),
        np.zeros(key.shape),
        np.zeros(key.shape),
    )
    for start, end in pairwise(cu_seqlens):
        seen = _seen(end - start, causal, *window_size)
        for h in range(Hq):
            s, kv = (slice(start, end), h), (slice(start, end), h // group)
            q, k, v, do = query[s], key[kv], value[kv], dout[s]

            a = scale * q @ k.T  # [l, l]
            cap = np.ones_like(a)
            if softcap is not None:
                a = softcap * np.tanh(a / softcap)
                cap = 1 - (a / softcap) ** 2
            a = np.where(seen, a, -np.inf)
            largest = a.max(1, keepdims=True, initial=-np.inf)
            lse = largest + np.log(np.exp(a - largest).sum(1, keepdims=True))
            p = np.exp(a - lse)

            dp = do @ v.T
            dz = p * (dp - (p * dp).sum(1, keepdims=True)) * cap
            result.out[s] = p @ v
            result.lse[h, start:end] = lse[:, 0]
            result.dquery[s] = scale * dz @ k
            result.dkey[kv] += scale * dz.T @ q
            result.dvalue[kv] += p.T @ do
    return result


def _seen(l, causal, left, right):
    """Whether query i sees key j: [l, l]."""
    ahead = np.arange(l)[None, :] - np.arange(l)[:, None]  # j − i
    seen = np.ones((l, l), bool)
    if left >= 0:
        seen &= ahead >= -left
    if right >= 0:
        seen &= ahead <= right
    return seen & (ahead <= 0) if causal else seen
