"""What Triton kernels of several ops share."""

import contextlib

import torch
import triton
import triton.language as tl

if triton.knobs.runtime.interpret:
    from . import _interpreter

    _interpreter.correct()


def on(device):
    """A context in which ``device`` is current.

    Triton launches into the current device's context, wherever its tensors lie, and torch sets no device for operators
    that are implemented in Python. So every launch, and every question about the GPU's capability, stands under this.
    """
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@triton.jit
def tanh(x):
    """tanh to fp32's precision: from exp(−2 |x|), near 0 by its series."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = tl.div_rn(1.0 - e, 1.0 + e)  # a plain division is off by 2 ulp, which the error budget has no room for
    q = x * x
    # x − x³/3 + 2x⁵/15 − 17x⁷/315 + 62x⁹/2835: the next term is below 1e-8 of it up to 1/4.
    near = 1.0 + q * (-1.0 / 3 + q * (2.0 / 15 + q * (-17.0 / 315 + q * (62.0 / 2835))))
    return tl.where(q < 0.0625, x * near, tl.where(x < 0, -far, far))
