"""Checks of arguments and labels, the scale of each row, the reduction: shared by the losses on the core."""

import functools
import math
import numbers
import sys

import torch

from ..._backend import checks_enabled
from ..._checks import check_floating, check_tensor
from ..._plain import is_batch_of_gradients, is_differentiated, masked, untransformed, values_of, without_autocast
from .stats import LossStats, TokenStats

_REDUCTIONS = ("mean", "sum", "none")


def check_options(reduction, return_stats, num_items=None, token_weight=None, target_shape=None, device=None):
    """Raise for a reduction, statistics, a divisor or a token weight that mean nothing."""
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: expected one of {_REDUCTIONS}, got {reduction!r}")
    if not (isinstance(return_stats, bool) or (isinstance(return_stats, str) and return_stats == "tokens")):
        raise ValueError(f"return_stats: expected False, True or 'tokens', got {return_stats!r}")
    if num_items is not None:
        if reduction != "mean":
            raise ValueError(f"num_items replaces the divisor of reduction='mean'; got reduction={reduction!r}")
        if isinstance(num_items, torch.Tensor):
            check_tensor("num_items", num_items)
            if num_items.dim() != 0:
                raise ValueError(f"num_items: expected a number or a 0-d tensor, got shape {tuple(num_items.shape)}")
            if num_items.is_floating_point():
                check_floating("num_items", num_items)
            if num_items.is_meta and device.type != "meta":
                raise ValueError(
                    f"num_items: expected a number or a tensor with a value for input on {device}, got meta"
                )
            if num_items.is_complex():
                raise TypeError(f"num_items: expected a real number, got {num_items.dtype}")
            if is_differentiated(num_items):
                raise ValueError("num_items is a constant of the loss: detach it")
            _check_count(num_items)
        elif not isinstance(num_items, numbers.Real):
            raise TypeError(f"num_items: expected a number or a 0-d tensor, got {type(num_items).__name__}")
        elif not 0 <= num_items < math.inf:
            raise ValueError(f"num_items: expected a count, got {num_items}")
        elif torch.compiler.is_compiling():
            pass
        elif isinstance(num_items, numbers.Rational) and num_items > sys.float_info.max:
            raise ValueError("num_items: expected a count, got a number that no float holds")
    if token_weight is not None:
        check_floating("token_weight", token_weight)
        if token_weight.shape != target_shape:
            raise ValueError(
                f"token_weight: expected the shape of target {tuple(target_shape)}, got {tuple(token_weight.shape)}"
            )
        if token_weight.device != device:
            raise ValueError(f"token_weight: expected device {device} as input, got {token_weight.device}")
        if is_differentiated(token_weight):
            raise ValueError("token_weight is a constant of the loss: detach it")


def _check_count(num_items):
    """Raise ``ValueError`` for a tensor that holds no count. A GPU is asked under ``SFT_KERNELS_CHECK=1`` alone."""
    if not checks_enabled(num_items.device):
        return
    values, batched = values_of(num_items)
    if values is None:
        return
    with untransformed():
        for value in values.flatten().tolist() if batched else [values.item()]:
            if not 0 <= value < math.inf:
                raise ValueError(f"num_items: expected a count, got {value}")


def check_target(target, shape, probabilities_shape, device):
    """Raise for a target of a wrong shape, dtype or device; whether it holds probabilities.

    Class indices have ``shape``, probabilities ``probabilities_shape``.
    """
    check_tensor("target", target)
    probabilities = target.is_floating_point() and target.shape == probabilities_shape
    if probabilities:
        check_floating("target", target)
    else:
        if target.shape != shape:
            raise ValueError(
                f"target: expected class indices of shape {tuple(shape)} or probabilities of shape"
                f" {tuple(probabilities_shape)}, got {target.dtype} of shape {tuple(target.shape)}"
            )
        if target.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
            raise TypeError(f"target: expected class indices (int64), got {target.dtype}")
    if target.device != device:
        raise ValueError(f"target: expected device {device} as input, got {target.device}")
    return probabilities


def check_class_weight(weight, V, device):
    """Raise for class weights that do not fit ``V`` classes."""
    if weight is None:
        return
    check_floating("weight", weight)
    if weight.shape != (V,):
        raise ValueError(f"weight: expected one factor for each of {V} classes, got shape {tuple(weight.shape)}")
    if weight.device != device:
        raise ValueError(f"weight: expected device {device} as input, got {weight.device}")
    if is_differentiated(weight):
        raise ValueError("weight is a constant of the loss: detach it")


