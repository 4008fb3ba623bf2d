"""The backward pass in Triton, in two kernels that need no atomics, so that the same inputs give the same bits.

For a query tile dQ is summed past the keys that it sees; for a key tile dK and dV past the queries that see it, those
of every head that reads it. Both form the probabilities anew from the lse::

    p = exp(a − lse)    dV = Σ pᵀ dout    dz = p (dout vᵀ − delta) (1 − (a / c)²)    delta = Σ_d out dout
    dQ = scale Σ dz k   dK = scale Σ dzᵀ q

The first kernel writes delta, which the second reads. Of a segment that is a small tile as a whole it does no more: the
second has all of its queries and keys at hand, and so all three gradients in one go.
"""

import torch
import triton
import triton.language as tl

from ..._triton import on
from .triton_shared import Mask, by_rows, keys_met, probabilities, queries_met, rows, scores, seen, sizes


@triton.jit
def _past_keys(
    dq, q, do, b_lse, delta, key, value, stride_k, stride_v, first, stop, lo, hi, slope, cap, left, right,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """dQ, without the scale, of the queries from ``first`` on past keys [lo, hi)."""
    i = first + tl.arange(0, ROWS)[:, None]
    for at in range(lo, hi, INNER):
        j = at + tl.arange(0, INNER)
        p_k, m_d = rows(key, at, stride_k, INNER, D, BLOCK_D)
        p_v, _ = rows(value, at, stride_v, INNER, D, BLOCK_D)
        m_j = m_d & (j < stop)[:, None] if MASKED else m_d
        k = tl.load(p_k, mask=m_j, other=0.0)  # [INNER, BLOCK_D]
        v = tl.load(p_v, mask=m_j, other=0.0)
        s, t = scores(tl.dot(q, tl.trans(k), input_precision="ieee"), slope, cap, CAPPED)  # [ROWS, INNER]
        p = probabilities(s, b_lse[:, None])
        if MASKED:
            p = tl.where(seen(i, j[None, :], stop, left, right, LEFT, RIGHT), p, 0.0)
        dz = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        if CAPPED:
            dz *= 1.0 - t * t
        dq = tl.dot(dz.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def _delta(
    out, dout, delta, stride_do, stride_o, stop, first, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr
):
    """dout and delta of one head's queries from ``first`` on; delta is kept for the other kernel too."""
    i = first + tl.arange(0, ROWS)
    m_i = i < stop
    p_do, m_d = rows(dout, first, stride_do, ROWS, D, BLOCK_D)
    p_o, _ = rows(out, first, stride_o, ROWS, D, BLOCK_D)
    do = tl.load(p_do, mask=m_i[:, None] & m_d, other=0.0)
    o = tl.load(p_o, mask=m_i[:, None] & m_d, other=0.0)
    found = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + i, found, mask=m_i)
    return do, found


@triton.jit
def _query_tile(
    query, key, value, out, dout, lse, delta, dquery, stride_q, stride_k, stride_v, stride_do, stride_o,
    start, stop, first, scale, slope, cap, left, right,
    CAPPED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """delta and dQ of one head's queries from ``first`` on."""
    i = first + tl.arange(0, ROWS)
    m_i = i < stop
    p_q, m_d = rows(query, first, stride_q, ROWS, D, BLOCK_D)
    m_q = m_i[:, None] & m_d
    do, b_delta = _delta(out, dout, delta, stride_do, stride_o, stop, first, D, BLOCK_D, ROWS)
    q = tl.load(p_q, mask=m_q, other=0.0)
    b_lse = tl.load(lse + i, mask=m_i, other=0.0)
    dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
    lo, common, hi = keys_met(start, stop, first, ROWS, INNER, left, right, LEFT, RIGHT)
    if not LEFT:
        dq = _past_keys(
            dq, q, do, b_lse, b_delta, key, value, stride_k, stride_v, first, stop, lo, common, slope, cap, left, right,
            False, CAPPED, LEFT, RIGHT, D, BLOCK_D, ROWS, INNER,
        )  # fmt: skip
    dq = _past_keys(
        dq, q, do, b_lse, b_delta, key, value, stride_k, stride_v, first, stop, common, hi, slope, cap, left, right,
        True, CAPPED, LEFT, RIGHT, D, BLOCK_D, ROWS, INNER,
    )  # fmt: skip
    p_dq, _ = rows(dquery, first, stride_o, ROWS, D, BLOCK_D)
    tl.store(p_dq, (dq * scale).to(dquery.dtype.element_ty), mask=m_q)


@triton.jit
def _zeros(tensor, first, stop, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """Gradients of rows of no segment."""
    p, m_d = rows(tensor, first, stride, ROWS, D, BLOCK_D)
    m = (first + tl.arange(0, ROWS) < stop)[:, None] & m_d
    tl.store(p, tl.zeros([ROWS, BLOCK_D], tensor.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["T", "left", "right"], do_not_specialize_on_alignment=["tiles"])
def _dquery_kernel(
    query,  # [T, Hq, D]
    key,  # [T, Hkv, D]
    value,  # [T, Hkv, D]
    out,  # [T, Hq, D]
    dout,  # [T, Hq, D]
    lse,  # [Hq, T] fp32, for fp32 tensors fp64, in base 2
    delta,  # [Hq, T] fp32, written here
    dquery,  # [T, Hq, D]
    tiles,  # int32 [2, n, 3], of which the first list is the queries'
    T,
    heads,  # Hq
    group,  # Hq / Hkv
    stride_q,  # elements from one token to the next
    stride_k,
    stride_v,
    stride_do,
    stride_qh,  # elements from one head to the next
    stride_kh,
    stride_vh,
    stride_doh,
    scale,
    slope,
    cap,
    left,
    right,
    CAPPED: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    INNER: tl.constexpr,
):
    SMALL: tl.constexpr = ROWS * SPLIT // 2  # rows of a small tile
    i_h = tl.program_id(0) % heads
    i_p = tl.program_id(0) // heads
    tile = tiles + i_p // SPLIT * 3
    start = tl.load(tile)
    stop = tl.load(tile + 1)
    first = tl.load(tile + 2) + i_p % SPLIT * ROWS
    query += i_h.to(tl.int64) * stride_qh
    key += (i_h // group).to(tl.int64) * stride_kh
    value += (i_h // group).to(tl.int64) * stride_vh
    dout += i_h.to(tl.int64) * stride_doh
    out += i_h * D
    dquery += i_h * D
    lse += i_h.to(tl.int64) * T
    delta += i_h.to(tl.int64) * T
    if first < stop:
        if start < 0:
            _zeros(dquery, first, stop, heads * D, D, BLOCK_D, ROWS)
        elif stop - start <= SMALL:
            _delta(out, dout, delta, stride_do, heads * D, stop, first, D, BLOCK_D, SMALL)
        else:
            if ROWS > SMALL:
                small = stop - first <= SMALL
            else:
                small = False
            if small:
                _query_tile(
                    query, key, value, out, dout, lse, delta, dquery,
                    stride_q, stride_k, stride_v, stride_do, heads * D, start, stop, first,
                    scale, slope, cap, left, right, CAPPED, LEFT, RIGHT, D, BLOCK_D, SMALL, INNER,
                )  # fmt: skip
            else:
                _query_tile(
                    query, key, value, out, dout, lse, delta, dquery,
                    stride_q, stride_k, stride_v, stride_do, heads * D, start, stop, first,
                    scale, slope, cap, left, right, CAPPED, LEFT, RIGHT, D, BLOCK_D, ROWS, INNER,
                )  # fmt: skip


@triton.jit
def _key_tile(
    query, key, value, dout, lse, delta, dquery, dkey, dvalue, T, group,
    stride_q, stride_k, stride_v, stride_do, stride_o, stride_dk, stride_qh, stride_doh,
    start, stop, first, scale, slope, cap, left, right,
    WHOLE: tl.constexpr, CAPPED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """dK and dV of one key head's keys from ``first`` on, and dQ where these are the ``WHOLE`` segment.

    One loop over the steps of all query heads, so that loads run ahead from one head into the next: segments are short.
    """
    j = first + tl.arange(0, ROWS)
    p_k, m_d = rows(key, first, stride_k, ROWS, D, BLOCK_D)
    p_v, _ = rows(value, first, stride_v, ROWS, D, BLOCK_D)
    m_k = (j < stop)[:, None] & m_d
    k = tl.load(p_k, mask=m_k, other=0.0)  # [ROWS, BLOCK_D]
    v = tl.load(p_v, mask=m_k, other=0.0)
    dk = tl.zeros([ROWS, BLOCK_D], tl.float32)
    dv = tl.zeros([ROWS, BLOCK_D], tl.float32)
    lo, hi = queries_met(start, stop, first, ROWS, left, right, LEFT, RIGHT)
    at, g = lo, 0
    for _ in range(group * tl.cdiv(hi - lo, INNER)):
        i = at + tl.arange(0, INNER)
        m_i = i < stop
        p_q, _ = rows(query + tl.cast(g, tl.int64) * stride_qh, at, stride_q, INNER, D, BLOCK_D)
        p_do, _ = rows(dout + tl.cast(g, tl.int64) * stride_doh, at, stride_do, INNER, D, BLOCK_D)
        m_q = m_i[:, None] & m_d
        q = tl.load(p_q, mask=m_q, other=0.0)  # [INNER, BLOCK_D]
        do = tl.load(p_do, mask=m_q, other=0.0)
        b_lse = tl.load(lse + tl.cast(g, tl.int64) * T + i, mask=m_i, other=0.0)
        b_delta = tl.load(delta + tl.cast(g, tl.int64) * T + i, mask=m_i, other=0.0)
        s, t = scores(tl.dot(k, tl.trans(q), input_precision="ieee"), slope, cap, CAPPED)  # [ROWS, INNER]
        m = seen(i[None, :], j[:, None], stop, left, right, LEFT, RIGHT)
        p = tl.where(m, probabilities(s, b_lse[None, :]), 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dz = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - b_delta[None, :])
        if CAPPED:
            dz *= 1.0 - t * t
        dz = dz.to(q.dtype)
        dk = tl.dot(dz, q, dk, input_precision="ieee")
        if WHOLE:
            p_dq, _ = rows(dquery + g * D, at, stride_o, INNER, D, BLOCK_D)
            dq = tl.dot(tl.trans(dz), k, input_precision="ieee")
            tl.store(p_dq, (dq * scale).to(dquery.dtype.element_ty), mask=m_q)
        at += INNER
        g += (at >= hi).to(tl.int32)
        at = tl.where(at < hi, at, lo)
    p_dk, _ = rows(dkey, first, stride_dk, ROWS, D, BLOCK_D)
    p_dv, _ = rows(dvalue, first, stride_dk, ROWS, D, BLOCK_D)
    tl.store(p_dk, (dk * scale).to(dkey.dtype.element_ty), mask=m_k)
    tl.store(p_dv, dv.to(dvalue.dtype.element_ty), mask=m_k)


@triton.jit(do_not_specialize=["T", "left", "right"], do_not_specialize_on_alignment=["tiles"])
def _dkey_kernel(
    query,  # [T, Hq, D]
    key,  # [T, Hkv, D]
    value,  # [T, Hkv, D]
    dout,  # [T, Hq, D]
    lse,  # [Hq, T] fp32, for fp32 tensors fp64, in base 2
    delta,  # [Hq, T] fp32
    dquery,  # [T, Hq, D], of the segments that are one small tile
    dkey,  # [T, Hkv, D]
    dvalue,  # [T, Hkv, D]
    tiles,  # int32 [2, n, 3], of which the second list is the keys'
    T,
    heads,  # Hkv
    group,  # Hq / Hkv
    stride_q,  # elements from one token to the next
    stride_k,
    stride_v,
    stride_do,
    stride_qh,  # elements from one head to the next
    stride_kh,
    stride_vh,
    stride_doh,
    scale,
    slope,
    cap,
    left,
    right,
    CAPPED: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    INNER: tl.constexpr,
):
    SMALL: tl.constexpr = ROWS * SPLIT // 2  # rows of a small tile
    i_h = tl.program_id(0) % heads
    i_p = tl.program_id(0) // heads
    n = tl.num_programs(0) // heads // SPLIT
    tile = tiles + (n + i_p // SPLIT) * 3
    start = tl.load(tile)
    stop = tl.load(tile + 1)
    first = tl.load(tile + 2) + i_p % SPLIT * ROWS
    i_q = i_h * group  # the first of its query heads
    query += i_q.to(tl.int64) * stride_qh
    dout += i_q.to(tl.int64) * stride_doh
    dquery += i_q * D
    lse += i_q.to(tl.int64) * T
    delta += i_q.to(tl.int64) * T
    key += i_h.to(tl.int64) * stride_kh
    value += i_h.to(tl.int64) * stride_vh
    dkey += i_h * D
    dvalue += i_h * D
    if first < stop:
        if start < 0:
            _zeros(dkey, first, stop, heads * D, D, BLOCK_D, ROWS)
            _zeros(dvalue, first, stop, heads * D, D, BLOCK_D, ROWS)
        elif stop - start <= SMALL:
            _key_tile(
                query, key, value, dout, lse, delta, dquery, dkey, dvalue, T, group,
                stride_q, stride_k, stride_v, stride_do, heads * group * D, heads * D, stride_qh, stride_doh,
                start, stop, first, scale, slope, cap, left, right,
                True, CAPPED, LEFT, RIGHT, D, BLOCK_D, SMALL, INNER,
            )  # fmt: skip
        else:
            if ROWS > SMALL:
                small = stop - first <= SMALL
            else:
                small = False
            if small:
                _key_tile(
                    query, key, value, dout, lse, delta, dquery, dkey, dvalue, T, group,
                    stride_q, stride_k, stride_v, stride_do, heads * group * D, heads * D, stride_qh, stride_doh,
                    start, stop, first, scale, slope, cap, left, right,
                    False, CAPPED, LEFT, RIGHT, D, BLOCK_D, SMALL, INNER,
                )  # fmt: skip
            else:
                _key_tile(
                    query, key, value, dout, lse, delta, dquery, dkey, dvalue, T, group,
                    stride_q, stride_k, stride_v, stride_do, heads * group * D, heads * D, stride_qh, stride_doh,
                    start, stop, first, scale, slope, cap, left, right,
                    False, CAPPED, LEFT, RIGHT, D, BLOCK_D, ROWS, INNER,
                )  # fmt: skip


def launch(dout, query, key, value, out, lse, tiles, block, scale, window_size, softcap):
    """The gradients of ``Σ out · dout``, contiguous; ``lse`` is in base 2, ``tiles`` are both lists."""
    (T, Hq, _), Hkv = query.shape, key.shape[1]
    dquery, dkey, dvalue = gradients = results(query, key)
    if T == 0:
        return gradients
    query, key, value, dout = map(by_rows, (query, key, value, dout))
    delta = torch.empty_like(lse, dtype=torch.float32)
    mask = Mask.of(scale, softcap, window_size, T)
    given = (
        *(t.stride(0) for t in (query, key, value, dout)), *(t.stride(1) for t in (query, key, value, dout)), *mask,
    )  # fmt: skip
    with on(query.device):
        options = sizes("dquery", query, key, block, mask)
        _dquery_kernel[(tiles.shape[1] * options["SPLIT"] * Hq,)](
            query, key, value, out, dout, lse, delta, dquery, tiles, T, Hq, Hq // Hkv,
            *given, **options,
        )  # fmt: skip
        options = sizes("dkey", query, key, block, mask)
        _dkey_kernel[(tiles.shape[1] * options["SPLIT"] * Hkv,)](
            query, key, value, dout, lse, delta, dquery, dkey, dvalue, tiles, T, Hkv, Hq // Hkv,
            *given, **options,
        )  # fmt: skip
    return gradients


def results(query, key):
    """Where dQ, dK and dV go: all of it is written."""
    return query.new_empty(query.shape), *(key.new_empty(key.shape) for _ in range(2))
