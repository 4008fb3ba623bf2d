"""``linear_cross_entropy``: the masked loss of a language model's head, without its logits."""

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
from . import matmul, tokens, vocab
from .kept import KeptTokens
from .plan import Plan, make_plan


class _Options(NamedTuple):
    core: Any  # the implementation of softmax_grad
    plan: Plan
    dtype: torch.dtype  # of the products
    need_dx: bool
    need_dw: bool
    reduce: bool
    stats: bool


class _LinearCrossEntropy(torch.autograd.Function):
    """``losses = scale · nll`` of the kept rows, summed where ``reduce``.

    With the token loop and a reduction, the gradients are ready at the end of the forward, but for the upstream scalar.
    The first backward hands them out and forgets them; should another follow (``retain_graph``), it computes its own,
    so no gradient is ever shared between two callers. Without a reduction, or with the vocabulary loop, backward
    recomputes.
    """

    @staticmethod
    def forward(ctx, hidden, weight, rows, targets, scale, inside, options):
        x = _gather(hidden, rows, options.dtype)
        ctx.options = options
        ctx.gradients = None
        common = (options.core, x, weight, targets)
        if options.plan.loop == "vocab":
            stats = vocab.loss(*common, options.plan.chunk, options.stats)
        elif options.reduce and (options.need_dx or options.need_dw):
            stats, ctx.back, *ctx.gradients = _token_gradients(*common, scale, options)
        else:
            stats = tokens.loss(*common, options.plan.chunk, options.stats)
        ctx.save_for_backward(hidden, weight, rows, targets, scale, stats.lse)
        return reduce_rows(ctx, stats, scale, inside, options.reduce, options.stats)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad, *_):
        options = ctx.options
        hidden, weight, rows, targets, scale, lse = ctx.saved_tensors
        if ctx.gradients is not None:
            factor = grad if ctx.back is None else grad * ctx.back
            dx, dw = (hand_out(gradient, factor) for gradient in ctx.gradients)
            ctx.gradients = None
        else:
            x = _gather(hidden, rows, options.dtype)
            scale = scale * grad
            with _plain_products(grad.device):
                if options.plan.loop == "vocab":
                    back, dx, dw = _vocab_gradients(options.core, x, weight, targets, scale, lse, options)
                else:
                    plain = options._replace(stats=False)
                    _, back, dx, dw = _token_gradients(options.core, x, weight, targets, scale, plain)
            if back is not None:
                dx, dw = (hand_out(gradient, back) for gradient in (dx, dw))
        dhidden = None
        if options.need_dx:
            if dx.shape == hidden.shape and dx.dtype == hidden.dtype:
                dhidden = dx
            else:
                dhidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
                dhidden[rows] = dx.to(hidden.dtype)
        return dhidden, dw, None, None, None, None, None


def _gather(hidden, rows, dtype):
    """The kept rows, ``[K, D]``; where all are kept, the hidden states themselves."""
    return (hidden if rows.numel() == hidden.shape[0] else hidden[rows]).to(dtype)


def _plain_products(device):
    """No autocast inside: the op has chosen its dtype, and casting again would round the weight a second time."""
    return torch.autocast(device.type, enabled=False)


def _token_gradients(core, x, weight, targets, scale, options):
    back, scale = _hold_back(scale, x.dtype, weight.dtype)
    stats, dx, dw = tokens.loss_and_gradients(
        core, x, weight, targets, scale, options.plan.chunk, options.need_dx, options.need_dw, options.stats
    )
    return stats, back, dx, dw


def _vocab_gradients(core, x, weight, targets, scale, lse, options):
    back, scale = _hold_back(scale, x.dtype, weight.dtype)
    dx, dw = vocab.gradients(core, x, weight, targets, scale, lse, options.plan.chunk, options.need_dx, options.need_dw)
    return back, dx, dw


def _hold_back(scale, *dtypes):
    """In fp16 a power of two is kept out of the scale until the upstream gradient is known.

    What stays is about 1 / K, as in the mean: so large that ``dlogits`` does not fall below fp16's range, no larger,
    as the weight's gradient sums K rows of it.
    """
    if torch.float16 not in dtypes or scale.numel() == 0:
        return None, scale
    largest = scale.abs().amax() * scale.numel()
    back = torch.exp2(torch.floor(torch.log2(largest))).where(largest > 0, 1)
    return back, scale / back


