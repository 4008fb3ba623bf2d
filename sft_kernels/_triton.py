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


_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """exp(x) of fp32 as the hardware's exponential of base 2, which takes and gives 0 for denormals.

    ``tl.exp`` spends four more instructions on denormals. Of an x ≤ 0 the product's rounding costs |x| exp(x) 2⁻²⁴, at
    most 2⁻²⁵: a tenth of what the hardware's exponential does. So subtract a maximum first and multiply then. One fma,
    u log₂ e − max log₂ e, would save an instruction, but round the maximum's product: an error of |max| 2⁻²⁴ in every
    exponential, and in the logsumexp; and it overflows for masks of -3.4e38.
    """
    return tl.exp2(x * _LOG2_E)


@triton.jit
def tanh(x):
    """tanh to fp32's precision."""
    t, _ = tanh_and_slope(x)
    return t


@triton.jit
def tanh_and_slope(x):
    """tanh to fp32's precision, from e = exp(−2 |x|), near 0 by its series; and 1 − tanh² = 4 e / (1 + e)², which keeps
    its digits where tanh is near 1."""
    e = exp(-2.0 * tl.abs(x))
    # A GPU's division is off by up to 2 ulp. One of Newton's steps makes it right to 1, in fewer registers than div_rn.
    d = 1.0 + e
    r = 1.0 / d
    r = tl.fma(tl.fma(-d, r, 1.0), r, r)
    far = tl.fma(-2.0 * e, r, 1.0)  # rounded once where tanh is near 1
    q = x * x
    # x − x³/3 + 2x⁵/15 − 17x⁷/315 + 62x⁹/2835: the next term is below 1e-8 of it up to 1/4.
    near = 1.0 + q * (-1.0 / 3 + q * (2.0 / 15 + q * (-17.0 / 315 + q * (62.0 / 2835))))
    return tl.where(q < 0.0625, x * near, tl.where(x < 0, -far, far)), 4.0 * e * (r * r)
