"""The step in Triton: one launch that sums squares, where a norm is asked for, and one that updates; no sync.

The formula and the order of its operations are the README's. Every program of the update works out the scalars for
itself, in fp64: what a step needs besides its tensors is a few numbers that the first launch, or the host, has left.
"""

import torch
import triton
import triton.language as tl

from ..._triton import on
from . import tables as at
from .tables import CHUNK, Tables

_BLOCK = 1024  # elements of a tile: 8 a thread, 16 bytes of bf16
_WARPS = 4
_NORM_PROGRAMS = 1024  # at most, on every machine: the order of a sum must not depend on it

_COLUMNS = tl.constexpr(at.COLUMNS)
_PARAM, _GRAD, _STEP = tl.constexpr(at.PARAM), tl.constexpr(at.GRAD), tl.constexpr(at.STEP)
_EXP_AVG, _EXP_AVG_SQ = tl.constexpr(at.EXP_AVG), tl.constexpr(at.EXP_AVG_SQ)
_MAX_EXP_AVG_SQ, _MASTER = tl.constexpr(at.MAX_EXP_AVG_SQ), tl.constexpr(at.MASTER)
_NUMEL, _FIRST_CHUNK, _GROUP = tl.constexpr(at.NUMEL), tl.constexpr(at.FIRST_CHUNK), tl.constexpr(at.GROUP)
_INDEX, _COPIES, _ALIGNED = tl.constexpr(at.INDEX), tl.constexpr(at.COPIES), tl.constexpr(at.ALIGNED)
_OFFSET, _FIRST_MAP, _MAPS = tl.constexpr(at.OFFSET), tl.constexpr(at.FIRST_MAP), tl.constexpr(at.MAPS)
_HYPER = tl.constexpr(at.HYPER)
_CORRECTIONS = tl.constexpr(at.CORRECTIONS)
_GRAD_ALIGNED, _REST_ALIGNED = tl.constexpr(at.GRAD_ALIGNED), tl.constexpr(at.REST_ALIGNED)


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address of a tensor, from a row of the table, as a pointer."""
    pointer = address.to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _read(pointer, o, m, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointer + o, mask=m, other=0)
    return tl.load(pointer + o)


@triton.jit
def _write(pointer, o, m, x, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer + o, x, mask=m)
    else:
        tl.store(pointer + o, x)


@triton.jit
def _here(row, chunk, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Returns ``(start, left, aligned)``: where a chunk begins in its tensor, its elements, and the row's ALIGNED."""
    start = (chunk - tl.load(row + _FIRST_CHUNK)) * CHUNK  # int64
    left = tl.minimum(tl.load(row + _NUMEL) - start, CHUNK).to(tl.int32)
    return start, left, tl.load(row + _ALIGNED)


# ---- the norm


