"""The tokens that carry loss: which hidden rows, which labels."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..._checks import check_tensor


class KeptTokens(NamedTuple):
    """The supervised tokens of a batch, found once where the labels are still on the host.

    Built by the collator on the CPU and moved with the batch, it spares ``linear_cross_entropy`` the one host sync that
    counting labels on a GPU costs. ``rows`` index the flattened hidden states, ``targets`` are their labels.
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

        Raises ``TypeError`` for labels of another dtype and for a ``shift`` that is no number, ``ValueError`` for one
        that is negative and where more tokens are kept than ``capacity``.
        """
        check_tensor("labels", labels)
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"labels: expected an integer dtype, got {labels.dtype}")
        if not isinstance(ignore_index, int):
            raise TypeError(f"ignore_index: expected an integer, got {ignore_index!r}")
        shift = number_of_tokens(shift)
        if shift and labels.dim() == 0:
            raise ValueError(f"shift={shift} needs labels with a sequence dimension, got a 0-d tensor")
        carried = labels = labels.long()
        if shift:
            carried = torch.full_like(labels, ignore_index)
            carried[..., : max(labels.shape[-1] - shift, 0)] = labels[..., shift:]
        carried = carried.reshape(-1)
        rows = (carried != ignore_index).nonzero()[:, 0]
        targets, count = carried[rows], rows.numel()
        if capacity is not None:
            if isinstance(capacity, bool) or not isinstance(capacity, int):
                raise TypeError(f"capacity: expected an integer or None, got {capacity!r}")
            if count > capacity:
                raise ValueError(f"capacity: {count} tokens are kept, got a capacity of {capacity}")
            rows, targets = (F.pad(t, (0, capacity - count), value=v) for t, v in ((rows, -1), (targets, 0)))
        return cls(rows, targets, count, labels.numel(), shift, capacity)

    def to(self, device, non_blocking=False):
        """The same on ``device``."""
        rows, targets = (t.to(device, non_blocking=non_blocking) for t in self[:2])
        return self._replace(rows=rows, targets=targets)

    @property
    def keep(self):
        """Which of ``rows`` are kept, ``[capacity]`` bool; None without a capacity: all."""
        return None if self.capacity is None else self.rows >= 0


def number_of_tokens(shift):
    """``shift`` as an integer of at least 0; raises ``TypeError`` or ``ValueError`` for anything else, by name."""
    if not isinstance(shift, int):
        raise TypeError(f"shift: expected True, False or a number of tokens, got {shift!r}")
    if shift < 0:
        raise ValueError(f"shift: expected a number of tokens of at least 0, got {shift}")
    return int(shift)
