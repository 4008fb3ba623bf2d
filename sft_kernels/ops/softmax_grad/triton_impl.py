"""The core in Triton: one program a row, or a few where rows are short; two reads and one write of each logit.

The first pass keeps a running maximum and sum for every group of eight columns, which one thread holds, so that nothing
is exchanged between threads before the end of the row. The second pass walks back from there: what was read last may
still be in the cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..._triton import exp, on, tanh_and_slope
from . import operators
from .options import LossOptions

_VEC = tl.constexpr(8)  # columns of a group: 16 bytes in half precision
_NIL = tl.constexpr(-200.0)  # exp of this is 0 in fp32, and 0 times it is 0, which 0 times −∞ is not
_SCALE_BLOCK = 8192  # elements of a gradient that a program multiplies at a time
_SCALE_TAIL = 1024  # the same of what is left behind the last whole block
_SCALE_PROGRAMS = 1024  # at most: where the factor is 1 they are all that it costs


class Config(NamedTuple):
    """The size of a launch of the core."""

    groups: int  # of eight columns in a tile, over all its rows: a power of two
    warps: int  # of a program
    registers: int | None = None  # of a thread, at most; None leaves it to the compiler


# By what is done with a row and the bytes of a logit: a gradient that needs two reads of it, one read alone (statistics
# alone, or the logsumexp given), any of them with a softcap, and a softcap with the logsumexp given. Chosen for what
# the compiler makes of them, not by time; the budgets are in bench/launches/softmax_grad.py.
CONFIGS = {
    ("twice", 2): Config(512, 8),
    ("twice", 4): Config(512, 8),
    ("once", 2): Config(512, 8),
    ("once", 4): Config(512, 8),
    ("capped", 2): Config(512, 8, 80),
    ("capped", 4): Config(512, 8),
    ("capped, given", 2): Config(512, 8, 64),
    ("capped, given", 4): Config(512, 8, 64),
}


def config_of(scale, lse, softcap, element_size):
    """The :class:`Config` of a launch with these arguments. A function of nothing else, least of all of the number of
    rows: a row's sums must not depend on its neighbours."""
    if softcap is not None:
        return CONFIGS["capped" if lse is None else "capped, given", element_size]
    return CONFIGS["twice" if scale is not None and lse is None else "once", element_size]


@triton.jit
def _shape(x, m, softcap, logit_scale, tanh_scale, CAPPED: tl.constexpr, SCALED: tl.constexpr):
    """Logits scaled, then capped, where not ``m`` -inf; and the slope of the cap, 1 − tanh²."""
    slope = 1.0
    if CAPPED:
        x, slope = tanh_and_slope(x * tanh_scale)
        x = tl.where(m, x * softcap, float("-inf"))
    elif SCALED:
        x = x * logit_scale
    return x, slope


@triton.jit
def _base(max_logit):
    """What is subtracted before exponentials: the maximum, but 0 where all is ruled out."""
    return tl.where(max_logit == float("-inf"), 0.0, max_logit)


@triton.jit
def _off_target(u, base, factor, bend, flat, BENT: tl.constexpr, FLAT: tl.constexpr):
    """The gradient by ``u`` where it is not the target's: exp(u − base) (factor − bend (u − base)) − flat."""
    below = u - base
    d = exp(below)
    if BENT:
        d *= factor - bend * tl.maximum(below, _NIL)
    else:
        d *= factor
    if BENT or FLAT:
        d -= flat
    return d


@triton.jit
def _tile(logits, first, o_g, m_g, EVICT: tl.constexpr):
    """Groups ``o_g`` of rows whose whole groups begin at ``first``: [ROWS, GROUPS, _VEC]."""
    p = first[:, None, None] + (o_g * _VEC)[:, :, None] + tl.arange(0, _VEC)[None, None, :]
    return tl.load(logits + p, mask=m_g[:, :, None], other=float("-inf"), eviction_policy=EVICT)


@triton.jit
def _edges(skip, groups, V):
    """Returns ``(columns, mask)``, both [ROWS, 16]: the columns outside whole groups, and whether a row has them."""
    o = tl.arange(0, 2 * _VEC)[None, :]
    c = tl.where(o < _VEC, o, (skip + groups * _VEC)[:, None] + o - _VEC)
    return c, tl.where(o < _VEC, o < skip[:, None], True) & (c < V)


