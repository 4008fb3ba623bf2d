"""AdamW in NumPy fp32, operation by operation as ``sft_kernels/ops/adamw/README.md`` writes it: the bits that every
implementation but torch's own kernels must give."""

import numpy as np

f32, u32 = np.float32, np.uint32


def power(beta, t):
    """βᵗ in fp64 by squaring; ``t`` a whole number."""
    r, b, t = np.float64(1), np.float64(beta), int(t)
    while t > 0:
        if t % 2:
            r = r * b
        b = b * b
        t //= 2
    return r


def gradient_factor(norm=None, *, max_grad_norm=None, grad_scale=1.0, maximize=False):
    """``c``, fp32: what a gradient is multiplied by, given the norm (fp64) of the unscaled gradients."""
    clip = np.float64(1)
    if max_grad_norm not in (None, float("inf")):
        clip = np.maximum(clip, (np.float64(norm) + 1e-6) / np.float64(max_grad_norm))
    return f32(np.float64(-1 if maximize else 1) / (clip * np.float64(grad_scale)))


def mean(m, g, beta1):
    if beta1 == 0:
        return g
    return g - f32(beta1) * (g - m) if beta1 <= 0.5 else m + f32(1 - beta1) * (g - m)


def update(theta, g, m, v, v_max=None, *, step, lr, beta1, beta2, eps, weight_decay, c=1.0):
    """``(θ', m, v, v_max or None)``, fp32 arrays, after the ``step + 1``-th gradient; ``c`` by :func:`gradient_factor`.

    All arrays are fp32, widened from whatever they are kept in. θ is the parameter or its decoded master.
    """
    t = int(step) + 1
    lr, beta1, beta2 = np.float64(lr), np.float64(beta1), np.float64(beta2)
    q = f32(1 / np.sqrt(1 - power(beta2, t)))
    a = f32(lr / (1 - power(beta1, t)))
    d = f32(lr * np.float64(weight_decay))
    alpha2, decay2, eps = f32(1 - beta2), f32(beta2), f32(eps)
    with np.errstate(all="ignore"):
        g = g * f32(c)
        m = mean(m, g, beta1)
        v = g * g if beta2 == 0 else decay2 * v + alpha2 * (g * g)
        w = v if v_max is None else np.maximum(v_max, v)
        delta = a * (m / (np.sqrt(w) * q + eps)) + d * theta
        theta = theta - delta
    return theta, m, v, None if v_max is None else w


# ---- how a parameter of 16 bits is kept


def to_bf16(x):
    """fp32 → the 16 bits (uint16) of the nearest bf16, halves to even; NaN → 0x7fc0."""
    b = np.ascontiguousarray(x, f32).view(u32)
    nearest = (b + u32(0x7FFF) + (b >> u32(16) & u32(1))) >> u32(16)
    return np.where(np.isnan(x), u32(0x7FC0), nearest).astype(np.uint16)


def from_bf16(bits):
    return (np.asarray(bits, np.uint16).astype(u32) << u32(16)).view(f32)


def encode(theta):
    """fp32 → the weight's 16 bits (uint16) and the remainder (int16)."""
    b = np.ascontiguousarray(theta, f32).view(u32)
    nan = np.isnan(theta)
    weight = np.where(nan, u32(0x7FC0), (b + u32(0x8000)) >> u32(16)).astype(np.uint16)
    return weight, np.where(nan, u32(0), b & u32(0xFFFF)).astype(np.uint16).view(np.int16)


def decode(weight, remainder):
    low = np.asarray(remainder, np.int16).astype(np.int32).view(u32)
    return ((np.asarray(weight, np.uint16).astype(u32) << u32(16)) + low).view(f32)


def mix(x):
    x = np.atleast_1d(np.asarray(x, u32))
    x = x ^ x >> u32(16)
    x = x * u32(0x7FEB352D)
    x = x ^ x >> u32(15)
    x = x * u32(0x846CA68B)
    return x ^ x >> u32(16)


def random_bits(i, *, seed, t, index):
    """The hash, uint32, of elements whose row-major indices in the unsharded tensor are ``i`` (int64)."""
    i = np.asarray(i).astype(np.uint64)
    key = mix(np.atleast_1d(u32(seed)) + u32(0x9E3779B9))
    key = mix(mix(key ^ u32(t)) ^ u32(index))
    low, high = (i & np.uint64(0xFFFFFFFF)).astype(u32), (i >> np.uint64(32)).astype(u32)
    return mix(low ^ (high * u32(0x9E3779B1)) ^ key)


def round_stochastically(theta, bits):
    """fp32 and the hash of each element → the bf16's 16 bits (uint16)."""
    b = np.ascontiguousarray(theta, f32).view(u32)
    rounded = (b + (bits >> u32(16))) >> u32(16)
    return np.where(np.isfinite(theta), rounded, to_bf16(theta)).astype(np.uint16)
