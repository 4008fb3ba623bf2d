"""``linear_cross_entropy``: the masked loss of a language model's head, without its logits."""

import math
from functools import partial

import torch

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
    row_scale,
    target_weight,
    unpack,
)
from . import matmul
from .function import Dtypes, LinearCrossEntropy, Needs, Options, plain_products, whole_logits
from .head import weight_and_bias
from .kept import KeptTokens, carried_labels, number_of_tokens
from .parallel import Shards, local_head, replicated
from .plan import make_plan


def linear_cross_entropy(
    input,
    linear_weight,
    target=None,
    *,
    linear_bias=None,
    weight=None,
    reduction="mean",
    ignore_index=None,
    label_smoothing=0.0,
    num_items=None,
    token_weight=None,
    softcap=None,
    logit_scale=None,
    z_loss=0.0,
    shift=False,
    kept=None,
    chunking="auto",
    max_logits_bytes=None,
    process_group=None,
    return_stats=False,
    impl="auto",
):
    """Cross-entropy of ``input @ linear_weight.T + linear_bias`` against ``target``, paying only for kept tokens.

    Replaces ``F.cross_entropy(F.linear(input, linear_weight), target)``: rows whose label is ``ignore_index`` are
    dropped before the product, and the logits exist a chunk at a time. The loss of a token is that of
    :func:`cross_entropy`.

    Args:
        input: hidden states, ``[..., D]``, floating point.
        linear_weight: the head, ``[V, D]``, of the same dtype (any floating dtype under autocast). ``[V, d1, …, D]``
            with ``input`` ``[N, D]``, as in torch: a loss at each of d1 · … places.
        target: class indices, of the shape of ``input`` without D (``[N, d1, …]``). May be left out where ``kept`` is
            given. Or probabilities, ``[..., V]`` (``[N, V, d1, …]``).
        linear_bias: of the head, ``[V]`` (``[V, d1, …]``), of the dtype of ``linear_weight``.
        weight: ``[V]``, a factor for each class. Enters the mean's divisor, as in torch.
        reduction: ``"mean"`` over the kept tokens, ``"sum"``, or ``"none"``: fp32 of the shape of the labels, 0 where
            ignored. Probabilities are all kept.
        ignore_index: the label that carries no loss; None means -100. Class indices only.
        label_smoothing: in [0, 1].
        num_items: number or 0-d tensor that replaces the mean's divisor, so that micro-batches share one denominator.
            Where an engine averages gradients over ranks (DDP, FSDP), pass the global number of kept tokens over the
            world size.
        token_weight: floating point, of the shape of the labels and aligned with them; scales numerators only.
        softcap, logit_scale: positive, or None (Gemma 2's and Cohere's).
        z_loss: at least 0; the penalty is scaled as its token is.
        shift: a number of tokens: the hidden state at t predicts the label at t + ``shift`` (last dimension of
            ``target``). True is 1, False 0. Pass labels as they are: nothing else may shift them. The loss of
            ``reduction="none"`` stands at t.
        kept: :class:`KeptTokens`, which then say which rows and labels; the values of ``target`` and ``ignore_index``
            are not read. Without it, counting the kept tokens of a GPU tensor syncs once.
        chunking: ``"tokens"`` computes gradients in the forward (three products), ``"vocab"`` walks the vocabulary and
            recomputes (four products, bounded memory whatever V), ``"auto"`` takes the cheaper one (``plan.py``).
        max_logits_bytes: bound in bytes on the logits that exist at a time, together with the copy of a head that is
            cast to the products' dtype.
        process_group: of ranks that hold the same tokens and split the head over V, in their order: ``linear_weight``
            and ``linear_bias`` are this rank's slices, ``[V / ranks, D]`` on every rank, or DTensors placed as
            ``Shard(0)``, also unevenly. What else is passed is whole and the same on all ranks, as are the loss, the
            statistics and the gradient of ``input``, which this op sums over the ranks. ``max_logits_bytes`` is one
            rank's.
        return_stats: True also returns :class:`LossStats`, detached, of the scaled and capped logits. ``"tokens"``
            returns :class:`TokenStats` instead, of the shape of the labels, through which gradients flow; with
            ``shift`` they stand at t. If only they enter your loss, say ``reduction="none"``: a reduced loss may make
            its gradients in the forward.
        impl: ``"auto"`` or an implementation's name.

    Returns:
        The loss, fp32 (fp64 for fp64 inputs); or ``(loss, LossStats)``, or ``(loss, TokenStats)``. Nothing kept gives 0
        and zero gradients (torch: NaN).

    Gradients flow to ``input``, ``linear_weight`` and ``linear_bias``, each in its own dtype; one that is not required
    costs nothing. What stands at masked positions, NaN included, enters neither loss nor gradients. Under autocast and
    on the CPU see ``matmul.compute_dtype`` for the dtype of the products.

    Probability targets, class weights together with label smoothing, and heads of more than two dimensions are torch's
    own code over the kept rows' logits as a whole; ``kept``, ``shift``, ``chunking`` and ``max_logits_bytes`` say
    nothing about the first and the last and are refused there, the latter two with all three.

    Under ``torch.func`` and ``vmap``, with forward-mode derivatives, on meta and fake tensors and in ``torch.export``
    this is plain torch over the logits of all rows, masked ones too; ``kept`` leaves those out. Gradients of gradients
    and ``is_grads_batched=True`` are plain torch over the kept rows' logits. ``process_group`` goes with none of these.

    Raises:
        ValueError, TypeError: an argument of a wrong shape, dtype or device, or out of range, by name.
        IndexError: a label outside ``[0, V)`` on the CPU, or anywhere under ``SFT_KERNELS_CHECK=1``; elsewhere the loss
            is NaN, and so are the token's logprob, lse and entropy.
    """
    check_floating("linear_weight", linear_weight)
    plain = why_plain(input, linear_weight, linear_bias, target, weight, token_weight)
    if plain and process_group is not None:
        raise ValueError(f"process_group: {plain} take a whole head; call the loss of the split head without them")
    shards = None if process_group is None else Shards.of(linear_weight, process_group)
    linear_weight, linear_bias = local_head(linear_weight, linear_bias, shards)
    input, target = replicated(input, "input", shards), replicated(target, "target", shards)
    _check_head(input, linear_weight, linear_bias)
    device, D = input.device, input.shape[-1]
    V = linear_weight.shape[0] if shards is None else shards.classes
    places = linear_weight.shape[1:-1]
    shape = input.shape[:-1] + places
    probabilities = target is not None and check_target(target, shape, _with_classes(shape, V, places), device)
    loss_options = LossOptions.checked(V, label_smoothing, softcap, logit_scale, z_loss)
    whole = probabilities or bool(places)
    shift = number_of_tokens(shift)
    _check_loops(whole, weight is not None and label_smoothing, shift, kept, chunking, max_logits_bytes)
    if probabilities and ignore_index is not None:
        raise ValueError("ignore_index: probabilities are all kept")
    check_options(reduction, return_stats, num_items, token_weight, shape, device)
    check_class_weight(weight, V, device)
    dtype = matmul.compute_dtype(input)
    scalar = matmul.accumulator_dtype(dtype)

    composed = whole or (weight is not None and bool(label_smoothing))
    if composed and shards is not None:
        raise ValueError("process_group: probabilities, and class weights with label smoothing, take a whole head")
    core = Core.resolve(impl, device, dtype, loss_options, composed, return_stats, plain)

    with mode_of_fakes(plain, input), plain_products(device):
        rows, keep, outside, of_target = None, None, None, None
        if probabilities:
            targets = target.movedim(-1 - len(places), -1).reshape(-1, V)
        elif plain and kept is None:  # nothing may be counted: all rows are computed, and masked
            carried = _carried(target, ignore_index, shift)
            keep = carried != (-100 if ignore_index is None else ignore_index)
            targets = carried * keep
        else:
            kept = _kept_tokens(kept, target, shape, device, -100 if ignore_index is None else ignore_index, shift)
            if kept.size == 0:  # nothing to be gathered for what is padded
                kept = kept._replace(rows=kept.rows[:0], targets=kept.targets[:0], capacity=None)
            rows, targets, keep = kept.rows, kept.targets, kept.keep
        if not probabilities:
            outside = check_labels(targets, V, plain)
            of_target = target_weight(weight, targets, outside, keep, scalar, plain)
        padding = None if keep is None else ~keep
        weights = None
        if token_weight is not None:
            weights = token_weight.reshape(-1)
            if shift and rows is None:
                weights = torch.cat([weights[shift:], torch.zeros_like(weights[:shift])])
            elif shift:  # a view from which every row reads its label's weight, and a row of -1 any
                weights = weights[min(shift, len(weights) - 1) :][rows]
            elif rows is not None and (keep is not None or rows.numel() != weights.numel()):
                weights = weights[rows]
        scale = row_scale(targets, scalar, reduction, num_items, weights, of_target, outside, keep, plain)
        reduce, per_token = reduction != "none", return_stats == "tokens"
        hidden = input.reshape(-1, D)
        if composed or plain:
            logits = whole_logits(hidden, linear_weight, linear_bias, rows, padding, dtype)
            softmax_grad = None if plain else core.softmax_grad
            out = composed_loss(
                softmax_grad, logits, targets, weight, scale, outside, padding, loss_options, reduce, return_stats
            )
        else:
            if of_target is not None:
                scale = scale * of_target
            needs = Needs(*(_requires_grad(t) for t in (input, linear_weight, linear_bias)))
            acc_dtype = matmul.accumulator_dtype(linear_weight.dtype)
            head = (linear_weight,) if linear_bias is None else (linear_weight, linear_bias)
            fp16 = torch.float16 in (dtype, *(t.dtype for t in head))
            # Several chunks sum dW in fp32 memory of its own, which a single chunk does not need.
            summed = needs.dw and not fp16 and linear_weight.dtype != acc_dtype
            width = V if shards is None else shards.longest
            plan = make_plan(
                len(targets), D, width, dtype, linear_weight.dtype,
                device_type=device.type,
                chunking=chunking,
                max_logits_bytes=max_logits_bytes,
                grads=needs.dx + needs.dw,
                accumulator=width * D * acc_dtype.itemsize if summed else 0,
            )  # fmt: skip
            options = Options(
                partial(core.softmax_grad, options=loss_options),
                core.scale_,
                {"stats": True, "predict": True} if per_token else {"stats": return_stats},
                loss_options,
                plan,
                dtype,
                needs,
                Dtypes.of(hidden, linear_weight, linear_bias, dtype, fp16, shards is not None),
                fp16,
                reduce,
                return_stats,
                shards,
            )
            out = LinearCrossEntropy.apply(
                hidden,
                linear_weight,
                linear_bias,
                rows,
                targets,
                scale,
                padding,
                outside if per_token else None,
                options,
            )
        loss, stats = unpack(out, rows, shape, reduction, return_stats)
    return (loss, stats) if return_stats else loss


