"""The forward pass in Triton: a program takes one tile of queries of one head past the keys that they see.

The softmax is kept online (Milakov and Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135): a running maximum m
and sum l a query, and an accumulator that is rescaled where the maximum rises.
"""

import torch
import triton
import triton.language as tl

from ..._triton import on
from .triton_shared import Mask, by_rows, keys_met, rows, scores, seen, sizes


@triton.jit
def _past_keys(
    acc, m, l, q, key, value, stride_k, stride_v, first, stop, lo, hi, slope, cap, left, right,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """The queries from ``first`` on past keys [lo, hi), all of which they see unless ``MASKED``."""
    i = first + tl.arange(0, ROWS)[:, None]
    for at in range(lo, hi, INNER):
        j = at + tl.arange(0, INNER)
        p_k, m_d = rows(key, at, stride_k, INNER, D, BLOCK_D)
        p_v, _ = rows(value, at, stride_v, INNER, D, BLOCK_D)
        # What lies behind the segment may be anything, NaN too: 0 · NaN would poison the product.
        m_j = m_d & (j < stop)[:, None] if MASKED else m_d
        k = tl.load(p_k, mask=m_j, other=0.0)  # [INNER, BLOCK_D]
        s, _ = scores(tl.dot(q, tl.trans(k), input_precision="ieee"), slope, cap, CAPPED)  # [ROWS, INNER]
        if MASKED:
            s = tl.where(seen(i, j[None, :], stop, left, right, LEFT, RIGHT), s, float("-inf"))
        highest = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - highest[:, None])
        rescale = tl.exp2(m - highest)
        l = l * rescale + tl.sum(p, 1)
        v = tl.load(p_v, mask=m_j, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        m = highest
    return acc, m, l


@triton.jit
def _query_tile(
    query, key, value, out, lse, stride_q, stride_k, stride_v, stride_o,
    start, stop, first, slope, cap, left, right,
    CAPPED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Output and lse of one head's queries from ``first`` on."""
    i = first + tl.arange(0, ROWS)
    m_i = i < stop
    p_q, m_d = rows(query, first, stride_q, ROWS, D, BLOCK_D)
    q = tl.load(p_q, mask=m_i[:, None] & m_d, other=0.0)
    # Below every score, yet finite: where a query has seen no key yet, its difference to itself is 0 and not NaN.
    m = tl.full([ROWS], -3.0e38, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    lo, common, hi = keys_met(start, stop, first, ROWS, INNER, left, right, LEFT, RIGHT)
    if not LEFT:
        acc, m, l = _past_keys(
            acc, m, l, q, key, value, stride_k, stride_v, first, stop, lo, common, slope, cap, left, right,
            False, CAPPED, LEFT, RIGHT, D, BLOCK_D, ROWS, INNER,
        )  # fmt: skip
    acc, m, l = _past_keys(
        acc, m, l, q, key, value, stride_k, stride_v, first, stop, common, hi, slope, cap, left, right,
        True, CAPPED, LEFT, RIGHT, D, BLOCK_D, ROWS, INNER,
    )  # fmt: skip
    p_o, _ = rows(out, first, stride_o, ROWS, D, BLOCK_D)
    tl.store(p_o, (acc / l[:, None]).to(out.dtype.element_ty), mask=m_i[:, None] & m_d)
    tl.store(lse + i, m.to(lse.dtype.element_ty) + tl.log2(l), mask=m_i)


@triton.jit
def _tail_tile(out, lse, stride_o, stop, first, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """What rows of no segment get."""
    i = first + tl.arange(0, ROWS)
    m_i = i < stop
    p_o, m_d = rows(out, first, stride_o, ROWS, D, BLOCK_D)
    tl.store(p_o, tl.zeros([ROWS, BLOCK_D], out.dtype.element_ty), mask=m_i[:, None] & m_d)
    tl.store(lse + i, tl.full([ROWS], float("-inf"), lse.dtype.element_ty), mask=m_i)


@triton.jit(do_not_specialize=["T", "left", "right"], do_not_specialize_on_alignment=["tiles"])
def _forward_kernel(
    query,  # [T, Hq, D]
    key,  # [T, Hkv, D]
    value,  # [T, Hkv, D]
    out,  # [T, Hq, D]
    lse,  # [Hq, T] fp32, for fp32 tensors fp64, in base 2
    tiles,  # int32 [2, n, 3], of which the first list is the queries'
    T,
    heads,  # Hq
    group,  # Hq / Hkv
    stride_q,  # elements from one token to the next
    stride_k,
    stride_v,
    stride_qh,  # elements from one head to the next
    stride_kh,
    stride_vh,
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
    i_h = tl.program_id(0) % heads  # the heads that read one key head follow one another
    i_p = tl.program_id(0) // heads
    tile = tiles + i_p // SPLIT * 3
    start = tl.load(tile)
    stop = tl.load(tile + 1)
    first = tl.load(tile + 2) + i_p % SPLIT * ROWS
    query += i_h.to(tl.int64) * stride_qh
    key += (i_h // group).to(tl.int64) * stride_kh
    value += (i_h // group).to(tl.int64) * stride_vh
    out += i_h * D
    lse += i_h.to(tl.int64) * T
    if first < stop:
        if start < 0:
            _tail_tile(out, lse, heads * D, stop, first, D, BLOCK_D, ROWS)
        else:
            if ROWS > SMALL:
                small = stop - first <= SMALL
            else:
                small = False
            if small:
                _query_tile(
                    query, key, value, out, lse, stride_q, stride_k, stride_v, heads * D,
                    start, stop, first, slope, cap, left, right, CAPPED, LEFT, RIGHT, D, BLOCK_D, SMALL, INNER,
                )  # fmt: skip
            else:
                _query_tile(
                    query, key, value, out, lse, stride_q, stride_k, stride_v, heads * D,
                    start, stop, first, slope, cap, left, right, CAPPED, LEFT, RIGHT, D, BLOCK_D, ROWS, INNER,
                )  # fmt: skip


def launch(query, key, value, tiles, block, scale, window_size, softcap):
    """Returns output [T, Hq, D] and lse [Hq, T], in base 2, as the backward needs it. ``tiles`` are both lists."""
    (T, Hq, _), Hkv = query.shape, key.shape[1]
    out, lse = results(query)
    if T == 0:
        return out, lse
    query, key, value = map(by_rows, (query, key, value))
    mask = Mask.of(scale, softcap, window_size, T)
    with on(query.device):
        options = sizes("forward", query, key, block, mask)
        _forward_kernel[(tiles.shape[1] * options["SPLIT"] * Hq,)](
            query, key, value, out, lse, tiles, T, Hq, Hq // Hkv,
            *(t.stride(0) for t in (query, key, value)), *(t.stride(1) for t in (query, key, value)),
            mask.slope, mask.cap, mask.left, mask.right, **options,
        )  # fmt: skip
    return out, lse


def results(query):
    """Allocate output and lse, of which every entry is written.

    The lse of fp32 tensors is fp64: see :func:`~.triton_shared.probabilities`. Half precision has no
    use for the digits.
    """
    T, Hq, D = query.shape
    dtype = torch.float64 if query.dtype == torch.float32 else torch.float32
    return query.new_empty(T, Hq, D), query.new_empty(Hq, T, dtype=dtype)