def linear_cross_entropy(
    input,
    linear_weight,
    target=None,
    *,
    reduction="mean",
    ignore_index=None,
    num_items=None,
    token_weight=None,
    shift=False,
    kept=None,
    chunking="auto",
    max_logits_bytes=None,
    return_stats=False,
    impl="auto",
):
    """Cross-entropy of ``input @ linear_weight.T`` against ``target``, paying only for the tokens that are kept.

    Replaces ``F.cross_entropy(F.linear(input, linear_weight), target)``: rows whose label is ``ignore_index`` are
    dropped before the product, and the logits exist a chunk at a time.

    Args:
        input: hidden states, ``[..., D]``, floating point.
        linear_weight: the head, ``[V, D]``, of the same dtype (any floating dtype under autocast).
        target: class indices, of the shape of ``input`` without its last dimension. May be left out where ``kept`` is
            given.
        reduction: ``"mean"`` over the kept tokens, ``"sum"``, or ``"none"``: fp32 of the shape of ``target``, 0 where
            ignored.
        ignore_index: the label that carries no loss; None means -100.
        num_items: number or 0-d tensor that replaces the mean's divisor, so that micro-batches share one denominator.
            Where an engine averages gradients over ranks (DDP, FSDP), pass the global number of kept tokens over the
            world size.
        token_weight: floating point, of the shape of ``target`` and aligned with it; scales numerators only.
        shift: the hidden state at t predicts the label at t + 1 (last dimension of ``target``). Pass labels as they
            are: nothing else may shift them. The loss of ``reduction="none"`` stands at t.
        kept: :class:`KeptTokens` of ``target``. Without it, counting the kept tokens of a GPU tensor syncs once.
        chunking: ``"tokens"`` computes gradients in the forward (three products), ``"vocab"`` walks the vocabulary and
            recomputes (four products, bounded memory whatever V), ``"auto"`` takes the cheaper one (``plan.py``).
        max_logits_bytes: bound on the logits that exist at a time, in bytes.
        return_stats: also return :class:`LossStats`, detached.
        impl: ``"auto"`` or an implementation's name.

    Returns:
        The loss, fp32 (fp64 for fp64 inputs), or ``(loss, LossStats)``. Nothing kept gives 0 and zero gradients (torch:
        NaN).

    Gradients flow to ``input`` and ``linear_weight``, each in its own dtype; one that is not required costs nothing.
    What stands at masked positions, NaN included, enters neither loss nor gradients. Differentiable once. Under
    autocast and on the CPU see ``matmul.compute_dtype`` for the dtype of the products.

    Raises:
        ValueError, TypeError: an argument of a wrong shape, dtype or device, by name.
        IndexError: a label outside ``[0, V)`` on the CPU, or anywhere under ``SFT_KERNELS_CHECK=1``; elsewhere the loss
            is NaN.
    """
    core = resolve("softmax_grad", impl)
    if not isinstance(input, torch.Tensor) or input.dim() == 0:
        raise ValueError("input: expected a tensor of shape [..., D]")
    if not input.is_floating_point():
        raise TypeError(f"input: expected floating point, got {input.dtype}")
    shape, D = input.shape[:-1], input.shape[-1]
    if linear_weight.dim() != 2 or linear_weight.shape[1] != D or linear_weight.shape[0] == 0:
        raise ValueError(f"linear_weight: expected shape [V, {D}], got {tuple(linear_weight.shape)}")
    if not linear_weight.is_floating_point():
        raise TypeError(f"linear_weight: expected floating point, got {linear_weight.dtype}")
    if linear_weight.device != input.device:
        raise ValueError(f"linear_weight: expected device {input.device} as input, got {linear_weight.device}")
    if not torch.is_autocast_enabled(input.device.type) and linear_weight.dtype != input.dtype:
        raise TypeError(f"linear_weight: expected {input.dtype} as input, got {linear_weight.dtype}")
    if chunking not in ("auto", "tokens", "vocab"):
        raise ValueError(f"chunking: expected 'auto', 'tokens' or 'vocab', got {chunking!r}")
    check_options(reduction, num_items, token_weight, shape, input.device)
    kept = _kept_tokens(kept, target, shape, input.device, -100 if ignore_index is None else ignore_index, shift)

    hidden = input.reshape(-1, D)
    V = linear_weight.shape[0]
    inside = check_labels(kept.targets, V)
    grad_enabled = torch.is_grad_enabled()
    need_dx, need_dw = (grad_enabled and t.requires_grad for t in (input, linear_weight))
    dtype = matmul.compute_dtype(input)
    acc_dtype = matmul.accumulator_dtype(linear_weight.dtype)
    plan = make_plan(
        kept.count, D, V, dtype.itemsize,
        device_type=input.device.type,
        chunking=chunking,
        max_logits_bytes=max_logits_bytes,
        grads=need_dx + need_dw,
        accumulator=V * D * acc_dtype.itemsize if need_dw and linear_weight.dtype != acc_dtype else 0,
    )  # fmt: skip
    weight = None if token_weight is None else token_weight.reshape(-1)[kept.rows + kept.shift]
    scale = row_scale(kept.count, matmul.accumulator_dtype(dtype), input.device, reduction, num_items, weight, inside)
    options = _Options(core, plan, dtype, need_dx, need_dw, reduction != "none", return_stats)
    with _plain_products(input.device):
        out = _LinearCrossEntropy.apply(hidden, linear_weight, kept.rows, kept.targets, scale, inside, options)
    loss, stats = unpack(out, kept.rows, shape, reduction, return_stats)
    return (loss, stats) if return_stats else loss


def _kept_tokens(kept, target, shape, device, ignore_index, shift):
    if kept is None and target is None:
        raise ValueError("target: expected class indices (or kept=KeptTokens)")
    if target is not None:
        if target.shape != shape:
            raise ValueError(f"target: expected shape {tuple(shape)} as input without D, got {tuple(target.shape)}")
        check_target(target, device)
    if kept is None:
        return KeptTokens.from_labels(target, ignore_index, shift)
    if kept.shift != shift:
        raise ValueError(f"kept was built with shift={kept.shift}, the call says shift={shift}")
    if kept.size != shape.numel():
        raise ValueError(f"kept: expected labels for {shape.numel()} hidden states, got {kept.size}")
    if kept.rows.device != device:
        raise ValueError(f"kept: expected device {device} as input, got {kept.rows.device}")
    return kept
