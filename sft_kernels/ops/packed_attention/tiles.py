"""Which rows of a packed row meet which: the list of the tiles that have work, longest first.

A tile is up to ``block`` adjacent rows of one segment. One program of a kernel takes one tile of queries (or of keys)
and one head, and goes over the keys (or queries) that these rows meet. So there are as many programs as there is work,
and as the hardware hands out programs in their order, the longest first, none is left running alone at the end
(Graham, "Bounds on multiprocessing timing anomalies", SIAM J. Appl. Math. 17, 1969).
"""

from typing import NamedTuple

import numpy as np
import torch

from ..._backend import checks_enabled
from ..._checks import check_tensor
from .segments import segment_lengths

BLOCK = 128


class AttentionTiles(NamedTuple):
    """The tiles of a packed row for ``packed_attention(..., tiles=)``: built once a batch, for all layers and passes.

    ``lists`` holds the same tiles twice, for the kernels that go by queries and for the one that goes by keys. Each row
    is ``(start, stop, first)``: the tile's rows are ``block`` of them from ``first`` on, or what is left of the segment
    ``[start, stop)``. A tile of no more than ``block / 2`` rows is small, and is computed at half the size. Rows behind
    the last segment are tiles too, with a ``start`` of -1: they get zeros. What is not needed of the lists is -1.

    Both lists are in the order of the work of causal attention without a window, the most first, equal work in the
    order of the rows. The order is a matter of speed: every option may be computed with the same tiles.
    """

    lists: torch.Tensor  # int32 [2, n, 3], n = total_tokens // block + B + 1
    total_tokens: int
    block: int = BLOCK

    @property
    def query(self):
        """The list of the tiles of queries, [n, 3]."""
        return self.lists[0]

    @property
    def key(self):
        """The list of the tiles of keys, [n, 3]."""
        return self.lists[1]

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens, total_tokens, *, device=None, block=BLOCK):
        """The tiles of the segments ``[cu_seqlens[i], cu_seqlens[i + 1])`` among ``total_tokens`` rows.

        A GPU makes them itself, in one launch, and nothing waits for it: boundaries from the host are sent there first.
        The lists' length depends on the number of segments and of tokens alone, so that a CUDA graph that builds them
        replays with other boundaries in the same tensor.

        Args:
            cu_seqlens: ``[B + 1]`` int32 or int64, starting at 0 and never decreasing; lengths of zero are allowed.
            total_tokens: rows of query, T, at least ``cu_seqlens[-1]``.
            device: of the lists, that of query; None means that of ``cu_seqlens``.
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
        if device is not None:
            cu_seqlens = cu_seqlens.to(device, non_blocking=cu_seqlens.device.type == "cpu")
        return cls(torch.ops.sft_kernels.attention_tiles.default(cu_seqlens, total_tokens, block), total_tokens, block)

    def to(self, device, non_blocking=False):
        """The same on ``device``, in one copy."""
        return self._replace(lists=self.lists.to(device, non_blocking=non_blocking))


def check_boundaries(cu_seqlens):
    """Raise for ``cu_seqlens`` of a shape or dtype that boundaries never have."""
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(f"cu_seqlens: expected shape [B + 1], got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected int32 or int64, got {cu_seqlens.dtype}")


# ---- the lists as an operator, so that torch.compile sees a schema; as NumPy makes them, and on a GPU Triton


def empty_lists(cu_seqlens, total_tokens, block):
    """The lists before anything is written, on the device of ``cu_seqlens``."""
    return cu_seqlens.new_empty((2, total_tokens // block + cu_seqlens.shape[0], 3), dtype=torch.int32)


def lists_by_numpy(cu_seqlens, total_tokens, block):
    """The lists of ``cu_seqlens`` on a CPU."""
    T, tail, half = total_tokens, len(cu_seqlens) - 1, block // 2
    edges = np.zeros(tail + 2, np.int64)
    edges[1:-1], edges[-1] = cu_seqlens.numpy()[1:].clip(0, T), T  # the last segment is the tail
    edges = np.maximum.accumulate(edges)

    count = -(-np.diff(edges) // block)
    segment = np.repeat(np.arange(tail + 1), count)
    start, stop = edges[segment], edges[segment + 1]
    first = start + block * (np.arange(len(segment)) - (count.cumsum() - count)[segment])
    last = np.minimum(first + block, stop)
    products = np.where(last - first > half, 2, 1)  # of `half` rows with as many, in a step

    found, live = empty_lists(cu_seqlens, T, block), len(segment) - count[tail]
    tiles = np.full(found.shape[1:], -1, np.int32)
    tiles[: len(segment)] = np.stack([np.where(segment < tail, start, -1), stop, first], 1)
    for tiles_of, met in zip(found.numpy(), (last - start, stop - first), strict=True):
        work = -(-met // half) * products
        tiles_of[:live] = tiles[np.argsort(-work[:live], kind="stable")]
        tiles_of[live:] = tiles[live:]
    return found


def lists_by_triton(cu_seqlens, total_tokens, block):
    """The lists of ``cu_seqlens`` on a GPU."""
    from .triton_tiles import launch

    return launch(cu_seqlens, total_tokens, block)


_library = torch.library.Library("sft_kernels", "FRAGMENT")
_library.define(
    "attention_tiles(Tensor cu_seqlens, SymInt total_tokens, int block) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("attention_tiles", lists_by_numpy, "CPU")
_library.impl("attention_tiles", lists_by_triton, "CUDA")
torch.library.register_fake("sft_kernels::attention_tiles", empty_lists, lib=_library)
