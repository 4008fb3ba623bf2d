"""The reports of the losses beside their value: sums over a call, or one value for each token."""

from typing import NamedTuple

import torch

from ..._plain import is_transformed, masked


class LossStats(NamedTuple):
    """Sums over the kept tokens of one call, detached, on the device; reading none of them costs no sync.

    The sums of several calls add up; ``max_lse`` takes the maximum. Neither weights nor divisors enter.
    """

    kept: torch.Tensor  # int64 []
    nll_sum: torch.Tensor  # fp32 [], nats
    correct: torch.Tensor  # int64 [], tokens whose label attains the largest logit
    entropy_sum: torch.Tensor  # fp32 [], nats
    max_lse: torch.Tensor  # fp32 [], -inf where nothing is kept

    @classmethod
    def of(cls, rows, dropped):
        """The sums over the rows that ``dropped`` ``[N]`` does not name; None names none."""
        lse, nll, entropy, correct = rows.lse, rows.nll, rows.entropy, rows.correct
        if dropped is None:
            kept = torch.full((), lse.numel(), dtype=torch.int64, device=lse.device)
        else:
            kept = (~dropped).sum()
            lse = lse.masked_fill(dropped, float("-inf"))
            for each in (nll, entropy, correct):
                each.masked_fill_(dropped, 0)
        max_lse = lse.amax() if lse.numel() else lse.new_full((), float("-inf"))
        return cls(kept, nll.sum(), correct.sum(), entropy.sum(), max_lse.to(nll.dtype))

    @classmethod
    def composed(cls, u, labels, dropped):
        """The same in plain torch, detached, of scaled and capped logits ``u`` [N, V]."""
        u = u.detach()
        values = TokenStats.composed(u, labels, dropped, None)
        keep = torch.ones_like(labels, dtype=torch.bool) if dropped is None else ~dropped
        correct = keep & (u.gather(1, labels[:, None])[:, 0] >= u.amax(1))
        lse = values.lse.where(keep, float("-inf"))
        max_lse = lse.amax() if lse.numel() else lse.new_full((), float("-inf"))
        return cls(keep.sum(), -values.logprob.sum(), correct.sum(), values.entropy.sum(), max_lse)


class TokenStats(NamedTuple):
    """Values of each token, of the shape of the labels; of the scaled and capped logits, in nats.

    Gradients flow through ``logprob``, ``lse`` and ``entropy``, together with the loss or without it. Neither token
    weights, class weights, label smoothing, z-loss nor divisors enter. A token that carries no loss has zeros, and -1
    as its ``prediction``.
    """

    logprob: torch.Tensor  # fp32 (fp64 for fp64 inputs): the label's log-probability
    lse: torch.Tensor  # the same dtype: log Σ_v exp logit_v
    entropy: torch.Tensor  # the same dtype: −Σ_v p_v log p_v
    prediction: torch.Tensor  # int64: the class of the largest logit, the smallest of several

    @classmethod
    def of(cls, rows, dropped, outside):
        """The values of :class:`RowStats` over the whole vocabulary, ``[N]`` each.

        ``dropped`` and ``outside`` are masks ``[N]`` or None: the rows without loss, and those with an invalid label,
        of which all but the prediction is NaN.
        """
        return cls(rows.logprob, rows.lse.to(rows.target_logit.dtype), rows.entropy, rows.prediction).masked(
            dropped, outside
        )

    @classmethod
    def composed(cls, u, labels, dropped, outside):
        """The same under autograd, of scaled and capped logits ``u`` [N, V]."""
        log_p = u.log_softmax(1)
        impossible = log_p == float("-inf")  # contributes nothing to the entropy, nor to its gradient
        entropy = -(log_p.exp() * log_p.masked_fill(impossible, 0)).sum(1)
        logprob = log_p.gather(1, labels[:, None])[:, 0]
        return cls(logprob, u.logsumexp(1), entropy, u.detach().argmax(1)).masked(dropped, outside)

    def masked(self, dropped, outside):
        """These values, but zeros and -1 for the rows ``dropped``, NaN, also as gradients, for those ``outside``."""
        *values, prediction = self
        if outside is not None:
            unknown = masked(torch.ones_like(self.lse), outside, float("nan"), is_transformed())
            values = [value * unknown for value in values]
        if dropped is not None:
            values = [value.masked_fill(dropped, 0) for value in values]
            prediction = prediction.masked_fill(dropped, -1)
        return TokenStats(*values, prediction)


def coefficients(options, scale, lse, entropy, grad, of_stats, outside):
    """The gradient of a loss and of its :class:`TokenStats`, as the core takes it: ``[N, 4]``.

    With g the upstream gradients, and that of a row's loss times ``scale``, the columns are::

        A = g_loss (1 + 2 ζ lse) − g_logprob + g_lse − g_entropy · entropy
        B = g_logprob − g_loss (1 − ε)          C = g_entropy          E = g_loss ε / V

    Args:
        options: :class:`LossOptions`.
        scale: ``[N]``, the factor of each row's loss.
        lse, entropy: ``[N]``, of each row.
        grad: the upstream gradient of the loss, a scalar or ``[N]``; None for none.
        of_stats: those of ``logprob``, ``lse`` and ``entropy``, ``[N]`` each or None.
        outside: ``[N]``, or None: the rows with an invalid label, whose coefficients are NaN.
    """
    zero = torch.zeros_like(scale)
    of_loss = zero if grad is None else scale * grad
    of_logprob, of_lse, of_entropy = (zero if g is None else g for g in of_stats)
    by_p = of_loss - of_logprob  # as B, so that the sum of both is exactly 0 where nothing else enters
    if options.z_loss:
        by_p = by_p + of_loss * (2 * options.z_loss * lse)
    if of_stats[1] is not None:
        by_p = by_p + of_lse
    if of_stats[2] is not None:
        by_p = by_p - of_entropy * entropy
    at_target = of_logprob - (1 - options.label_smoothing) * of_loss
    uniform = of_loss * (options.label_smoothing / options.classes)
    out = torch.stack([by_p.to(scale.dtype), at_target, of_entropy, uniform], 1)
    return out if outside is None else out.masked_fill_(outside[:, None], float("nan"))