# Batches differ in N and in where slices of the [N] arrays begin. Neither may compile the kernel anew.
_GIVEN = ("target", "scale", "given_lse", "keep", "coefficients")
_FOUND = ("lse", "target_logit", "max_logit", "mean_logit", "sum_logit", "prediction")


@triton.jit(do_not_specialize=["N", "V"], do_not_specialize_on_alignment=[*_GIVEN, *_FOUND])
def _softmax_grad_kernel(
    logits,  # [N, V]
    out,  # [N, V]: dlogits, may be logits
    target,  # [N] int64
    scale,  # [N] fp32
    given_lse,  # [N] fp64
    keep,  # [N] bool
    coefficients,  # [N, 4] fp32
    lse,  # [N] fp64, and what follows of RowStats
    target_logit,  # [N] fp32
    max_logit,  # [N] fp32
    mean_logit,  # [N] fp64
    sum_logit,  # [N] fp64
    prediction,  # [N] int64
    N,
    V,
    stride,  # elements from one row of logits to the next
    stride_out,
    softcap,
    logit_scale,
    tanh_scale,  # logit_scale / softcap, divided on the host: a division of the GPU's is not rounded right
    z_loss,
    smoothing,  # ε
    uniform,  # ε / classes
    HAS_SCALE: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_COEFFICIENTS: tl.constexpr,
    STATS: tl.constexpr,
    PREDICT: tl.constexpr,
    SMOOTHED: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    PENALISED: tl.constexpr,
    ALIGNED: tl.constexpr,  # rows of logits and out lie the same way to 16 bytes, some of them (SKIP) not at 0
    SKIP: tl.constexpr,
    EDGES: tl.constexpr,  # rows may have columns outside whole groups
    AHEAD: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    m_n = o_n < N
    live = m_n
    if HAS_KEEP:
        live = m_n & (tl.load(keep + o_n, mask=m_n, other=0) != 0)
    y_long = tl.load(target + o_n, mask=live, other=-1)
    here = live & (y_long >= 0) & (y_long < V)
    y = tl.where(here, y_long, -1).to(tl.int32)

    # Whole groups begin `skip` columns into a row, at 16 bytes. The columns before and after them are the edges.
    skip = tl.zeros([ROWS], tl.int32)
    if SKIP:
        skip = (-(o_n * stride) & (_VEC - 1)).to(tl.int32)
    first = o_n * stride + skip  # [ROWS] elements
    first_out = o_n * stride_out + skip
    if ALIGNED:
        first = tl.multiple_of(first, 8)
        first_out = tl.multiple_of(first_out, 8)
    o_v = tl.arange(0, _VEC)[None, None, :]
    o_0 = tl.arange(0, GROUPS)[None, :]
    groups = tl.maximum(V - skip, 0) // _VEC  # [ROWS] whole ones
    tiles = tl.cdiv(V // _VEC, GROUPS)

    x_y = tl.load(logits + o_n * stride + y, mask=here, other=float("-inf")).to(tl.float32)
    u_y = _shape(x_y, here, softcap, logit_scale, tanh_scale, CAPPED, SCALED)[0]
    u_y = tl.where(here, u_y, float("-inf"))

    if HAS_LSE:
        row_lse = tl.load(given_lse + o_n, mask=live, other=0.0)
        base = row_lse.to(tl.float32)
        total = tl.exp(row_lse - base.to(tl.float64))
        below_y = u_y.to(tl.float64) - row_lse
        minus_y = tl.exp(below_y) - 1.0  # p_y − 1
        minus = minus_y.to(tl.float32)
        tl.debug_barrier()  # x_y is read before any thread writes there
    else:
        # Per group: maximum m, s = Σ exp(u − m) and t = Σ exp(u − m)(u − m), both without the target: where the model
        # is sure, p_y − 1 is made of the rest, which would lose its digits beside 1.
        m = tl.full([ROWS, GROUPS], float("-inf"), tl.float32)
        s = tl.zeros([ROWS, GROUPS], tl.float32)
        t = tl.zeros([ROWS, GROUPS], tl.float32)
        w = tl.zeros([ROWS, GROUPS], tl.float32)  # Σ (u − m): of one sign, so that no digits cancel
        if PREDICT:
            at = tl.zeros([ROWS, GROUPS], tl.int32)  # the first tile in which the maximum is what it is
        if AHEAD:  # every tile is asked for while the one before it is summed
            ahead = _tile(logits, first, o_0, live[:, None] & (o_0 < groups[:, None]), "evict_last")
        for i in range(tiles):
            o_g = i * GROUPS + o_0
            m_g = (live[:, None] & (o_g < groups[:, None]))[:, :, None]  # [ROWS, GROUPS, 1]
            c = (skip[:, None] + o_g * _VEC)[:, :, None] + o_v
            if AHEAD:
                x = ahead.to(tl.float32)
                m_next = live[:, None] & (o_g + GROUPS < groups[:, None])
                ahead = _tile(logits, first, o_g + GROUPS, m_next, "evict_last")
            else:
                x = _tile(logits, first, o_g, live[:, None] & (o_g < groups[:, None]), "evict_last").to(tl.float32)
            u = _shape(x, m_g, softcap, logit_scale, tanh_scale, CAPPED, SCALED)[0]
            highest = tl.maximum(m, tl.max(u, 2))
            b = _base(highest)
            below = u - b[:, :, None]
            e = tl.where(c == y[:, None, None], 0.0, exp(below))
            r = exp(m - b)
            if STATS:
                t = r * (t + s * tl.maximum(m - b, _NIL)) + tl.sum(e * tl.maximum(below, _NIL), 2)
            if SMOOTHED:
                w += (i * _VEC) * tl.where(m == float("-inf"), 0.0, m - b) + tl.sum(tl.where(m_g, below, 0.0), 2)
            s = s * r + tl.sum(e, 2)
            if PREDICT:
                at = tl.where(highest > m, i, at)
            m = highest

        top = tl.maximum(tl.max(m, 1), u_y)
        if EDGES:
            c_e, m_e = _edges(skip, groups, V)
            p_e = (o_n * stride)[:, None] + c_e
            x_e = tl.load(logits + p_e, mask=live[:, None] & m_e, other=float("-inf")).to(tl.float32)
            u_e = _shape(x_e, m_e, softcap, logit_scale, tanh_scale, CAPPED, SCALED)[0]
            top = tl.maximum(top, tl.max(u_e, 1))
        if PREDICT:
            # The first of the groups that attain the maximum is read again; none attains a NaN.
            o_g = at * GROUPS + o_0
            g = tl.min(tl.where(m == tl.max(m, 1)[:, None], o_g, groups[:, None]), 1)  # [ROWS]
            m_a = (live & (g < groups))[:, None]
            o_a = g[:, None] * _VEC + tl.arange(0, _VEC)[None, :]  # [ROWS, _VEC]
            x_a = tl.load(logits + first[:, None] + o_a, mask=m_a, other=float("-inf")).to(tl.float32)
            u_a = _shape(x_a, m_a, softcap, logit_scale, tanh_scale, CAPPED, SCALED)[0]
            highest = tl.max(u_a, 1)
            c_a = skip[:, None] + o_a
            if EDGES:
                highest = tl.maximum(highest, tl.max(u_e, 1))
            column = tl.min(tl.where(m_a & (u_a == highest[:, None]), c_a, V), 1)
            if EDGES:
                column = tl.minimum(column, tl.min(tl.where(m_e & (u_e == highest[:, None]), c_e, V), 1))
            tl.store(prediction + o_n, tl.where(live & (column < V), column, 0).to(tl.int64), mask=m_n)
            if HAS_SCALE:
                tl.debug_barrier()  # x_a is read before any thread writes there
        base = _base(top)
        b = _base(m)
        r = exp(m - base[:, None])
        rest = tl.sum(s * r, 1)
        away = tl.sum(r * t + s * r * (b - base[:, None]), 1)  # Σ exp(u − base)(u − base)
        offset = tl.zeros([ROWS], tl.float32)
        if SMOOTHED:
            o_g = tl.arange(0, GROUPS)[None, :]
            columns = tl.cdiv(tl.maximum(groups[:, None] - o_g, 0), GROUPS) * _VEC  # that a thread's group has seen
            offset = tl.sum(tl.where(columns > 0, w + columns * (b - base[:, None]), 0.0), 1)
        if EDGES:
            below_e = u_e - base[:, None]
            e_e = tl.where(c_e == y[:, None], 0.0, exp(below_e))
            rest += tl.sum(e_e, 1)
            away += tl.sum(e_e * tl.maximum(below_e, _NIL), 1)
            if SMOOTHED:
                offset += tl.sum(tl.where(m_e, below_e, 0.0), 1)
        below_y = u_y - base
        e_y = exp(below_y)
        total = rest.to(tl.float64) + e_y.to(tl.float64)
        row_lse = base.to(tl.float64) + tl.log(tl.where(live, total, 1.0))
        minus = -rest / total.to(tl.float32)  # p_y − 1

        tl.store(lse + o_n, tl.where(live, row_lse, 0.0), mask=m_n)
        tl.store(target_logit + o_n, tl.where(live, u_y, 0.0), mask=m_n)
        tl.store(max_logit + o_n, tl.where(live, top, 0.0), mask=m_n)
        if STATS:
            away += e_y * tl.maximum(below_y, _NIL)
            mean = base.to(tl.float64) + away.to(tl.float64) / tl.where(total > 0, total, 1.0)
            tl.store(mean_logit + o_n, tl.where(live, mean, 0.0), mask=m_n)
        if SMOOTHED:
            whole = base.to(tl.float64) * V + offset.to(tl.float64)
            tl.store(sum_logit + o_n, tl.where(live, whole, 0.0), mask=m_n)

    if HAS_COEFFICIENTS:
        # ∂/∂u_v = A p_v + B [v = y] + C p_v (lse − u_v) − E, and lse − u_v = left − (u_v − base)
        p_k = coefficients + o_n * 4
        of_p = tl.load(p_k, mask=live, other=0.0)
        of_y = tl.load(p_k + 1, mask=live, other=0.0)
        of_spread = tl.load(p_k + 2, mask=live, other=0.0)
        flat = tl.load(p_k + 3, mask=live, other=0.0)
        # In fp64: where p_y is near 1 the sum is much smaller than A if B = −A, where it is near 0 if B = 0.
        spread = (minus_y + 1.0) * tl.maximum(below_y, _NIL)  # p_y (u_y − lse)
        at_y = of_p.to(tl.float64) + of_y + of_p * minus_y - of_spread * spread - flat
        at_y = at_y.to(tl.float32)
        if SCALED:
            of_p, of_spread = of_p * logit_scale, of_spread * logit_scale
            flat, at_y = flat * logit_scale, at_y * logit_scale
        left = (row_lse - base.to(tl.float64)).to(tl.float32)
        factor = (of_p + of_spread * left) / total.to(tl.float32)
        bend = of_spread / total.to(tl.float32)
    if HAS_SCALE:
        # ∂loss/∂u_v = (1 + 2 ζ lse) p_v − (1 − ε) [v = y] − ε / V
        a = tl.load(scale + o_n, mask=live, other=0.0)
        if SCALED:
            a = a * logit_scale
        pull = tl.zeros([ROWS], tl.float32)
        if PENALISED:
            pull = 2.0 * z_loss * row_lse.to(tl.float32)
        at_y = a * (minus + smoothing - uniform + pull * (minus + 1.0))
        factor = a * (1.0 + pull) / tl.where(live, total, 1.0).to(tl.float32)
        bend, flat = a, a * uniform  # `bend` is not read
    if HAS_SCALE or HAS_COEFFICIENTS:
        base = _base(base)
        if HAS_LSE:
            # Rows that are not read get 0 times a finite exponential, so that no column needs a selection. (Without lse
            # that costs eight registers, and one CTA of five.)
            factor = tl.where(live, factor, 0.0)
        if AHEAD:
            o_g = (tiles - 1) * GROUPS + o_0
            ahead = _tile(logits, first, o_g, live[:, None] & (o_g < groups[:, None]), "evict_first")
        for k in range(tiles):
            o_g = (tiles - 1 - k) * GROUPS + o_0
            m_g = (o_g < groups[:, None])[:, :, None]
            c = (skip[:, None] + o_g * _VEC)[:, :, None] + o_v
            p_out = first_out[:, None, None] + (o_g * _VEC)[:, :, None] + o_v
            if AHEAD:
                x = ahead.to(tl.float32)
                m_next = live[:, None] & (o_g >= GROUPS) & (o_g - GROUPS < groups[:, None])
                ahead = _tile(logits, first, o_g - GROUPS, m_next, "evict_first")
            else:
                x = _tile(logits, first, o_g, live[:, None] & (o_g < groups[:, None]), "evict_first").to(tl.float32)
            u, slope = _shape(x, m_g, softcap, logit_scale, tanh_scale, CAPPED, SCALED)
            d = _off_target(u, base[:, None, None], factor[:, None, None], bend[:, None, None], flat[:, None, None],
                            HAS_COEFFICIENTS, SMOOTHED)  # fmt: skip
            d = tl.where(c == y[:, None, None], at_y[:, None, None], d)
            if CAPPED:
                d *= slope
            if not HAS_LSE:
                d = tl.where(live[:, None, None], d, 0.0)
            tl.store(out + p_out, d.to(out.dtype.element_ty), mask=m_n[:, None, None] & m_g)
        if EDGES:
            c_e, m_e = _edges(skip, groups, V)
            p_e = (o_n * stride)[:, None] + c_e
            x_e = tl.load(logits + p_e, mask=live[:, None] & m_e, other=0.0).to(tl.float32)
            u_e, slope_e = _shape(x_e, m_e, softcap, logit_scale, tanh_scale, CAPPED, SCALED)
            d_e = _off_target(u_e, base[:, None], factor[:, None], bend[:, None], flat[:, None],
                              HAS_COEFFICIENTS, SMOOTHED)  # fmt: skip
            d_e = tl.where(c_e == y[:, None], at_y[:, None], d_e)
            if CAPPED:
                d_e *= slope_e
            if not HAS_LSE:
                d_e = tl.where(live[:, None], d_e, 0.0)
            p_out_e = (o_n * stride_out)[:, None] + c_e
            tl.store(out + p_out_e, d_e.to(out.dtype.element_ty), mask=m_n[:, None] & m_e)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["factor"])
def _scale_kernel(gradient, factor, n: tl.int64, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    f = tl.load(factor).to(tl.float32)
    if f != 1:
        pid = tl.program_id(0).to(tl.int64)
        programs = tl.num_programs(0).to(tl.int64)
        for i in range(pid * BLOCK, n - BLOCK + 1, programs * BLOCK):
            o = tl.multiple_of(i, 16) + tl.arange(0, BLOCK)
            tl.store(gradient + o, (tl.load(gradient + o).to(tl.float32) * f).to(gradient.dtype.element_ty))
        for i in range(n // BLOCK * BLOCK + pid * TAIL, n, programs * TAIL):
            o = i + tl.arange(0, TAIL)
            x = tl.load(gradient + o, mask=o < n, other=0.0).to(tl.float32)
            tl.store(gradient + o, (x * f).to(gradient.dtype.element_ty), mask=o < n)


def softmax_grad(
    logits,
    target,
    options,
    scale=None,
    *,
    lse=None,
    coefficients=None,
    stats=False,
    predict=False,
    keep=None,
    out=None,
):
    """As ``torch_impl.softmax_grad``, for fp32, bf16 and fp16. Logits whose columns are not adjacent are copied. The
    ``prediction`` of a row that holds NaN is some column of it."""
    rest = (target, scale, lse, keep, *options, stats, coefficients, predict)
    gradient = not (scale is None and coefficients is None)
    found = operators.call(torch.ops.sft_kernels, logits, out, gradient, *rest)
    return operators.row_stats(found, stats, options.label_smoothing, predict) if lse is None else None


def scale_(gradient, factor):
    """``gradient`` times ``factor`` (0-d, on the same device) in place; where it is 1, which only the device looks at,
    nothing is read."""
    torch.ops.sft_kernels.scale_(gradient, factor)


def launch(logits, out, target, scale, lse, keep, options, stats, coefficients=None, predict=False):
    """Launch the kernel; the fields of :class:`RowStats`, empty where not asked for or where ``lse`` is given."""
    N, V = logits.shape
    fields = _fields(logits, lse, options.label_smoothing, stats, predict)
    if N == 0:
        return fields
    source = logits if logits.stride(1) == 1 else logits.contiguous()
    destination = out if out.stride(1) == 1 else torch.empty_like(source)
    stride, stride_out = source.stride(0), destination.stride(0)
    aligned = (stride - stride_out) % 8 == 0
    config = config_of(scale, lse, options.softcap, source.element_size())
    groups = min(triton.next_power_of_2(triton.cdiv(V, 8)), config.groups)
    rows = config.groups // groups
    with on(logits.device):
        _softmax_grad_kernel[(triton.cdiv(N, rows),)](
            source,
            destination,
            target,
            scale,
            lse,
            keep,
            coefficients if coefficients is None else coefficients.contiguous(),
            *fields,
            N,
            V,
            stride,
            stride_out,
            options.softcap,
            options.logit_scale,
            options.tanh_scale,
            options.z_loss,
            options.label_smoothing,
            options.label_smoothing / options.classes,
            HAS_SCALE=scale is not None,
            HAS_LSE=lse is not None,
            HAS_KEEP=keep is not None,
            HAS_COEFFICIENTS=coefficients is not None,
            STATS=stats,
            PREDICT=predict,
            SMOOTHED=bool(options.label_smoothing),
            CAPPED=options.softcap is not None,
            SCALED=options.logit_scale is not None,
            PENALISED=bool(options.z_loss),
            ALIGNED=aligned,
            SKIP=aligned and stride % 8 != 0,
            EDGES=stride % 8 != 0 or V % 8 != 0,
            AHEAD=aligned and groups * 8 < V and lse is None,
            ROWS=rows,
            GROUPS=groups,
            num_warps=config.warps,
            maxnreg=config.registers,
        )
    if not (scale is None and coefficients is None) and destination is not out:
        out.copy_(destination)
    return fields


# ---- the same as operators

_library = torch.library.Library("sft_kernels", "DEF")


def _register(schema, function, fake):
    """Define an operator, for the GPU and, interpreted, the CPU; ``fake`` makes its results without values."""
    name = schema.split("(")[0]
    _library.define(schema, tags=operators.TAGS)
    for device in ("CUDA", "CPU"):
        _library.impl(name, function, device)
    torch.library.register_fake(f"sft_kernels::{name}", fake, lib=_library)


def _out_of_place(logits, out, target, scale, lse, keep, *options_and_more):
    *options, stats, coefficients, predict = options_and_more
    return launch(logits, out, target, scale, lse, keep, LossOptions(*options), stats, coefficients, predict)


def _in_place(logits, *rest):
    return _out_of_place(logits, logits, *rest)


def _scale(gradient, factor):
    if not gradient.is_contiguous():
        gradient.mul_(factor)
    elif n := gradient.numel():
        programs = min(max(1, n // _SCALE_BLOCK), _SCALE_PROGRAMS)
        with on(gradient.device):
            _scale_kernel[(programs,)](gradient, factor, n, BLOCK=_SCALE_BLOCK, TAIL=_SCALE_TAIL, num_warps=8)


def _fields(logits, lse, label_smoothing, stats, predict):
    prediction = operators.field(logits, lse, torch.int64, predict)
    return *operators.fields(logits, lse, label_smoothing, stats), prediction


def _fake(logits, *rest):
    *_, lse, _keep, _classes, label_smoothing, _softcap, _logit_scale, _z_loss, stats, _coefficients, predict = rest
    return _fields(logits, lse, label_smoothing, stats, predict)


for _schema in operators.schemas(", Tensor? coefficients, bool predict", fields=6):
    _register(_schema, _out_of_place if "out," in _schema else _in_place, _fake)
_register("scale_(Tensor(a!) gradient, Tensor factor) -> ()", _scale, lambda gradient, factor: None)