@triton.jit(do_not_specialize=["first", "chunks"])
def _sum_of_squares_kernel(
    addresses,  # [rows, 16] int64
    row_of_chunk,  # [chunks] int32
    partials,  # [programs] fp64
    sums,  # [2] fp64
    arrivals,  # int32, 0 before and after
    first,
    chunks,
    FIRST: tl.constexpr,  # of the launches: the sum begins anew
    GRAD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    o = tl.arange(0, BLOCK)
    total = tl.full((), 0.0, tl.float64)
    for i in range(pid, chunks, programs):
        chunk = (first + i).to(tl.int64)
        row = addresses + tl.load(row_of_chunk + chunk).to(tl.int64) * _COLUMNS
        start, left, aligned = _here(row, chunk, CHUNK, BLOCK)
        whole = tl.where(aligned & _GRAD_ALIGNED != 0, left // BLOCK, 0)
        squares = tl.zeros([BLOCK], tl.float32)
        address = tl.load(row + _GRAD)
        g = _pointer(address, GRAD, True) + start
        for tile in range(0, whole):
            x = tl.load(g + (tile * BLOCK + o)).to(tl.float32)
            squares += x * x
        g = _pointer(address, GRAD, False) + start
        for tile in range(whole, tl.cdiv(left, BLOCK)):
            x = tl.load(g + (tile * BLOCK + o), mask=tile * BLOCK + o < left, other=0).to(tl.float32)
            squares += x * x
        sum_here, copies = tl.sum(squares).to(tl.float64), tl.load(row + _COPIES)
        if copies != 1:
            sum_here = sum_here / copies.to(tl.float64)
        total += sum_here
    tl.store(partials + pid, total)
    # The program that finishes last, whichever it is, adds up all of them in the one order.
    tl.debug_barrier()
    if tl.atomic_add(arrivals, 1) == programs - 1:
        o_p = tl.arange(0, PROGRAMS)
        total = tl.sum(tl.load(partials + o_p, mask=o_p < programs, other=0.0, cache_modifier=".cg"))
        if not FIRST:
            total = tl.load(sums) + total
        tl.store(sums, total)
        tl.store(arrivals, 0)


# ---- the update


@triton.jit
def _power(beta, t):
    """βᵗ in fp64 by squaring."""
    r = tl.full((), 1.0, tl.float64)
    while t > 0:
        r = tl.where(t % 2 == 1, r * beta, r)
        beta = beta * beta
        t = t // 2
    return r


@triton.jit
def _bits(x):
    return x.to(tl.int64, bitcast=True)


@triton.jit
def _corrections(beta1, beta2, t):
    """Returns ``(1 − β1ᵗ, 1 / √(1 − β2ᵗ))`` in fp64."""
    return 1.0 - _power(beta1, t), 1.0 / tl.sqrt(1.0 - _power(beta2, t))


@triton.jit
def _known_corrections(known, beta1, beta2, t):
    """The same from memory, if they are in ``known`` for this step: only who changes a β or a count finds others."""
    rest1, q = tl.load(known + 3).to(tl.float64, bitcast=True), tl.load(known + 4).to(tl.float64, bitcast=True)
    if (tl.load(known) != t) | (tl.load(known + 1) != _bits(beta1)) | (tl.load(known + 2) != _bits(beta2)):
        rest1, q = _corrections(beta1, beta2, t)
    return rest1, q


@triton.jit
def _keep_corrections(known, beta1, beta2, t):
    rest1, q = _corrections(beta1, beta2, t)
    tl.store(known, t.to(tl.int64))
    tl.store(known + 1, _bits(beta1))
    tl.store(known + 2, _bits(beta2))
    tl.store(known + 3, _bits(rest1))
    tl.store(known + 4, _bits(q))


@triton.jit
def _mix(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _is_nan(b):
    """Of the bits of an fp32."""
    return (b & 0x7FFFFFFF) > 0x7F800000


@triton.jit
def _low_half(b):
    return (b & 0xFFFF).to(tl.uint16)


@triton.jit
def _update_tile(
    theta_at,  # addresses
    g_at,
    m_at,
    v_at,
    max_at,
    master_at,
    start,
    left,
    tile,
    maps,  # where the first is
    map_count,
    offset,
    lost,  # [3, BLOCK] in a tuple, with STATS: Σ δ², Σ θ², updates rounded away
    c,
    omega1,
    beta2,
    alpha2,
    eps,
    q,
    a,
    d,
    key,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    MASTER: tl.constexpr,
    AMSGRAD: tl.constexpr,
    ROUND: tl.constexpr,
    MAPPED: tl.constexpr,
    STATS: tl.constexpr,
    ODD: tl.constexpr,  # of the addresses the gradient's alone is no multiple of 16
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o = tile * BLOCK + tl.arange(0, BLOCK)
    inside = o < left
    p_theta = _pointer(theta_at, PARAM, not MASKED) + start
    p_g = _pointer(g_at, GRAD, not (MASKED or ODD)) + start
    p_m = _pointer(m_at, STATE, not MASKED) + start
    p_v = _pointer(v_at, STATE, not MASKED) + start

    g = _read(p_g, o, inside, MASKED).to(tl.float32)
    m = _read(p_m, o, inside, MASKED).to(tl.float32)
    v = _read(p_v, o, inside, MASKED).to(tl.float32)
    if MASTER == "master":
        p_master = _pointer(master_at, tl.float32, not MASKED) + start
        theta = _read(p_master, o, inside, MASKED)
    else:
        theta = _read(p_theta, o, inside, MASKED)
    if MASTER == "remainder":
        p_remainder = _pointer(master_at, tl.int16, not MASKED) + start
        remainder = _read(p_remainder, o, inside, MASKED).to(tl.int32)
        high = theta.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        theta = (high + remainder.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
    theta = theta.to(tl.float32)

    g = g * c
    mean = tl.where(omega1 <= 0.0, g, m) + omega1 * (g - m)
    m = tl.where(omega1 == 0.0, g, mean)
    v = tl.where(beta2 == 0.0, g * g, beta2 * v + alpha2 * (g * g))
    w = v
    if AMSGRAD:
        p_max = _pointer(max_at, STATE, not MASKED) + start
        w = tl.maximum(_read(p_max, o, inside, MASKED).to(tl.float32), v, propagate_nan=tl.PropagateNan.ALL)
        _write(p_max, o, inside, w.to(STATE), MASKED)
    delta = a * tl.div_rn(m, tl.sqrt_rn(w) * q + eps) + d * theta
    new = theta - delta
    _write(p_m, o, inside, m.to(STATE), MASKED)
    _write(p_v, o, inside, v.to(STATE), MASKED)

    b = new.to(tl.uint32, bitcast=True)
    kept = new
    if MASTER == "remainder":
        nan = _is_nan(b)
        _write(p_remainder, o, inside, _low_half(tl.where(nan, 0, b)).to(tl.int16, bitcast=True), MASKED)
        weight = _low_half(tl.where(nan, 0x7FC0, (b + 0x8000) >> 16)).to(PARAM, bitcast=True)
    elif ROUND:
        if MAPPED:
            i = start + o  # int64, row-major in the shard, then in the whole
            for k in range(0, map_count):
                i = i // tl.load(maps + 2 * k) * tl.load(maps + 2 * k + 1) + i % tl.load(maps + 2 * k)
            i += offset
            low, high = (i & 0xFFFFFFFF).to(tl.uint32), (i >> 32).to(tl.uint32)
        else:
            first = start + offset
            low = (first & 0xFFFFFFFF).to(tl.uint32) + o.to(tl.uint32)
            high = (first >> 32).to(tl.uint32) + (low < o.to(tl.uint32)).to(tl.uint32)  # the carry
        noise = _mix(low ^ (high * 0x9E3779B1) ^ key) >> 16
        rounded = _low_half((b + noise) >> 16).to(PARAM, bitcast=True)
        weight = tl.where((b & 0x7FFFFFFF) < 0x7F800000, rounded, new.to(PARAM))
        kept = weight.to(tl.float32)
    else:
        weight = new.to(PARAM)
        if MASTER == "none":
            kept = weight.to(tl.float32)
    _write(p_theta, o, inside, weight, MASKED)
    if MASTER == "master":
        _write(p_master, o, inside, new, MASKED)
    if STATS:
        if MASKED:
            delta = tl.where(inside, delta, 0.0)
            theta = tl.where(inside, theta, 0.0)
        away = inside & (delta != 0) & (kept == theta)
        lost = (lost[0] + delta * delta, lost[1] + theta * theta, lost[2] + away.to(tl.float32))
    return lost


@triton.jit(do_not_specialize=["first"])
def _update_kernel(
    addresses,  # [rows, 16] int64
    row_of_chunk,  # [chunks] int32
    maps,  # [·, 2] int64
    hyper,  # [groups, 8] fp64
    sums,  # [2] fp64
    grad_scale,  # [] fp32
    found_inf,  # [] fp32
    norm_out,  # [] fp32
    skipped,  # [] int64
    arrivals,  # [rows] int32, 0 before and after
    corrections,  # [rows, 5] int64: t and the bits of β1, β2 and of their _corrections
    stats,  # [chunks, 3] fp32
    first,
    HAS_NORM: tl.constexpr,
    CLIP: tl.constexpr,
    SKIP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_FOUND: tl.constexpr,
    SHARED_FOUND: tl.constexpr,  # sums[1] counts the ranks that found infinities
    REPORT: tl.constexpr,  # norm_out and skipped are this launch's to write
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    MASTER: tl.constexpr,
    AMSGRAD: tl.constexpr,
    ROUND: tl.constexpr,
    MAPPED: tl.constexpr,
    STATS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    chunk = (first + pid).to(tl.int64)
    r = tl.load(row_of_chunk + chunk).to(tl.int64)
    row = addresses + r * _COLUMNS
    group = hyper + tl.load(row + _GROUP) * _HYPER

    scale = tl.full((), 1.0, tl.float64)
    if HAS_SCALE:
        scale = tl.load(grad_scale).to(tl.float64)
    clip = tl.full((), 1.0, tl.float64)
    skip = tl.full((), 0, tl.int1)
    if HAS_NORM:
        n = tl.sqrt(tl.load(sums)) / scale
        if CLIP:
            over = (n + 1e-6) / tl.load(group + 6)
            clip = tl.where(over <= 1.0, clip, over)  # NaN stays NaN
        if SKIP:
            skip = (tl.abs(n) < float("inf")) == 0
    if SHARED_FOUND:
        skip = skip | (tl.load(sums + 1) > 0)
    elif HAS_FOUND:
        skip = skip | (tl.load(found_inf) > 0)
    if REPORT:  # noqa: SIM102  this one is compiled away
        if pid == 0:
            if HAS_NORM:
                tl.store(norm_out, n.to(tl.float32))
            if SKIP:
                tl.store(skipped, tl.load(skipped) + skip.to(tl.int64))

    if skip == 0:
        step = tl.load(_pointer(tl.load(row + _STEP), tl.float32, False))
        t = step.to(tl.int32) + 1
        lr, beta1, beta2 = tl.load(group), tl.load(group + 1), tl.load(group + 2)
        c, shrink = tl.load(group + 5), clip * scale
        if shrink != 1.0:
            c = c / shrink
        c = c.to(tl.float32)
        omega1 = tl.where(beta1 <= 0.5, -beta1, 1.0 - beta1).to(tl.float32)
        alpha2 = (1.0 - beta2).to(tl.float32)
        rest1, q = _known_corrections(corrections + r * _CORRECTIONS, beta1, beta2, t)
        q = q.to(tl.float32)
        a = (lr / rest1).to(tl.float32)
        d = (lr * tl.load(group + 4)).to(tl.float32)
        eps = tl.load(group + 3).to(tl.float32)
        beta2 = beta2.to(tl.float32)
        key = t.to(tl.uint32)
        if ROUND:
            key = _mix(tl.load(group + 7).to(tl.int64).to(tl.uint32) + 0x9E3779B9) ^ key
            key = _mix(_mix(key) ^ tl.load(row + _INDEX).to(tl.uint32))

        start, left, aligned = _here(row, chunk, CHUNK, BLOCK)
        whole = tl.where(aligned & _REST_ALIGNED != 0, left // BLOCK, 0)
        even = tl.where(aligned & _GRAD_ALIGNED != 0, whole, 0)
        ends = (0, even, whole, tl.cdiv(left, BLOCK))
        zero = tl.zeros([BLOCK], tl.float32)
        lost = (zero, zero, zero)
        theta_at, g_at, master_at = tl.load(row + _PARAM), tl.load(row + _GRAD), tl.load(row + _MASTER)
        m_at, v_at, max_at = tl.load(row + _EXP_AVG), tl.load(row + _EXP_AVG_SQ), tl.load(row + _MAX_EXP_AVG_SQ)
        maps += 2 * tl.load(row + _FIRST_MAP)
        map_count, offset = tl.load(row + _MAPS), tl.load(row + _OFFSET)
        for part in tl.static_range(3):  # whole tiles, whole tiles with an odd gradient, the rest
            for tile in range(ends[part], ends[part + 1]):
                lost = _update_tile(
                    theta_at, g_at, m_at, v_at, max_at, master_at, start, left, tile, maps, map_count, offset, lost,
                    c, omega1, beta2, alpha2, eps, q, a, d, key,
                    PARAM, GRAD, STATE, MASTER, AMSGRAD, ROUND, MAPPED, STATS, part == 1, part == 2, BLOCK,
                )  # fmt: skip
        if STATS:
            for k in tl.static_range(3):
                tl.store(stats + chunk * 3 + k, tl.sum(lost[k]))

        # All threads, then all programs, of the tensor have read the step before the last one writes it. The last reads
        # again what it needs, for the registers that this would hold.
        tl.debug_barrier()
        r = tl.load(row_of_chunk + chunk).to(tl.int64)
        row = addresses + r * _COLUMNS
        chunks = tl.cdiv(tl.load(row + _NUMEL), CHUNK)
        last = chunks <= 1
        if chunks > 1:
            last = tl.atomic_add(arrivals + r, 1) == chunks - 1
        if last:
            p_step = _pointer(tl.load(row + _STEP), tl.float32, False)
            step = tl.load(p_step) + 1.0
            tl.debug_barrier()
            tl.store(p_step, step)
            tl.store(arrivals + r, 0)
            # For all programs of the tensor in the step to come: fp64 is slow, and each would do the same.
            group = hyper + tl.load(row + _GROUP) * _HYPER
            known, next_t = corrections + r * _CORRECTIONS, step.to(tl.int32) + 1
            _keep_corrections(known, tl.load(group + 1), tl.load(group + 2), next_t)


# ---- launching

_TYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@torch.compiler.disable
def step(optimizer):
    """One update of ``optimizer`` (an :class:`sft_kernels.AdamW`), its gradients ready, which are left as they are."""
    if optimizer._tables is None:
        optimizer._tables = Tables(optimizer, _NORM_PROGRAMS)
    tables = optimizer._tables
    if not tables.launches:
        return
    with on(tables.device), torch.no_grad():
        tables.send_hyper(optimizer)
        _launch(optimizer, tables)
        tables.keep_what_is_captured(optimizer)


def _launch(optimizer, tables):
    device = tables.device
    scale, found = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
    scale, found = (None if t is None else t.to(device, non_blocking=True) for t in (scale, found))
    skip = bool(optimizer.skip_nonfinite)
    measured = optimizer.max_grad_norm is not None or skip
    norm = None
    if measured:
        norm = torch.empty((), dtype=torch.float32, device=device)
        for i, (kind, first, chunks) in enumerate(tables.launches):
            _sum_of_squares_kernel[(min(chunks, _NORM_PROGRAMS),)](
                tables.addresses,
                tables.rows,
                tables.partials,
                tables.sums,
                tables.finished,
                first,
                chunks,
                FIRST=i == 0,
                GRAD=_TYPE[kind.grad],
                CHUNK=CHUNK,
                BLOCK=_BLOCK,
                PROGRAMS=_NORM_PROGRAMS,
                num_warps=_WARPS,
                enable_fp_fusion=False,
            )
        if tables.ranks.groups:
            tables.sums[1] = 0.0 if found is None else (found > 0).double().reshape(())
            tables.ranks.sum_(tables.sums)
        optimizer.last_grad_norm = norm

    for i, (kind, first, chunks) in enumerate(tables.launches):
        _update_kernel[(chunks,)](
            tables.addresses,
            tables.rows,
            tables.maps,
            tables.hyper,
            tables.sums,
            scale,
            found,
            norm,
            optimizer.skipped_steps if skip else None,
            tables.done,
            tables.corrections,
            tables.stats,
            first,
            HAS_NORM=measured,
            CLIP=optimizer.max_grad_norm not in (None, float("inf")),
            SKIP=skip,
            HAS_SCALE=scale is not None,
            HAS_FOUND=found is not None,
            SHARED_FOUND=measured and bool(tables.ranks.groups),
            REPORT=i == 0,
            PARAM=_TYPE[kind.param],
            GRAD=_TYPE[kind.grad],
            STATE=_TYPE[kind.state],
            MASTER=kind.master,
            AMSGRAD=kind.amsgrad,
            ROUND=optimizer.stochastic_rounding and kind.param == torch.bfloat16,
            MAPPED=tables.mapped,
            STATS=tables.stats is not None,
            CHUNK=CHUNK,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
