"""The tokens that carry loss: which hidden rows, which labels."""

from typing import NamedTuple

import torch


class KeptTokens(NamedTuple):
    """The supervised tokens of a batch, found once where the labels are still on the host.

    Built by the collator on the CPU and moved with the batch, it spares ``linear_cross_entropy`` the one host sync that
    counting labels on a GPU costs. ``rows`` index the flattened hidden states, ``targets`` are their labels.
    """

    rows: torch.Tensor  # int64 [count], ascending
    targets: torch.Tensor  # int64 [count]
    count: int
    size: int  # number of labels, kept or not
    shift: bool  # the hidden state at t carries the label at t + 1

    @classmethod
    def from_labels(cls, labels, ignore_index=-100, shift=False):
        """The kept tokens of ``labels``, of shape ``[..., S]`` and an integer dtype.

        With ``shift=True`` the hidden state at position t carries the label at t + 1 of the same row, so the first
        label of a row is never used. On a GPU this waits for the device once, to learn the count.
        """
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise TypeError(f"labels: expected an integer dtype, got {labels.dtype}")
        if shift and labels.dim() == 0:
            raise ValueError("shift=True needs labels with a sequence dimension, got a 0-d tensor")
        carried = labels = labels.long()
        if shift:
            carried = torch.full_like(labels, ignore_index)
            carried[..., :-1] = labels[..., 1:]
        carried = carried.reshape(-1)
        rows = (carried != ignore_index).nonzero()[:, 0]
        return cls(rows, carried[rows], rows.numel(), labels.numel(), bool(shift))

    def to(self, device, non_blocking=False):
        """The same on ``device``."""
        rows, targets = (t.to(device, non_blocking=non_blocking) for t in self[:2])
        return self._replace(rows=rows, targets=targets)