def check_labels(targets, V, plain=None):
    """Returns a mask of the labels outside ``[0, V)``, or None if none is known to be.

    On the CPU, and elsewhere under ``SFT_KERNELS_CHECK=1``, a label outside raises ``IndexError``. A GPU is not asked:
    the answer is a mask on the device, and the losses of the labels outside become NaN. ``plain`` is of
    :func:`~sft_kernels._plain.why_plain`, here and below.
    """
    outside = targets.clamp(0, V - 1) != targets
    if not checks_enabled(targets.device):
        return outside
    if not plain:
        return _check_none(outside, targets, V)
    (wrong, _), (labels, _) = values_of(outside), values_of(targets)
    if wrong is None or labels is None:
        return outside
    with untransformed():
        return _check_none(wrong.flatten(), labels.flatten(), V)


def _check_none(outside, targets, V):
    if outside.any():
        position = int(outside.nonzero()[0])
        raise IndexError(f"target: label {int(targets[position])} of token {position} is outside [0, {V})")


def target_weight(weight, targets, outside, keep, dtype, plain=None):
    """``weight[targets]`` in ``dtype``, ``[N]``, 0 where not kept; None without class weights."""
    if weight is None:
        return None
    of_target = weight.to(dtype)[targets if outside is None else targets.clamp(0, weight.numel() - 1)]
    return of_target if keep is None else masked(of_target, ~keep, 0, plain)


def row_scale(targets, dtype, reduction, num_items, token_weight, of_target, outside, keep, plain=None):
    """``[N]`` factors that the tokens' losses enter with: token weight over divisor, 0 where not kept, NaN where
    ``outside``.

    ``token_weight``, ``of_target`` (the class weight of each target), ``outside`` (a mask of invalid labels) and
    ``keep`` (a mask of the tokens that carry loss) are ``[N]`` or None. The divisor of the mean is ``num_items``, else
    the sum of ``of_target``, else the number of kept tokens; a divisor of zero counts as one, so that nothing kept
    gives a loss of 0.
    """
    N, device = targets.shape[0], targets.device
    ones = None if keep is None else keep.to(dtype)
    divisor = _divisor(N, reduction, num_items, of_target, ones)
    if isinstance(divisor, torch.Tensor):
        divisor = divisor.detach().to(device, dtype)
    if token_weight is not None:
        scale = token_weight.to(device, dtype) / divisor
        if keep is not None:
            scale = masked(scale, ~keep, 0, plain)
    elif ones is not None:
        scale = ones / divisor
    elif isinstance(divisor, torch.Tensor):
        scale = torch.ones(N, dtype=dtype, device=device) / divisor
    else:
        scale = torch.full((N,), 1 / divisor, dtype=dtype, device=device)
    return scale if outside is None else masked(scale, outside, float("nan"), plain)


def _divisor(N, reduction, num_items, of_target, ones):
    """A number, or a 0-d tensor on the device, that is not 0. ``ones`` is 1 where a token is kept, else 0."""
    if reduction != "mean":
        return 1
    if num_items is None and of_target is None:
        return max(N, 1) if ones is None else ones.sum().clamp(min=1)
    divisor = of_target.sum() if num_items is None else _torchs(num_items)
    return divisor + (divisor == 0)


def _torchs(num_items):
    """``num_items`` as torch computes with it: an exact number, or an integer beyond 64 bits, becomes a float."""
    if isinstance(num_items, torch.Tensor) or torch.compiler.is_compiling():
        return num_items
    return num_items if type(num_items) in (int, float) and num_items < 2**63 else float(num_items)


def reduce_rows(ctx, rows, loss_options, scale, dropped, reduce, return_stats, outside=None):
    """The forward's result: ``scale · loss``, summed where ``reduce``, and the fields of :class:`LossStats` or
    :class:`TokenStats` where wanted. Rows that ``dropped`` names enter none of them; it may be None where the core has
    left 0 in them. Those that are ``outside`` have statistics of NaN."""
    loss = scale * rows.loss(loss_options)
    loss = loss if dropped is None else loss.masked_fill_(dropped, 0)
    loss = loss.sum() if reduce else loss
    if not return_stats:
        return loss
    if not torch.compiler.is_compiling():  # which knows no such call; elsewhere it spares a fill for each statistic
        ctx.set_materialize_grads(False)
    if return_stats == "tokens":
        stats = TokenStats.of(rows, dropped, outside)
        ctx.mark_non_differentiable(stats.prediction)
    else:
        stats = LossStats.of(rows, dropped)
        ctx.mark_non_differentiable(*stats)
    return loss, *stats