def _requires_grad(tensor):
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _with_classes(shape, V, places):
    """The shape of probabilities, or logits, for labels of ``shape`` whose last dimensions are ``places``."""
    batch = len(shape) - len(places)
    return torch.Size((*shape[:batch], V, *places))


def _check_head(input, linear_weight, linear_bias):
    check_floating("input", input)
    if input.dim() == 0:
        raise ValueError("input: expected a tensor of shape [..., D]")
    D = input.shape[-1]
    if linear_weight.dim() < 2 or linear_weight.shape[-1] != D or linear_weight.shape[0] == 0:
        raise ValueError(f"linear_weight: expected shape [V, {D}], got {tuple(linear_weight.shape)}")
    if linear_weight.dim() > 2 and input.dim() != 2:
        raise ValueError(
            f"input: expected shape [N, {D}] for a head of shape {tuple(linear_weight.shape)}, got {tuple(input.shape)}"
        )
    head = {"linear_weight": linear_weight}
    if linear_bias is not None:
        check_floating("linear_bias", linear_bias)
        head["linear_bias"] = linear_bias
        if linear_bias.shape != linear_weight.shape[:-1]:
            raise ValueError(
                f"linear_bias: expected shape {tuple(linear_weight.shape[:-1])}, got {tuple(linear_bias.shape)}"
            )
    for name, tensor in head.items():
        if tensor.device != input.device:
            raise ValueError(f"{name}: expected device {input.device} as input, got {tensor.device}")
        if not autocast_on(input.device) and tensor.dtype != input.dtype:
            raise TypeError(f"{name}: expected {input.dtype} as input, got {tensor.dtype}")


