"""What the losses on the core share: checks of labels, the scale of each row, statistics of a batch."""

import functools
from typing import NamedTuple

import torch

from ..._backend import checks_enabled

_REDUCTIONS = ("mean", "sum", "none")


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
    def of(cls, rows):
        kept = torch.full((), rows.lse.numel(), dtype=torch.int64, device=rows.lse.device)
        lse = rows.lse.to(rows.target_logit.dtype)
        lowest = lse.new_full((1,), float("-inf"))
        return cls(kept, rows.nll.sum(), rows.correct.sum(), rows.entropy.sum(), torch.cat([lse, lowest]).amax())


def check_options(reduction, num_items, token_weight, target_shape, device):
    """Raise for a reduction, divisor or token weight that means nothing."""
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: expected one of {_REDUCTIONS}, got {reduction!r}")
    if num_items is not None:
        if reduction != "mean":
            raise ValueError(f"num_items replaces the divisor of reduction='mean'; got reduction={reduction!r}")
        if isinstance(num_items, torch.Tensor):
            if num_items.dim() != 0:
                raise ValueError(f"num_items: expected a number or a 0-d tensor, got shape {tuple(num_items.shape)}")
        elif not num_items >= 0:
            raise ValueError(f"num_items: expected a count, got {num_items}")
    if token_weight is not None:
        if token_weight.shape != target_shape:
            raise ValueError(
                f"token_weight: expected the shape of target {tuple(target_shape)}, got {tuple(token_weight.shape)}"
            )
        if not token_weight.is_floating_point():
            raise TypeError(f"token_weight: expected floating point, got {token_weight.dtype}")
        if token_weight.device != device:
            raise ValueError(f"token_weight: expected device {device} as input, got {token_weight.device}")
        if token_weight.requires_grad:
            raise ValueError("token_weight is a constant of the loss: detach it")


def check_target(target, device):
    """Raise for labels of a wrong dtype or on another device."""
    if target.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise TypeError(f"target: expected class indices (int64), got {target.dtype}")
    if target.device != device:
        raise ValueError(f"target: expected device {device} as input, got {target.device}")


def check_labels(targets, V):
    """Whether each kept label lies in ``[0, V)``; None where all are known to.

    On the CPU, and elsewhere under ``SFT_KERNELS_CHECK=1``, a label outside raises ``IndexError``. A GPU is not asked:
    the answer is a mask on the device, and the losses of the labels outside become NaN.
    """
    inside = (targets >= 0) & (targets < V)
    if not checks_enabled(targets.device):
        return inside
    if not inside.all():
        position = int((~inside).nonzero()[0])
        raise IndexError(f"target: label {int(targets[position])} of kept token {position} is outside [0, {V})")
    return None


def row_scale(count, dtype, device, reduction, num_items, weight, inside):
    """``[count]`` factors that the kept tokens' losses enter with: token weight over divisor.

    ``weight`` is the kept tokens' weight or None, ``inside`` a mask of valid labels or None. The divisor of the mean is
    the number of kept tokens, or ``num_items``; a divisor of zero counts as one, so that nothing kept gives a loss of
    0.
    """
    scale = torch.ones(count, dtype=dtype, device=device) if weight is None else weight.to(device, dtype)
    if reduction == "mean":
        if isinstance(num_items, torch.Tensor):
            divisor = num_items.detach().to(device, dtype)
            scale = scale / divisor.where(divisor != 0, 1)
        else:
            scale = scale / ((count if num_items is None else num_items) or 1)
    return scale if inside is None else scale.where(inside, float("nan"))


def reduce_rows(ctx, rows, scale, inside, reduce, want_stats):
    """The forward's result: ``scale · nll``, summed where ``reduce``, and the fields of :class:`LossStats` where
    wanted."""
    nll = rows.nll if inside is None else rows.nll.where(inside, float("nan"))
    loss = scale * nll
    loss = loss.sum() if reduce else loss
    if not want_stats:
        return loss
    stats = LossStats.of(rows)
    ctx.mark_non_differentiable(*stats)
    return loss, *stats


def differentiable_once(backward):
    """A backward that raises under ``create_graph=True``, where torch's decorator would give a silent constant."""

    @functools.wraps(backward)
    def checked(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError("this loss is differentiable once: its backward has no graph (create_graph=True)")
        return backward(ctx, *grads)

    return checked


def hand_out(gradient, grad):
    """A gradient that was computed for an upstream gradient of 1, in place times ``grad`` (0-d); None stays None.

    That it is 1 is looked up on the CPU; a GPU is not asked.
    """
    if gradient is not None and not (grad.device.type == "cpu" and bool(grad == 1)):
        gradient.mul_(grad)
    return gradient


def unpack(out, rows, shape, reduction, return_stats):
    """What the user gets: the kept tokens' losses put back in their places, the statistics in their tuple."""
    loss, *stats = out if return_stats else (out,)
    if reduction == "none":
        loss = loss.new_zeros(shape.numel()).index_copy(0, rows, loss).reshape(shape)
    return loss, LossStats(*stats) if return_stats else None