def or_again(again):
    """Decorates the backward of a ``Function``: if kernels cannot make the gradients, ``again`` and autograd do.

    That is so under ``create_graph=True``, which wants a graph of the gradients, and for batches of gradients
    (``is_grads_batched=True``). ``again(ctx, *saved)`` repeats the forward in plain torch and returns its outputs. Of
    the tensors that were ``saved`` it gets gradients for the first, as many as ``ctx.differentiable`` says. They are
    read once, for activation checkpointing hands them out once.
    """

    def decorate(backward):
        @functools.wraps(backward)
        def checked(ctx, *grads):
            if all(grad is None for grad in grads):
                return (None,) * len(ctx.needs_input_grad)
            if torch.is_grad_enabled() or _are_batched(grads):
                return _again(ctx, again, grads)
            return backward(ctx, *grads)

        return checked

    return decorate


def _are_batched(grads):
    if torch.compiler.is_compiling():
        return False
    return any(is_batch_of_gradients(grad) for grad in grads if grad is not None)


def _again(ctx, again, grads):
    create_graph, saved = torch.is_grad_enabled(), ctx.saved_tensors
    differentiable, constants = saved[: ctx.differentiable], saved[ctx.differentiable :]
    with torch.enable_grad():
        # Views, so that a gradient by one input does not count what flows to it from another input.
        inputs = [
            t.view_as(t) if t is not None and needed else t
            for t, needed in zip(differentiable, ctx.needs_input_grad, strict=False)
        ]
        outputs = again(ctx, *inputs, *constants)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=False) if g is not None and o.requires_grad]
    outputs, grads = zip(*pairs, strict=True)
    places = [i for i in range(len(inputs)) if inputs[i] is not None and ctx.needs_input_grad[i]]
    with without_autocast(saved[0].device):  # the forward has chosen the dtype of its products
        found = torch.autograd.grad(outputs, [inputs[i] for i in places], grads, create_graph=create_graph)
    gradients = dict(zip(places, found, strict=True))
    return tuple(gradients.get(i) for i in range(len(ctx.needs_input_grad)))


def hold_back(factors, options):
    """Split :class:`RowFactors` into ``(power_of_two, rest)``, so that fp16 holds ``dlogits``.

    ``dlogits`` are computed with ``rest``: they use fp16's range up to 2¹⁵ and do not underflow. Multiply sums of them
    by ``power_of_two`` in fp32, together with the upstream gradient.
    """
    if factors.coefficients is None:
        name, largest = "scale", torch.linalg.vector_norm(factors.scale, math.inf) * (options.steepest * 2**-14)
    else:  # |p (lse − u)| ≤ 1 / e, and no cap is steeper than 1
        name, largest = "coefficients", torch.linalg.vector_norm(factors.coefficients, 1, 1)
        largest = torch.linalg.vector_norm(largest, math.inf) * ((options.logit_scale or 1.0) * 2**-14)
    back = torch.exp2(torch.floor(torch.log2(largest))).where(largest > 0, 1)
    return back, factors._replace(**{name: getattr(factors, name) / back})


def unpack(out, rows, shape, reduction, return_stats):
    """What the user gets: the losses of ``rows`` (None: of all) put back in their places, the statistics in their
    tuple. A row of -1 is only padded: what it has is left out."""

    def placed(values, elsewhere=0):
        if rows is not None:
            places = values.new_full((shape.numel() + 1,), elsewhere)  # the last one is place -1
            values = places.index_put_((rows,), values)[:-1]
        return values.reshape(shape)

    loss, *stats = out if return_stats else (out,)
    if reduction == "none":
        loss = placed(loss)
    if return_stats == "tokens":
        *values, prediction = stats
        return loss, TokenStats(*map(placed, values), placed(prediction, -1))
    return loss, LossStats(*stats) if stats else None
