"""The oracle of AdamW: NumPy, float64, one tensor's update written out, and the step over all of them."""

import numpy as np


def adamw(p, g, state, *, lr, beta1, beta2, eps, weight_decay, amsgrad=False, maximize=False):
    """One update of ``p`` by gradient ``g``; returns the new ``p`` and ``state`` (``t``, ``m``, ``v``, ``v_max``).

    ::

        t ← t + 1                                        g ← −g where maximize
        p ← p − lr λ p
        m ← β1 m + (1 − β1) g                            v ← β2 v + (1 − β2) g²
        p ← p − lr / (1 − β1ᵗ) · m / (√(v̂ / (1 − β2ᵗ)) + ε)          v̂ = v, or its largest so far (amsgrad)
    """
    g = -g if maximize else g
    t = state.get("t", 0) + 1
    m = beta1 * state.get("m", 0.0) + (1 - beta1) * g
    v = beta2 * state.get("v", 0.0) + (1 - beta2) * g**2
    v_max = np.maximum(state.get("v_max", 0.0), v)
    p = p - lr * weight_decay * p
    denominator = np.sqrt((v_max if amsgrad else v) / (1 - beta2**t)) + eps
    p = p - lr / (1 - beta1**t) * m / denominator
    return p, {"t": t, "m": m, "v": v, "v_max": v_max}


def step(params, grads, states, *, max_grad_norm=None, skip_nonfinite=False, **options):
    """One step over lists of arrays; a gradient of None leaves its parameter alone.

    Returns ``(params, states, norm, skipped)``. The norm is over all gradients, before clipping; clipping divides by
    ``max(1, (norm + 1e-6) / max_grad_norm)``, as torch's ``clip_grad_norm_`` does.
    """
    grads = [None if g is None else np.asarray(g, np.float64) for g in grads]
    norm = np.sqrt(sum((g**2).sum() for g in grads if g is not None))
    if skip_nonfinite and not np.isfinite(norm):
        return params, states, norm, True
    clip = 1.0 if max_grad_norm is None else max(1.0, (norm + 1e-6) / max_grad_norm)
    updated = [
        (p, s) if g is None else adamw(np.asarray(p, np.float64), g / clip, s, **options)
        for p, g, s in zip(params, grads, states, strict=True)
    ]
    return [p for p, _ in updated], [s for _, s in updated], norm, False
