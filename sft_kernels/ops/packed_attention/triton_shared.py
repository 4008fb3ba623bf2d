"""What the Triton kernels of both passes share: scores, who sees whom, and the sizes that each is launched with.

In the kernels i counts queries and j keys, both from the beginning of the packed row; scores are in base 2, that is
times log₂ e, since the hardware's exponential is of base 2.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..._triton import tanh
from .tiles import BLOCK

_LOG2_E = math.log2(math.e)


@triton.jit
def scores(s, slope, cap, CAPPED: tl.constexpr):
    """Products q · k as scores in base 2, and tanh of their argument where they are capped (else the scores again)."""
    s = s * slope
    t = s
    if CAPPED:
        t = tanh(s)
        s = t * cap
    return s, t


@triton.jit
def probabilities(s, lse):
    """exp2(s − lse), where ``lse`` is fp32 or fp64.

    Rounding an lse of 100 to fp32 changes all probabilities of its row by up to 22 fp32 eps. Results of half precision
    do not show it, those of fp32 do. So theirs is kept in fp64, and subtracted as two fp32 numbers: the nearest one and
    the rest.
    """
    high = lse.to(tl.float32)
    below = s - high
    if lse.dtype == tl.float64:
        below -= (lse - high).to(tl.float32)
    return tl.exp2(below)


@triton.jit
def seen(i, j, stop, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Whether query i sees key j of its segment, which ends at ``stop``."""
    m = (i < stop) & (j < stop)
    if LEFT:
        m &= j >= i - left
    if RIGHT:
        m &= j <= i + right
    return m