def _check_loops(whole, unchunked, shift, kept, chunking, max_logits_bytes):
    """Raise for a loop that does not exist, or for what says nothing about a loss over whole logits."""
    if chunking not in ("auto", "tokens", "vocab"):
        raise ValueError(f"chunking: expected 'auto', 'tokens' or 'vocab', got {chunking!r}")
    if max_logits_bytes is not None and not isinstance(max_logits_bytes, int):
        raise TypeError(f"max_logits_bytes: expected an integer, got {max_logits_bytes!r}")
    if kept is not None and not isinstance(kept, KeptTokens):
        raise TypeError(f"kept: expected KeptTokens, got {type(kept).__name__}")
    if whole and (shift or kept is not None):
        raise ValueError(
            f"{'shift' if shift else 'kept'}: goes with class indices of one place per hidden state, not with"
            " probabilities or a head of more than two dimensions"
        )
    if (whole or unchunked) and (chunking != "auto" or max_logits_bytes is not None):
        raise ValueError(
            f"{'max_logits_bytes' if chunking == 'auto' else 'chunking'}: probabilities, class weights with label"
            " smoothing, and heads of more than two dimensions are not chunked"
        )


def _carried(target, ignore_index, shift):
    if target is None:
        raise ValueError("target: expected class indices (or kept=KeptTokens)")
    if not isinstance(ignore_index, int | None):
        raise TypeError(f"ignore_index: expected an integer, got {ignore_index!r}")
    return carried_labels(target, -100 if ignore_index is None else ignore_index, shift)


