"""``cross_entropy``: the masked loss over logits that already exist."""

from typing import NamedTuple

import torch
from torch.overrides import handle_torch_function, has_torch_function_unary

from ..._checks import check_floating
from ..._plain import autocast_on, mode_of_fakes, why_plain
from ..softmax_grad.api import Core
from ..softmax_grad.composed import composed_loss
from ..softmax_grad.options import LossOptions
from ..softmax_grad.reduction import (
    check_class_weight,
    check_labels,
    check_options,
    check_target,
    or_again,
    reduce_rows,
    row_scale,
    target_weight,
    unpack,
)
from ..softmax_grad.stats import coefficients


class _Options(NamedTuple):
    core: Core
    loss: LossOptions
    need_grad: bool
    reduce: bool
    return_stats: bool | str


class _CrossEntropy(torch.autograd.Function):
    """``losses = scale · loss`` of the rows that ``keep`` names, summed where ``reduce``; and their statistics.

    In fp32 and with a reduction, the forward makes the gradient in its one pass of exponentials, and the first backward
    multiplies it by the upstream scalar. In half precision that would be a second rounding, so the forward only reads
    the logits and the backward makes the gradient. A backward that finds no gradient computes its own, and so does one
    in which a gradient arrives through a statistic. Gradients of gradients repeat the loss in plain torch.
    """

    @staticmethod
    def forward(ctx, input, targets, scale, keep, outside, options):
        ctx.options, ctx.differentiable = options, 1
        per_token = options.return_stats == "tokens"
        early = options.reduce and options.need_grad and input.dtype.itemsize >= 4
        # In a compiler's trace every statistic has a gradient, if only zeros: that of the loss alone is of no use.
        early = early and not (per_token and torch.compiler.is_compiling())
        ctx.gradient = _empty_like(input) if early else None
        rows = options.core.softmax_grad(
            input,
            targets,
            options.loss,
            scale if early else None,
            keep=keep,
            out=ctx.gradient,
            **({"stats": True, "predict": True} if per_token else {"stats": options.return_stats}),
        )
        dropped = ~keep if options.return_stats else None
        out = reduce_rows(ctx, rows, options.loss, scale, dropped, options.reduce, options.return_stats, outside)
        lse, entropy = None if early and not per_token else rows.lse, out[3] if per_token else None
        ctx.save_for_backward(input, targets, scale, keep, outside, lse, entropy)
        return out

    @staticmethod
    def _again(ctx, input, targets, scale, keep, outside, lse, entropy):
        options = ctx.options
        logits, targets = input.masked_fill(~keep[:, None], 0), targets.clamp(0, input.shape[1] - 1)
        asked = options.return_stats == "tokens" and "tokens"
        out = composed_loss(None, logits, targets, None, scale, outside, ~keep, options.loss, options.reduce, asked)
        return out if asked else (out,)

    @staticmethod
    @or_again(_again)
    def backward(ctx, grad, *of_stats):
        options = ctx.options
        input, targets, scale, keep, outside, lse, entropy = ctx.saved_tensors
        gradient, ctx.gradient = ctx.gradient, None
        if options.return_stats == "tokens" and any(g is not None for g in of_stats):
            columns = coefficients(options.loss, scale, lse, entropy, grad, of_stats[:3], outside)
            gradient = _empty_like(input) if gradient is None else gradient
            options.core.softmax_grad(
                input, targets, options.loss, lse=lse, coefficients=columns, keep=keep, out=gradient
            )
        elif gradient is None:
            gradient = _empty_like(input)
            options.core.softmax_grad(input, targets, options.loss, scale * grad, lse=lse, keep=keep, out=gradient)
        else:
            options.core.scale_(gradient, grad)
        return gradient, None, None, None, None, None


