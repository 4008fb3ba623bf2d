"""The tokens that carry loss: which hidden rows, which labels."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data._utils.collate import default_collate_fn_map

from ..._checks import check_tensor
from ..._plain import values_of


class KeptTokens(NamedTuple):
    """The supervised tokens of a batch, found once where the labels are still on the host.

    Built by the collator on the CPU and moved with the batch, it spares ``linear_cross_entropy`` the one host sync that
    counting labels on a GPU costs. ``rows`` index the flattened hidden states, ``targets`` are their labels.

    ``torch.utils.data.default_collate`` makes one of several examples' (:meth:`collated`).
    """

    rows: torch.Tensor  # int64 [count], ascending; with a capacity [capacity], -1 behind the last
    targets: torch.Tensor  # int64, of the same shape; 0 behind the last
    count: int
    size: int  # number of labels, kept or not
    shift: int  # the hidden state at t carries the label at t + shift
    capacity: int | None = None

    @classmethod
    def from_labels(cls, labels, ignore_index=-100, shift=False, capacity=None):
        """The kept tokens of ``labels``, of shape ``[..., S]`` and an integer dtype.

        The hidden state at position t carries the label at t + ``shift`` of the same row, so the first ``shift`` labels
        of a row are never used. True is 1, False 0. On a GPU this waits for the device once, to learn the count.

        ``capacity`` makes ``rows`` and ``targets`` that long whatever the batch, and the number of kept tokens is then
        counted on the device: a step captured in a CUDA graph replays with the next batch copied into the same tensors.
        The products are paid for ``capacity`` tokens.

        Raises ``TypeError`` for labels of another dtype or without values, and for a ``shift`` that is no number,
        ``ValueError`` for one that is negative and where more tokens are kept than ``capacity``.
        """
        check_tensor("labels", labels)
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"labels: expected an integer dtype, got {labels.dtype}")
        if not isinstance(ignore_index, int):
            raise TypeError(f"ignore_index: expected an integer, got {ignore_index!r}")
        shift = number_of_tokens(shift)
        if not torch.compiler.is_compiling():
            values, batched = values_of(labels)
            if values is None or batched:
                raise TypeError(
                    "labels: the kept tokens of meta, fake and traced tensors and inside vmap cannot be counted;"
                    " hand labels as target to linear_cross_entropy instead"
                )
        carried = carried_labels(labels, ignore_index, shift)
        rows = (carried != ignore_index).nonzero()[:, 0]
        targets, count = carried[rows], rows.numel()
        if capacity is not None:
            if isinstance(capacity, bool) or not isinstance(capacity, int):
                raise TypeError(f"capacity: expected an integer or None, got {capacity!r}")
            if count > capacity:
                raise ValueError(f"capacity: {count} tokens are kept, got a capacity of {capacity}")
        return cls(*_padded(rows, targets, capacity), count, labels.numel(), shift, capacity)

    @classmethod
    def collated(cls, examples, *, collate_fn_map=None):
        """The kept tokens of a batch whose ``examples`` follow each other, their labels stacked as they are.

        Capacities add up; the padding of all examples stands behind the last kept token. ``collate_fn_map`` is torch's,
        and says nothing about tensors of tokens.

        Raises ``ValueError`` for examples of several shifts, or of which only some have a capacity.
        """
        shifts = sorted({example.shift for example in examples})
        if len(shifts) > 1:
            raise ValueError(f"shift: expected the same of all examples, got {shifts}")
        capacities = [example.capacity for example in examples]
        padded = [capacity is not None for capacity in capacities]
        if any(padded) and not all(padded):
            raise ValueError("capacity: expected one of all examples or of none, got both")
        before, rows, targets = 0, [], []
        for example in examples:
            kept = slice(None) if example.keep is None else example.keep
            rows.append(example.rows[kept] + before)
            targets.append(example.targets[kept])
            before += example.size
        rows, targets = torch.cat(rows), torch.cat(targets)
        count, capacity = rows.numel(), sum(capacities) if all(padded) else None
        return cls(*_padded(rows, targets, capacity), count, before, shifts[0], capacity)

    def to(self, device, non_blocking=False):
        """The same on ``device``."""
        rows, targets = (t.to(device, non_blocking=non_blocking) for t in self[:2])
        return self._replace(rows=rows, targets=targets)

    @property
    def keep(self):
        """Which of ``rows`` are kept, ``[capacity]`` bool; None without a capacity: all."""
        return None if self.capacity is None else self.rows >= 0


default_collate_fn_map[KeptTokens] = KeptTokens.collated


def _padded(rows, targets, capacity):
    """``(rows, targets)`` of length ``capacity``; as they are if that is None."""
    if capacity is None:
        return rows, targets
    return [F.pad(t, (0, capacity - t.numel()), value=value) for t, value in ((rows, -1), (targets, 0))]


def carried_labels(labels, ignore_index, shift):
    """The label of each hidden state, ``[N]`` int64: that at t + ``shift`` of the same row, or ``ignore_index``."""
    if shift and labels.dim() == 0:
        raise ValueError(f"shift={shift} needs labels with a sequence dimension, got a 0-d tensor")
    carried = labels = labels.long()
    if shift:
        # Not written into a tensor of ``ignore_index``: torch.func.linearize loses what is written into constants.
        carried = torch.constant_pad_nd(labels[..., shift:], (0, min(shift, labels.shape[-1])), ignore_index)
    return carried.reshape(-1)


def number_of_tokens(shift):
    """``shift`` as an integer of at least 0; raises ``TypeError`` or ``ValueError`` for anything else, by name."""
    if not isinstance(shift, int):
        raise TypeError(f"shift: expected True, False or a number of tokens, got {shift!r}")
    if shift < 0:
        raise ValueError(f"shift: expected a number of tokens of at least 0, got {shift}")
    return int(shift)
