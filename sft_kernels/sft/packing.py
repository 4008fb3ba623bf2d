"""Many examples in one row: best-fit-decreasing packing, and the batch that keeps them apart."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from .. import KeptTokens
from .masking import IGNORE


def pack(lengths, capacity):
    """Best-fit-decreasing bin packing: each length, longest first, into the fullest row that still has room.

    O(N log N): rows wait by their room, and a tree over the rooms finds the smallest one that suffices.

    Args:
        lengths: of the examples, each from 1 to ``capacity``.
        capacity: tokens in a row.

    Returns:
        The rows, each an int64 array of indices into ``lengths``. Equal lengths keep their order.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(bad := np.flatnonzero((lengths < 1) | (lengths > capacity))):
        raise ValueError(f"lengths: expected 1 to {capacity}, got {lengths[bad[0]]} at {bad[0]}")
    order = np.argsort(-lengths, kind="stable")
    row_of = np.empty(len(lengths), np.int64)  # of the lengths in this order
    waiting = [[] for _ in range(capacity + 1)]  # rows by their room
    rooms = _Occupied(capacity + 1)
    rows = at = 0
    for length, count in zip(*(x[::-1].tolist() for x in np.unique(lengths, return_counts=True)), strict=True):
        while count:
            room = rooms.first_from(length)
            if room is None:
                row, room = rows, capacity
                rows += 1
            else:
                row = waiting[room].pop()
                if not waiting[room]:
                    rooms.set(room, False)
            fitting = min(count, room // length)  # the row stays the fullest until another does not fit
            row_of[at : at + fitting] = row
            at, count, room = at + fitting, count - fitting, room - fitting * length
            if room:
                waiting[room].append(row)
                rooms.set(room, True)
    members = order[np.argsort(row_of, kind="stable")]
    ends = np.cumsum(np.bincount(row_of, minlength=rows)).tolist()
    return [members[start:end] for start, end in pairwise([0, *ends])]


class _Occupied:
    """A set of integers below ``size`` that finds its smallest member from a given one on, in O(log size)."""

    def __init__(self, size):
        self.leaves = 1 << (size - 1).bit_length()
        self.tree = [False] * (2 * self.leaves)  # node i has children 2i and 2i + 1

    def set(self, i, occupied):
        i += self.leaves
        self.tree[i] = occupied
        while i > 1:
            i //= 2
            self.tree[i] = self.tree[2 * i] or self.tree[2 * i + 1]

    def first_from(self, i):
        i += self.leaves
        if not self.tree[i]:
            while i > 1 and (i % 2 or not self.tree[i + 1]):  # up, until a right sibling holds something
                i //= 2
            if i <= 1:
                return None
            i += 1
            while i < self.leaves:
                i = 2 * i if self.tree[2 * i] else 2 * i + 1
        return i - self.leaves


def lengths_of(examples):
    """int64 tokens of each example."""
    known = getattr(examples, "lengths", None)  # of those that lie in files
    return np.array([len(e.input_ids) for e in examples] if known is None else known, np.int64)


class PackedRows(Sequence):
    """The rows of :func:`pack`, each a list of examples, which are taken from ``examples`` when the row is.

    Args:
        examples: a sequence.
        capacity: tokens in a row.
        order: the places in ``examples`` of those to pack, by default all.
    """

    def __init__(self, examples, capacity, order=None):
        self.examples = examples
        order = np.arange(len(examples)) if order is None else order
        self.rows = [order[row] for row in pack(lengths_of(examples)[order], capacity)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        rows = self.rows[i]
        if isinstance(i, slice):
            return [[self.examples[int(j)] for j in row] for row in rows]
        return [self.examples[int(j)] for j in rows]


def groups_of(size, items):
    """Yield ``items`` in lists of ``size``, the last one perhaps shorter."""
    for i in range(0, len(items), size):
        yield items[i : i + size]


class Batch(NamedTuple):
    """Packed rows laid end to end as one row of T tokens, block-diagonal by ``cu_seqlens``."""

    input_ids: torch.Tensor  # int64 [1, T]
    position_ids: torch.Tensor  # int64 [1, T], from 0 in every example, and in padding from 0 again and again
    cu_seqlens: torch.Tensor  # int32 [B + 1], one segment an example, one or more for each row's padding
    max_seqlen: int
    kept: KeptTokens  # shift=True
    token_weight: torch.Tensor | None  # fp32 [1, T]
    examples: int
    rows: int

    @property
    def tokens(self):
        return self.input_ids.numel()

    def to(self, device):
        moved = {
            name: t.to(device, non_blocking=True)
            for name, t in zip(self._fields, self, strict=True)
            if hasattr(t, "to")
        }
        return self._replace(**moved)


def collate(rows, capacity, pad_id, weigh_examples=False):
    """The :class:`Batch` of some rows, each a list of examples that fits ``capacity``.

    The rest of a row is segments of its own, so that padding neither sees nor is seen. They are no longer than the
    longest example: the model is known to have their positions, and their attention costs no more. No example predicts
    the next one's first token, since every first label is ignored.

    ``weigh_examples`` gives each kept token the weight 1 / (its example's kept tokens): with the number of examples as
    ``num_items`` every example weighs the same.
    """
    ids, labels, positions, weights, bounds = [], [], [], [], [0]
    longest = max((len(example.input_ids) for row in rows for example in row), default=capacity)
    for row in rows:
        used = 0
        for example in row:
            positions += range(len(example.input_ids))
            used += _segment(ids, labels, bounds, example.input_ids, example.labels)
            if weigh_examples:
                weights += [1 / example.kept] * len(example.input_ids)
        pad = capacity - used
        if pad < 0:
            raise ValueError(f"rows: {used} tokens in a row of {capacity}")
        for start in range(0, pad, longest):
            length = min(longest, pad - start)
            positions += range(length)
            _segment(ids, labels, bounds, [pad_id] * length, [IGNORE] * length)
        weights += [0.0] * pad if weigh_examples else []
    labels = torch.tensor([labels])
    return Batch(
        torch.tensor([ids]),
        torch.tensor([positions]),
        torch.tensor(bounds, dtype=torch.int32),
        max(end - start for start, end in pairwise(bounds)),
        KeptTokens.from_labels(labels, IGNORE, shift=True),
        torch.tensor([weights]) if weigh_examples else None,
        sum(map(len, rows)),
        len(rows),
    )


def _segment(ids, labels, bounds, segment_ids, segment_labels):
    ids += segment_ids
    labels += segment_labels
    bounds.append(len(ids))
    return len(segment_ids)