def _empty_like(input):
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def cross_entropy(
    input,
    target,
    weight=None,
    *,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    num_items=None,
    token_weight=None,
    softcap=None,
    logit_scale=None,
    z_loss=0.0,
    dtype=None,
    return_stats=False,
    impl="auto",
):
    """``torch.nn.functional.cross_entropy``, reading only the rows that carry loss.

    With u = c · tanh(s x / c) of the logits x (c = ``softcap``, s = ``logit_scale``), a token's loss is::

        (1 − ε) (lse(u) − u_y) + ε (lse(u) − mean_v u_v) + ζ lse(u)²        ε = label_smoothing, ζ = z_loss

    Args:
        input: logits, ``[V]``, ``[N, V]`` or ``[N, V, d1, …]``, floating point. Never overwritten.
        target: class indices of the shape of ``input`` without V, or probabilities of the shape of ``input``.
        weight: ``[V]``, a factor for each class. Enters the mean's divisor, as in torch.
        ignore_index: the label that carries no loss; class indices only.
        reduction: ``"mean"`` over the kept tokens, ``"sum"``, or ``"none"``: of the shape of the labels, 0 where
            ignored. Probabilities are all kept.
        label_smoothing: in [0, 1].
        num_items: number or 0-d tensor that replaces the mean's divisor, so that micro-batches share one denominator.
        token_weight: floating point, of the shape of the labels; scales numerators only.
        softcap, logit_scale: positive, or None (Gemma 2's and Cohere's).
        z_loss: at least 0; the penalty is scaled as its token is.
        dtype: of the loss. None is that of ``input``, as torch returns it (fp32 under autocast). ``torch.float32``
            returns the loss of half-precision logits as it is summed, without a last rounding. It may also be the dtype
            of ``input``; every other is refused, for none of them changes what is computed.
        return_stats: True also returns :class:`LossStats`, detached, of u. ``"tokens"`` returns :class:`TokenStats`
            instead, of the shape of the labels, through which gradients flow. The label of a probability target is its
            most probable class.
        impl: ``"auto"`` or an implementation's name.

    Returns:
        The loss; or ``(loss, LossStats)``, or ``(loss, TokenStats)``. Nothing kept gives 0 and a zero gradient (torch:
        NaN).

    Works as torch's own does under ``torch.func`` and ``vmap``, with forward-mode derivatives, on meta and fake tensors
    and in ``torch.export``: in plain torch, masked rows computed too. So do gradients of gradients, whatever ``impl``.

    Counting the kept tokens of a GPU tensor syncs once. Probability targets, and class weights together with label
    smoothing, are torch's own code in fp32: two or three more copies of the logits.

    Raises:
        ValueError, TypeError: an argument of a wrong shape, dtype or device, or out of range, by name.
        IndexError: a label outside ``[0, V)`` on the CPU, or anywhere under ``SFT_KERNELS_CHECK=1`` (elsewhere the loss
            is NaN, and so are the token's logprob, lse and entropy).
    """
    # A tensor subclass that knows better, as torch's own functions ask. A mode would also say yes.
    if type(input) not in (torch.Tensor, torch.nn.Parameter) and has_torch_function_unary(input):
        return handle_torch_function(
            cross_entropy, (input,), input, target, weight,
            ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing, num_items=num_items,
            token_weight=token_weight, softcap=softcap, logit_scale=logit_scale, z_loss=z_loss, dtype=dtype,
            return_stats=return_stats, impl=impl,
        )  # fmt: skip
    check_floating("input", input)
    if input.dim() == 0 or input.shape[min(1, input.dim() - 1)] == 0:
        raise ValueError("input: expected logits of shape [V], [N, V] or [N, V, d1, …]")
    classes = min(1, input.dim() - 1)  # the dimension of the classes
    V = input.shape[classes]
    shape = input.shape[:classes] + input.shape[classes + 1 :]
    probabilities = check_target(target, shape, input.shape, input.device)
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an integer, got {ignore_index!r}")
    if probabilities and ignore_index != -100:
        raise ValueError("ignore_index: probabilities are all kept")
    check_options(reduction, return_stats, num_items, token_weight, shape, input.device)
    _check_dtype(dtype)
    if dtype not in (None, torch.float32, input.dtype):
        raise ValueError(
            f"dtype: expected None, torch.float32 or {input.dtype} as input, got {dtype}; a loss in another dtype takes"
            " logits in that dtype"
        )
    check_class_weight(weight, V, input.device)
    loss_options = LossOptions.checked(V, label_smoothing, softcap, logit_scale, z_loss)
    composed = probabilities or (weight is not None and bool(label_smoothing))
    plain = why_plain(input, target, weight, token_weight)
    core = Core.resolve(impl, input.device, input.dtype, loss_options, composed, return_stats, plain)

    with mode_of_fakes(plain, input):
        logits = input.movedim(classes, -1).reshape(-1, V)
        weights = None if token_weight is None else token_weight.reshape(-1)
        scalar = torch.float64 if input.dtype == torch.float64 else torch.float32
        rows, keep, outside, of_target = None, None, None, None
        if probabilities:
            targets = target.movedim(classes, -1).reshape(-1, V)
        else:
            labels = target.reshape(-1).long()
            keep = labels != ignore_index
            targets = labels * keep
            outside = check_labels(targets, V, plain)
            of_target = target_weight(weight, targets, outside, keep, scalar, plain)
        scale = row_scale(targets, scalar, reduction, num_items, weights, of_target, outside, keep, plain)
        reduce = reduction != "none"
        if composed or plain:
            if keep is not None and (
                plain or torch.compiler.is_compiling()
            ):  # no count is known: masked rows count too
                logits = logits.masked_fill(~keep[:, None], 0)
            elif keep is not None:
                rows, keep = keep.nonzero()[:, 0], None
                logits, targets, scale = logits[rows], targets[rows], scale[rows]
                outside = None if outside is None else outside[rows]
            dropped = None if keep is None else ~keep
            out = composed_loss(
                None if plain else core.softmax_grad,
                logits,
                targets,
                weight,
                scale,
                outside,
                dropped,
                loss_options,
                reduce,
                return_stats,
            )
        else:
            if of_target is not None:
                scale = scale * of_target
            need_grad = torch.is_grad_enabled() and input.requires_grad
            options = _Options(core, loss_options, need_grad, reduce, return_stats)
            out = _CrossEntropy.apply(
                logits, targets, scale, keep, outside if return_stats == "tokens" else None, options
            )
        loss, stats = unpack(out, rows, shape, reduction, return_stats)
        if dtype is None and not autocast_on(input.device):
            dtype = input.dtype
        loss = loss if dtype is None else loss.to(dtype)
    return (loss, stats) if return_stats else loss


def _check_dtype(dtype):
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype or None, got {type(dtype).__name__}")


class CrossEntropyLoss(torch.nn.Module):
    """:func:`cross_entropy` as a module, as ``torch.nn.CrossEntropyLoss``; ``weight`` is a buffer."""

    def __init__(
        self,
        weight=None,
        *,
        ignore_index=-100,
        reduction="mean",
        label_smoothing=0.0,
        softcap=None,
        logit_scale=None,
        z_loss=0.0,
        dtype=None,
        return_stats=False,
        impl="auto",
    ):
        super().__init__()
        check_options(reduction, return_stats)
        _check_dtype(dtype)
        LossOptions.checked(None, label_smoothing, softcap, logit_scale, z_loss)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.z_loss = z_loss
        self.dtype = dtype
        self.return_stats = return_stats
        self.impl = impl

    def forward(self, input, target, *, num_items=None, token_weight=None):
        """The loss of one batch, with the batch's own divisor and token weights."""
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            num_items=num_items,
            token_weight=token_weight,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            z_loss=self.z_loss,
            dtype=self.dtype,
            return_stats=self.return_stats,
            impl=self.impl,
        )

    def extra_repr(self):
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}"
