"""Which rows of a packed row meet which: the list of the tiles that have work, longest first.

A tile is up to ``block`` adjacent rows of one segment. One program of a kernel takes one tile of queries (or of keys)
and one head, and goes over the keys (or queries) that these rows meet. So there are as many programs as there is work,
and as the hardware hands out programs in their order, the longest first, none is left running alone at the end
(Graham, "Bounds on multiprocessing timing anomalies", SIAM J. Appl. Math. 17, 1969).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..._backend import checks_enabled
from ..._checks import check_tensor
from .segments import segment_lengths

BLOCK = 128


class AttentionTiles(NamedTuple):
    """The tiles of a packed row for ``packed_attention(..., tiles=)``: built once a batch, for all layers and passes.

    Each row of ``query`` and ``key`` is ``(start, stop, first)``: the tile's rows are ``block`` of them from ``first``
    on, or what is left of the segment ``[start, stop)``. A tile of no more than ``block / 2`` rows is small, and is
    computed at half the size. Rows behind the last segment are tiles too, with a ``start`` of -1: they get zeros. What
    is not needed of the lists is -1.

    Both lists are in the order of the work of causal attention without a window, the most first, equal work in the
    order of the rows. The order is a matter of speed: every option may be computed with the same tiles.
    """

    query: torch.Tensor  # int32 [n, 3], n = total_tokens // block + B + 1
    key: torch.Tensor  # int32 [n, 3]
    total_tokens: int
    block: int = BLOCK

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens, total_tokens, *, block=BLOCK):
        """The tiles of the segments ``[cu_seqlens[i], cu_seqlens[i + 1])`` among ``total_tokens`` rows.

        On the device of ``cu_seqlens`` and without waiting for it. The lists' length depends on the number of segments
        and of tokens alone, so that a CUDA graph that builds them replays with other boundaries in the same tensor.

        Args:
            cu_seqlens: ``[B + 1]`` int32 or int64, starting at 0 and never decreasing; lengths of zero are allowed.
            total_tokens: rows of query, T, at least ``cu_seqlens[-1]``.
            block: rows of a tile, a power of two from 32 to 128. Less than 128 is of use to tests alone.

        Raises:
            ValueError, TypeError: an argument of a wrong shape, dtype or range, by name. Boundaries on a GPU are read
                only under ``SFT_KERNELS_CHECK=1``; else they are forced into the row, so that wrong ones give wrong
                numbers but touch nothing outside.
        """
        check_boundaries(cu_seqlens)
        if isinstance(total_tokens, bool) or not isinstance(total_tokens, int) or not 0 <= total_tokens < 2**31:
            raise ValueError(f"total_tokens: expected an integer from 0 to 2³¹ − 1, got {total_tokens!r}")
        if block not in (32, 64, 128):
            raise ValueError(f"block: expected 32, 64 or 128, got {block!r}")
        if checks_enabled(cu_seqlens.device):
            segment_lengths(cu_seqlens, total_tokens, None)
        T, half = total_tokens, block // 2
        inner = cu_seqlens[1:].clamp(0, T)
        inner = inner.cummax(0).values if inner.numel() else inner
        edges = F.pad(F.pad(inner, (1, 0)), (0, 1), value=T)  # the last segment is the tail
        tail = edges.numel() - 2

        count = (edges.diff() + block - 1) // block
        until = count.cumsum(0)
        at = torch.arange(T // block + tail + 1, device=edges.device)
        segment = torch.searchsorted(until, at, right=True)
        live = segment <= tail
        segment = segment.clamp(max=tail)
        start, stop = edges[segment], edges[segment + 1]
        first = start + block * (at - until[segment] + count[segment])
        last = torch.minimum(first + block, stop)
        products = torch.where(last - first > half, 2, 1)  # of `half` rows with as many, in a step
        tiles = torch.stack([start.where(segment < tail, -1), stop, first], 1).where(live[:, None], -1).int()

        def longest_first(met):
            work = ((met + half - 1) // half * products).where(segment < tail, 0).where(live, -1)
            return tiles[work.sort(stable=True, descending=True).indices]

        return cls(longest_first(last - start), longest_first(stop - first), T, block)

    def to(self, device, non_blocking=False):
        """The same on ``device``."""
        query, key = (t.to(device, non_blocking=non_blocking) for t in (self.query, self.key))
        return self._replace(query=query, key=key)


def check_boundaries(cu_seqlens):
    """Raise for ``cu_seqlens`` of a shape or dtype that boundaries never have."""
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(f"cu_seqlens: expected shape [B + 1], got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected int32 or int64, got {cu_seqlens.dtype}")