@triton.jit
def keys_met(start, stop, first, ROWS, INNER, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Of the queries from ``first`` on: the first key that one of them sees, the end of the steps of ``INNER`` keys in
    which every query sees every key, and the end of what is seen."""
    last = tl.minimum(first + ROWS, stop)
    lo, hi, common = start, stop, stop
    if LEFT:
        lo = tl.maximum(start, first - left)
        common = lo
    if RIGHT:
        hi = tl.minimum(stop, last + right)
        common = tl.minimum(common, first + right + 1)
    return lo, lo + tl.maximum(common - lo, 0) // INNER * INNER, hi


@triton.jit
def queries_met(start, stop, first, ROWS, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Of the keys from ``first`` on: the first query that sees one of them, and the end of what sees them."""
    lo, hi = start, stop
    if RIGHT:
        lo = tl.maximum(start, first - right)
    if LEFT:
        hi = tl.minimum(stop, tl.minimum(first + ROWS, stop) + left)
    return lo, hi


@triton.jit
def rows(tensor, first, stride, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers to ``ROWS`` rows of one head from ``first`` on, and which of their columns there are."""
    o_d = tl.arange(0, BLOCK_D)[None, :]
    base = tensor + tl.cast(first, tl.int64) * stride
    return base + tl.arange(0, ROWS)[:, None] * stride + o_d, o_d < D  # [ROWS, BLOCK_D], [1, BLOCK_D]


class Config(NamedTuple):
    """How one kernel is launched."""

    rows: int  # of a tile that a program takes: all 128, or 64, where two programs share a tile
    inner: int  # rows that a step of its loop meets
    warps: int
    stages: int


# For half precision, by compute capability and head dimension, rounded up to a power of two of at least 64. Chosen for
# what the compiler makes of them, not by time: no spills up to 128 whatever the options, the largest steps that leave
# none, loads two stages ahead or more where they fit. The budgets are in bench/launches/packed_attention.py. An entry
# may be set at any time: the next launch goes by it, over the same tiles.
CONFIGS = {
    "forward": {
        (8, 64): Config(128, 64, 4, 3),
        (8, 128): Config(128, 32, 8, 3),
        (8, 256): Config(64, 64, 8, 2),
        (9, 64): Config(128, 64, 4, 3),
        (9, 128): Config(128, 64, 8, 3),
        (9, 256): Config(128, 64, 8, 2),
    },
    "dquery": {
        (8, 64): Config(128, 32, 8, 3),
        (8, 128): Config(128, 32, 8, 2),
        (8, 256): Config(64, 32, 8, 2),
        (9, 64): Config(128, 64, 8, 3),
        (9, 128): Config(128, 64, 8, 2),
        (9, 256): Config(64, 32, 8, 2),
    },
    "dkey": {
        (8, 64): Config(128, 32, 8, 2),
        (8, 128): Config(64, 32, 8, 2),
        (8, 256): Config(64, 32, 8, 1),
        (9, 64): Config(128, 64, 8, 2),
        (9, 128): Config(128, 32, 8, 2),
        (9, 256): Config(64, 32, 8, 1),
    },
}
# fp32 has no tensor cores at full precision: it is carried for comparison, in steps whose operands fit the registers.
FP32 = Config(64, 16, 8, 1)


def capability():
    """The compute capability whose configurations the current device gets: 9 if an SM has as much shared memory, else
    8. Ask under :func:`~sft_kernels._triton.on`."""
    if triton.knobs.runtime.interpret:
        return 9
    return _capability_of(triton.runtime.driver.active.get_current_device())


@functools.cache
def _capability_of(current_device):
    return 9 if triton.runtime.driver.active.get_current_target().arch // 10 in (9, 10) else 8


def config_of(name, capability, D, key_heads):
    """The :class:`Config` of kernel ``name`` in half precision.

    A program of the keys' kernel goes over all query heads of its key head. Where there are few key heads, and so few
    programs, that of the longest segment's first keys would outlast all others: it takes half a tile.
    """
    config = CONFIGS[name][capability, max(_power_of_2(D), 64)]
    return config._replace(rows=64) if name == "dkey" and key_heads < 4 else config


def sizes(name, query, key, block, mask):
    """The constants and launch options of kernel ``name`` for ``query`` [T, Hq, D] over tiles of ``block`` rows, on the
    current device. Not to be written to: they are kept by what they follow from."""
    D = query.shape[2]
    config = FP32 if query.dtype == torch.float32 else config_of(name, capability(), D, key.shape[1])
    return _sizes_of(config, D, block, mask.cap > 0, mask.left >= 0, mask.right >= 0)


@functools.cache
def _sizes_of(config, D, block, capped, left, right):
    if config.rows not in (BLOCK // 2, BLOCK):  # a small tile is one program's
        raise ValueError(f"CONFIGS: expected rows of {BLOCK // 2} or {BLOCK}, got {config}")
    return {
        "CAPPED": capped,
        "LEFT": left,
        "RIGHT": right,
        "D": D,
        "BLOCK_D": max(_power_of_2(D), 16),
        "ROWS": config.rows * block // BLOCK,
        "SPLIT": BLOCK // config.rows,
        "INNER": max(config.inner * block // BLOCK, 16),
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def _power_of_2(n):
    """The least power of two that is not below ``n``; Triton's own takes 5 µs."""
    return 1 << (n - 1).bit_length()


class Mask(NamedTuple):
    """The scores' options as the kernels take them."""

    scale: float
    slope: float  # of a product, for its score in base 2, or for the argument of tanh
    cap: float
    left: int
    right: int

    @classmethod
    def of(cls, scale, softcap, window_size, T):
        """A window that no segment of T tokens reaches binds nothing."""
        left, right = window_size
        left, right = left if left < T else -1, right if right < T else -1
        if softcap is None:
            return cls(scale, scale * _LOG2_E, 0.0, left, right)
        return cls(scale, scale / softcap, softcap * _LOG2_E, left, right)


def by_rows(tensor):
    """``tensor`` [T, H, D] as the kernels address it: columns adjacent, rows of a tile within 32 bits; else a copy."""
    return tensor if tensor.stride(2) == 1 and tensor.stride(0) < 1 << 24 else tensor.contiguous()
