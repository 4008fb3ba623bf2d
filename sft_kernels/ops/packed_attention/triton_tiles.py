"""The lists of :class:`~.tiles.AttentionTiles` in one launch, in the order that :func:`~.tiles.lists_by_numpy` gives.

A program takes some of the tiles in the order of the rows. It goes over the segments twice: to find the segment of each
tile, and to count the tiles that come before it in either list, which is its place there. Nothing is sorted, and no
program waits for another.

Work is counted in halves of a tile. A segment of h halves, the last of which may be short, has h // 2 whole tiles, and
a small one if h is odd. A step past one half makes two products for a whole tile, one for a small one. So the work of
causal attention is 4 (k + 1) for the queries of the k-th whole tile and h for those of the small one, 2 (h − 2 k) and 1
for the keys. How many tiles of a segment have more work than a given one follows from h alone.
"""

import triton
import triton.language as tl

from ..._triton import on
from .tiles import empty_lists

TILES, SEGMENTS = 32, 64


@triton.jit
def _segments(cu_seqlens, at, edge, T, tail, SEGMENTS: tl.constexpr):
    """Numbers of the segments from ``at`` on, and where they start and stop, none before another nor behind T.

    ``edge`` is where the segment before ``at`` stops. Segment ``tail`` is what is behind the last boundary, and those
    after it are empty.
    """
    o = tl.arange(0, SEGMENTS)
    s = at + o
    start = tl.load(cu_seqlens + s, mask=(s > 0) & (s <= tail), other=tl.where(s > 0, T, 0))
    start = tl.maximum(tl.minimum(start, T), edge).to(tl.int32)
    start = tl.max(tl.where(o[None, :] <= o[:, None], start[None, :], 0), 1)  # of this one and those before it
    stop = tl.load(cu_seqlens + s + 1, mask=s < tail, other=T)
    stop = tl.maximum(tl.minimum(stop, T), start).to(tl.int32)
    return s, start, stop


@triton.jit
def _pieces(length, SIZE: tl.constexpr):
    """length / SIZE, rounded up; 2³¹ − 1 does not overflow."""
    return length // SIZE + (length % SIZE > 0).to(tl.int32)


@triton.jit
def _place(tiles, place, start, stop, first, mask):
    tl.store(tiles + place * 3, start, mask=mask)
    tl.store(tiles + place * 3 + 1, stop, mask=mask)
    tl.store(tiles + place * 3 + 2, first, mask=mask)


@triton.jit(
    do_not_specialize=["T", "tail", "n"],
    do_not_specialize_on_alignment=["cu_seqlens", "lists"],
)
def _tiles_kernel(
    cu_seqlens,  # [B + 1] int32 or int64
    lists,  # [2, n, 3] int32
    T,
    tail,  # B, the number of the segment behind the last boundary
    n,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    t = tl.program_id(0) * TILES + tl.arange(0, TILES)

    # The segment of each tile, where it starts and stops, and how many tiles are before it.
    segment = tl.zeros([TILES], tl.int32)
    start = tl.zeros([TILES], tl.int32)
    stop = tl.zeros([TILES], tl.int32) + T
    before = tl.zeros([TILES], tl.int32)
    edge, passed = 0, 0
    for at in range(0, tail + 1, SEGMENTS):
        _, s_start, s_stop = _segments(cu_seqlens, at, edge, T, tail, SEGMENTS)
        count = _pieces(s_stop - s_start, BLOCK)
        until = passed + tl.cumsum(count, 0)
        over = until[None, :] <= t[:, None]  # [TILES, SEGMENTS]
        segment += tl.sum(over.to(tl.int32), 1)
        start = tl.maximum(start, tl.max(tl.where(over, s_stop[None, :], 0), 1))
        stop = tl.minimum(stop, tl.min(tl.where(over, T, s_stop[None, :]), 1))
        before = tl.maximum(before, tl.max(tl.where(over, until[None, :], 0), 1))
        edge = tl.max(s_stop, 0)
        passed += tl.sum(count, 0)

    k = t - before
    halves = _pieces(stop - start, BLOCK // 2)
    whole = k < halves // 2
    query_work = tl.where(whole, 4 * (k + 1), halves)
    key_work = tl.where(whole, 2 * (halves - 2 * k), 1)

    # How many tiles have more work, or as much and come before.
    query_place = tl.zeros([TILES], tl.int32)
    key_place = tl.zeros([TILES], tl.int32)
    edge = 0
    for at in range(0, tail, SEGMENTS):
        s, s_start, s_stop = _segments(cu_seqlens, at, edge, T, tail, SEGMENTS)
        h = tl.where(s < tail, _pieces(s_stop - s_start, BLOCK // 2), 0)[None, :]
        earlier = (s[None, :] < segment[:, None]).to(tl.int32)  # [TILES, SEGMENTS]
        least = query_work[:, None] - earlier  # counted is what has more
        found = tl.maximum(h // 2 - least // 4, 0) + ((h % 2 > 0) & (h > least)).to(tl.int32)
        query_place += tl.sum(found, 1)
        least = key_work[:, None] - earlier
        found = tl.minimum(tl.maximum(h - least // 2 + 1, 0) // 2, h // 2) + ((h % 2 > 0) & (least == 0)).to(tl.int32)
        key_place += tl.sum(found, 1)
        edge = tl.max(s_stop, 0)

    # The tail and what is not needed stay in the order of the rows, behind all segments.
    inside, live = segment < tail, segment <= tail
    first = tl.where(live, start + BLOCK * k, -1)
    start = tl.where(inside, start, -1)
    stop = tl.where(live, stop, -1)
    _place(lists, tl.where(inside, query_place, t), start, stop, first, t < n)
    _place(lists + n * 3, tl.where(inside, key_place, t), start, stop, first, t < n)


def launch(cu_seqlens, total_tokens, block):
    """Returns the lists [2, n, 3] of ``cu_seqlens``, on its device."""
    cu_seqlens = cu_seqlens.contiguous()
    lists = empty_lists(cu_seqlens, total_tokens, block)
    n = lists.shape[1]
    with on(cu_seqlens.device):
        _tiles_kernel[(-(-n // TILES),)](
            cu_seqlens, lists, total_tokens, cu_seqlens.shape[0] - 1, n, block, TILES, SEGMENTS
        )
    return lists
