"""The core's statistics of each row of logits, which add up over slices of the vocabulary, and its arguments."""

from typing import NamedTuple

import torch


class RowStats(NamedTuple):
    """Per-row statistics of logits over a slice of the vocabulary, each ``[N]``; fp32 (fp64 for fp64 logits) but for
    ``lse``, ``mean_logit`` and ``sum_logit``, always fp64: what is taken from them is much smaller than they are; and
    for ``prediction``, int64.

    ``x`` is a logit after scale and cap (:class:`LossOptions`). Rows of two slices of the same vocabulary combine by
    :meth:`merge`; so do the shards of a vocabulary-parallel head.
    """

    lse: torch.Tensor  # log Σ_v exp x_v
    target_logit: torch.Tensor  # x_y, or -inf where the target lies outside the slice
    max_logit: torch.Tensor  # max_v x_v
    mean_logit: torch.Tensor | None = None  # Σ_v p_v x_v, on request
    sum_logit: torch.Tensor | None = None  # Σ_v x_v, where labels are smoothed
    prediction: torch.Tensor | None = None  # the smallest v that attains max_logit, on request

    def loss(self, options):
        """The loss of each row over the whole vocabulary, by :class:`LossOptions`."""
        if not (options.label_smoothing or options.z_loss):
            return self.nll
        loss = self.lse - self.target_logit
        if options.label_smoothing:
            uniform = self.lse - self.sum_logit / options.classes
            loss = (1 - options.label_smoothing) * loss + options.label_smoothing * uniform
        if options.z_loss:
            loss = loss + options.z_loss * self.lse.square()
        return loss.to(self.target_logit.dtype)

    @property
    def nll(self):
        return self._below_lse(self.target_logit)

    @property
    def logprob(self):
        """The logarithm of the target's probability, −nll."""
        return torch.sub(self.target_logit, self.lse, out=torch.empty_like(self.target_logit))

    @property
    def correct(self):
        """Whether the target attains the maximum (a tie counts)."""
        return self.target_logit >= self.max_logit

    @property
    def entropy(self):
        return self._below_lse(self.mean_logit)

    def _below_lse(self, logit):
        """``lse − logit``, taken in fp64 and rounded in the same launch."""
        return torch.sub(self.lse, logit, out=torch.empty_like(self.target_logit))

    def starting_at(self, column):
        """The same of a slice that starts at ``column`` of the vocabulary: a prediction is then one of its columns."""
        if self.prediction is None or column == 0:
            return self
        return self._replace(prediction=self.prediction + column)

    def merge(self, other):
        """The statistics of both slices together. A ``prediction`` counts columns of the whole vocabulary here."""
        lse = torch.logaddexp(self.lse, other.lse)
        mean = None
        if self.mean_logit is not None:
            mean = torch.addcmul(self._share(lse) * self.mean_logit, other._share(lse), other.mean_logit)
        return RowStats(
            lse,
            torch.maximum(self.target_logit, other.target_logit),
            torch.maximum(self.max_logit, other.max_logit),
            mean,
            None if self.sum_logit is None else self.sum_logit + other.sum_logit,
            None if self.prediction is None else self._prediction_beside(other),
        )

    def _prediction_beside(self, other):
        """The prediction of the slice with the larger ``max_logit``; the smaller column if they tie."""
        found = torch.minimum(self.prediction, other.prediction)
        found = self.prediction.where(self.max_logit > other.max_logit, found)
        return other.prediction.where(other.max_logit > self.max_logit, found)

    def _share(self, lse):
        """The slice's share of ``exp lse``: none if it is ruled out as a whole, even where all slices are."""
        return (self.lse - lse).exp_().masked_fill_(self.lse == float("-inf"), 0)

    @staticmethod
    def cat(parts):
        """The rows of several blocks, one after the other; ``parts`` is not empty. A single one is not copied."""
        if len(parts) == 1:
            return parts[0]
        return RowStats(*(None if field[0] is None else torch.cat(field) for field in zip(*parts, strict=True)))


class RowFactors(NamedTuple):
    """The parts of each row's gradient, ``[N]`` or ``[N, 4]``: the core's arguments of the same names."""

    scale: torch.Tensor | None = None
    coefficients: torch.Tensor | None = None
    lse: torch.Tensor | None = None

    @property
    def rows(self):
        """The number of rows."""
        return (self.coefficients if self.scale is None else self.scale).shape[0]

    def of(self, rows):
        """The core's arguments for some of the rows, a slice of them."""
        given = {}
        for name, t in zip(self._fields, self, strict=True):  # a comprehension's slice is a constant to a compiler
            if t is not None:
                given[name] = t[rows]
        return given
