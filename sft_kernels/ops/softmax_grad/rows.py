"""What the core says of each row of logits, in a form that adds up over slices of the vocabulary."""

from typing import NamedTuple

import torch


class RowStats(NamedTuple):
    """Per-row statistics of logits over a slice of the vocabulary, each ``[N]``; fp32 (fp64 for fp64 logits) but for
    ``lse``, ``mean_logit`` and ``sum_logit``, always fp64: what is taken from them is much smaller than they are.

    ``x`` is a logit after scale and cap (:class:`LossOptions`). Rows of two slices of the same vocabulary combine by
    :meth:`merge`; so do the shards of a vocabulary-parallel head.
    """

    lse: torch.Tensor  # log Σ_v exp x_v
    target_logit: torch.Tensor  # x_y, or -inf where the target lies outside the slice
    max_logit: torch.Tensor  # max_v x_v
    mean_logit: torch.Tensor | None = None  # Σ_v p_v x_v, on request
    sum_logit: torch.Tensor | None = None  # Σ_v x_v, where labels are smoothed

    def loss(self, options):
        """The loss of each row over the whole vocabulary, by :class:`LossOptions`."""
        loss = self.lse - self.target_logit
        if options.label_smoothing:
            uniform = self.lse - self.sum_logit / options.classes
            loss = (1 - options.label_smoothing) * loss + options.label_smoothing * uniform
        if options.z_loss:
            loss = loss + options.z_loss * self.lse.square()
        return loss.to(self.target_logit.dtype)

    @property
    def nll(self):
        return (self.lse - self.target_logit).to(self.target_logit.dtype)

    @property
    def correct(self):
        """Whether the target attains the maximum (a tie counts)."""
        return self.target_logit >= self.max_logit

    @property
    def entropy(self):
        return (self.lse - self.mean_logit).to(self.target_logit.dtype)

    def merge(self, other):
        """The statistics of both slices together."""
        lse = torch.logaddexp(self.lse, other.lse)
        mean = None
        if self.mean_logit is not None:
            # A slice that is ruled out as a whole has no share, also where both are.
            shares = ((part.lse - lse).exp().where(part.lse > float("-inf"), 0) for part in (self, other))
            mean = sum(share * part.mean_logit for share, part in zip(shares, (self, other), strict=True))
        return RowStats(
            lse,
            torch.maximum(self.target_logit, other.target_logit),
            torch.maximum(self.max_logit, other.max_logit),
            mean,
            None if self.sum_logit is None else self.sum_logit + other.sum_logit,
        )

    @staticmethod
    def cat(parts):
        """The rows of several blocks, one after the other; ``parts`` is not empty."""
        return RowStats(*(None if field[0] is None else torch.cat(field) for field in zip(*parts, strict=True)))
