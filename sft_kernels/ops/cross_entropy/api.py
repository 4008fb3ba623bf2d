"""``cross_entropy``: the masked loss over logits that already exist."""

from typing import Any, NamedTuple

import torch

from ..._backend import resolve
from ..softmax_grad.reduction import (
    check_labels,
    check_options,
    check_target,
    differentiable_once,
    hand_out,
    reduce_rows,
    row_scale,
    unpack,
)
from ..softmax_grad.rows import RowStats

_BLOCK_BYTES = 64 << 20  # of logits that are copied at a time


class _Options(NamedTuple):
    core: Any  # the implementation of softmax_grad
    need_grad: bool
    reduce: bool
    stats: bool


class _CrossEntropy(torch.autograd.Function):
    """``losses = scale · nll`` of the kept rows, summed where ``reduce``.

    With a reduction the gradient is ready at the end of the forward, but for the upstream scalar; the first backward
    hands it out, and another one computes its own.
    """

    @staticmethod
    def forward(ctx, input, rows, targets, scale, inside, options):
        ctx.options = options
        ready = options.reduce and options.need_grad
        stats, ctx.gradient = _walk(input, rows, targets, scale if ready else None, options)
        ctx.save_for_backward(input, rows, targets, scale)
        return reduce_rows(ctx, stats, scale, inside, options.reduce, options.stats)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad, *_):
        input, rows, targets, scale = ctx.saved_tensors
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            _, gradient = _walk(input, rows, targets, scale * grad, ctx.options._replace(stats=False))
        else:
            hand_out(gradient, grad)
        return gradient, None, None, None, None, None


def _walk(input, rows, targets, scale, options):
    """Row statistics and, given ``scale``, the gradient of the logits, a block of copied rows at a time."""
    K, V = rows.numel(), input.shape[1]
    block = max(1, _BLOCK_BYTES // (V * input.element_size()))
    dinput = None if scale is None else torch.zeros_like(input, memory_format=torch.contiguous_format)
    parts = []
    for i in range(0, max(K, 1), block):
        s = slice(i, i + block)
        x = input[rows[s]]  # a copy: the caller's logits are never overwritten
        parts.append(options.core(x, targets[s], None if scale is None else scale[s], stats=options.stats))
        if dinput is not None:
            dinput[rows[s]] = x
    return RowStats.cat(parts), dinput


def cross_entropy(
    input,
    target,
    *,
    ignore_index=-100,
    reduction="mean",
    num_items=None,
    token_weight=None,
    return_stats=False,
    impl="auto",
):
    """``torch.nn.functional.cross_entropy`` over class indices, reading only the rows that carry loss.

    Args:
        input: logits, ``[N, V]`` or ``[V]``, floating point. Never overwritten.
        target: class indices, ``[N]`` or 0-d.
        ignore_index: the label that carries no loss.
        reduction: ``"mean"`` over the kept tokens, ``"sum"``, or ``"none"``: of the shape of ``target``, 0 where
            ignored.
        num_items: number or 0-d tensor that replaces the mean's divisor, so that micro-batches share one denominator.
        token_weight: floating point, of the shape of ``target``; scales numerators only.
        return_stats: also return :class:`LossStats`, detached.
        impl: ``"auto"`` or an implementation's name.

    Returns:
        The loss in the dtype of ``input``, or ``(loss, LossStats)``. Nothing kept gives 0 and a zero gradient (torch:
        NaN). Differentiable once.

    Counting the kept tokens of a GPU tensor syncs once. Raises ``ValueError`` or ``TypeError`` naming the argument;
    ``IndexError`` for a label outside ``[0, V)`` on the CPU, or anywhere under ``SFT_KERNELS_CHECK=1`` (elsewhere the
    loss is NaN).
    """
    core = resolve("softmax_grad", impl)
    if not isinstance(input, torch.Tensor) or input.dim() not in (1, 2) or input.shape[-1] == 0:
        raise ValueError("input: expected logits of shape [N, V] or [V]")
    if not input.is_floating_point():
        raise TypeError(f"input: expected floating point, got {input.dtype}")
    shape = input.shape[:-1]
    if target.shape != shape:
        raise ValueError(f"target: expected shape {tuple(shape)}, got {tuple(target.shape)}")
    check_target(target, input.device)
    check_options(reduction, num_items, token_weight, shape, input.device)

    logits = input.reshape(-1, input.shape[-1])
    labels = target.reshape(-1).long()
    rows = (labels != ignore_index).nonzero()[:, 0]
    targets = labels[rows]
    inside = check_labels(targets, logits.shape[1])
    weight = None if token_weight is None else token_weight.reshape(-1)[rows]
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    scale = row_scale(rows.numel(), dtype, input.device, reduction, num_items, weight, inside)
    options = _Options(core, torch.is_grad_enabled() and input.requires_grad, reduction != "none", return_stats)
    out = _CrossEntropy.apply(logits, rows, targets, scale, inside, options)
    loss, stats = unpack(out, rows, shape, reduction, return_stats)
    if not torch.is_autocast_enabled(input.device.type):
        loss = loss.to(input.dtype)
    return (loss, stats) if return_stats else loss