def _kept_tokens(kept, target, shape, device, ignore_index, shift):
    if kept is None and target is None:
        raise ValueError("target: expected class indices (or kept=KeptTokens)")
    if kept is None:
        return KeptTokens.from_labels(target, ignore_index, shift)
    if kept.shift != shift:
        raise ValueError(f"kept was built with shift={kept.shift}, the call says shift={shift}")
    if kept.size != shape.numel():
        raise ValueError(f"kept: expected labels for {shape.numel()} hidden states, got {kept.size}")
    if kept.rows.device != device:
        raise ValueError(f"kept: expected device {device} as input, got {kept.rows.device}")
    return kept


class LinearCrossEntropyLoss(torch.nn.Module):
    """The head and its loss as one module, as ``torch.nn.LinearCrossEntropyLoss``: the head is ``self.linear``.

    ``weight`` ``[num_classes]`` holds class weights and is a buffer. For a head that a model already has, assign it
    (``loss.linear = model.lm_head``) or call :func:`linear_cross_entropy`. It must be a ``torch.nn.Linear`` that
    computes ``x Wᵀ + b`` and nothing else: its weight may be parametrised, but each call refuses hooks, a forward of
    its own, quantised weights and adapters (``TypeError``).
    """

    def __init__(
        self,
        in_features,
        num_classes,
        *,
        out_features=(),
        bias=False,
        device=None,
        dtype=None,
        weight=None,
        reduction="mean",
        ignore_index=None,
        label_smoothing=0.0,
        softcap=None,
        logit_scale=None,
        z_loss=0.0,
        shift=False,
        chunking="auto",
        max_logits_bytes=None,
        return_stats=False,
        impl="auto",
    ):
        super().__init__()
        check_options(reduction, return_stats)
        LossOptions.checked(num_classes, label_smoothing, softcap, logit_scale, z_loss)
        _check_loops(bool(out_features), False, number_of_tokens(shift), None, chunking, max_logits_bytes)
        self.linear = torch.nn.Linear(
            in_features, math.prod(out_features, start=num_classes), bias=bias, device=device, dtype=dtype
        )
        self.register_buffer("weight", weight)
        self.num_classes = num_classes
        self.out_features = tuple(out_features)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.z_loss = z_loss
        self.shift = shift
        self.chunking = chunking
        self.max_logits_bytes = max_logits_bytes
        self.return_stats = return_stats
        self.impl = impl

    def forward(self, input, target=None, *, num_items=None, token_weight=None, kept=None):
        """The loss of one batch, with the batch's own divisor, token weights and kept tokens."""
        places = (self.num_classes, *self.out_features)
        weight, bias = weight_and_bias(self.linear, "linear")
        if weight.shape[0] != math.prod(places):
            raise ValueError(
                f"linear: expected {math.prod(places)} outputs for num_classes={self.num_classes} and"
                f" out_features={self.out_features}, got {weight.shape[0]}; build the loss for the number of classes"
                " that the head has"
            )
        return linear_cross_entropy(
            input,
            weight.reshape(*places, -1),
            target,
            linear_bias=None if bias is None else bias.reshape(places),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            num_items=num_items,
            token_weight=token_weight,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            z_loss=self.z_loss,
            shift=self.shift,
            kept=kept,
            chunking=self.chunking,
            max_logits_bytes=self.max_logits_bytes,
            return_stats=self.return_stats,
            impl=self.impl,
        )

    def extra_repr(self):
        return f"out_features={self.out_features}, reduction={self.reduction!r}, shift={self.shift}"
