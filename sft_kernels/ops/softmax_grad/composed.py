"""The losses in plain PyTorch under autograd: the logits at hand, a copy in fp32, their gradients.

They serve what the core does not support: probability targets, class weights together with label smoothing, heads with
more dimensions than classes, transforms of ``torch.func``, tensors without values, and gradients of gradients.
"""

import torch

from ..._plain import without_autocast
from .options import LossOptions
from .stats import LossStats, TokenStats

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # as torch's operators count them


def torch_cross_entropy(input, target, weight=None, *, reduction="mean", label_smoothing=0.0):
    """``torch.nn.functional.cross_entropy`` with an ``ignore_index`` of -100.

    It is torch's operator: ours may have taken the function's name, which a compiler looks up too.
    """
    return torch.ops.aten.cross_entropy_loss(input, target, weight, _REDUCTIONS[reduction], -100, label_smoothing)


def composed_loss(softmax_grad, logits, target, weight, scale, outside, dropped, options, reduce, return_stats):
    """The loss, and the fields of :class:`LossStats` or :class:`TokenStats` where wanted, of ``logits`` [K, V].

    ``target`` [K] class indices or [K, V] probabilities, through which gradients flow as in torch; ``weight`` [V] or
    None, ``scale`` [K], ``outside`` a mask of invalid labels or None, ``dropped`` one of the rows without loss or None.
    Differentiable as often as torch's own. ``softmax_grad`` makes the sums of :class:`LossStats`; None makes them of
    torch's operators, so that transforms of ``torch.func`` hold.
    """
    with without_autocast(logits.device):
        dtype = scale.dtype
        u = options.shape(logits.to(dtype))
        if target.dim() == 2:
            target = target.to(dtype)
            labels = target.detach().argmax(1)
        else:
            target = labels = target if outside is None else target.masked_fill(outside, 0)
        if weight is not None:
            weight = weight.to(dtype)
        losses = torch_cross_entropy(u, target, weight, reduction="none", label_smoothing=options.label_smoothing)
        if options.z_loss:
            penalty = options.z_loss * u.logsumexp(1).square()
            if weight is not None:
                penalty = penalty * (target @ weight if target.dim() == 2 else weight[target])
            losses = losses + penalty
        stats = TokenStats.composed(u, labels, dropped, outside) if return_stats == "tokens" else ()
    loss = scale * losses
    loss = loss.sum() if reduce else loss
    if return_stats is not True:
        return (loss, *stats) if return_stats else loss
    if softmax_grad is None:
        return loss, *LossStats.composed(u, labels, dropped)
    return loss, *LossStats.of(softmax_grad(u.detach(), labels, LossOptions(u.shape[1]), stats=True), dropped)
