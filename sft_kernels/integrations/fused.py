"""Losses and statistics of lazy logits, by the fused op: what ``LazyLogits`` catches above autograd.

A differentiable result comes from :func:`linear_cross_entropy` on the head's own inputs. Statistics without a gradient
(a trainer's metrics) are kept by the row of the head's logits. A loss leaves those of its kept rows behind once
somebody has asked for any, and only the other rows cost a forward of their own.
"""

import contextlib
import math

import torch
import torch.nn.functional as F

from .. import KeptTokens, TokenStats, cross_entropy, linear_cross_entropy
from ..ops.softmax_grad.composed import torch_cross_entropy
from .heads import HeadCall
from .heads import history as history_key
from .lazy import CAUGHT, LOG_PROBS, LOGITS, PLOGP, PROBS, PX, LazyLogits, RealTensor, coarsest, stock_rows

_NEVER = -(1 << 62)  # a label that nothing has: every label is one
_CHECKED_ROWS = 8


def _is_lazy(x, *kinds):
    """Returns True if ``x`` is lazy, of one of ``kinds``, and a gradient by it, if any, is one by its head."""
    if not isinstance(x, LazyLogits) or x.source.written is not None or x.source.kind not in kinds:
        return False
    return not _history(x) or _way_back(x) is not None


def _history(x):
    """Returns True if a gradient may flow to ``x``."""
    return torch.is_grad_enabled() and x.requires_grad


def _inputs(head, history):
    """Returns ``(hidden, weight, bias)`` of a head's call."""
    return tuple(t if t is None or history else t.detach() for t in head.tensors())


def _rows(x, tensor):
    """``tensor``, shaped as the head's logits but for the classes, as ``x`` shows it, its last dimension behind."""
    return _classes_last(x.rows.of(tensor), x.rows)


def _classes_last(tensor, view):
    return tensor if view.axis == tensor.dim() - 1 else tensor.movedim(view.axis, -1)


def _as_called(head):
    """The autocast under which the head was called, also for a loss outside of it."""
    device = head.hidden.device.type
    now = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if now == head.autocast:
        return contextlib.nullcontext()
    return torch.autocast(device, dtype=head.autocast, enabled=head.autocast is not None)


def _op(x, hidden, matrix, labels, **options):
    """:func:`linear_cross_entropy` of some hidden states, scaled and capped as ``x``; ``matrix`` is weight and bias."""
    weight, bias = matrix
    logit_scale, softcap = x.source.shaping
    with _as_called(x.source.head):
        return linear_cross_entropy(
            hidden, weight, labels, linear_bias=bias, logit_scale=logit_scale, softcap=softcap, **options
        )


# ---- the loss


def _loss(x, target, *, dtype=None, return_stats=False, **options):
    """:func:`linear_cross_entropy` of the hidden states behind ``x``, in the dtype that torch returns or ``dtype``."""
    head = x.source.head
    hidden, *matrix = _inputs(head, _history(x))
    ignore_index = options["ignore_index"]
    check_once(x, target, ignore_index)
    remember = head.remembers and not return_stats
    if remember:  # where the kept tokens stand
        options["kept"] = kept = KeptTokens.from_labels(target, options.pop("ignore_index"))
    loss = _op(x, _rows(x, hidden), matrix, target, return_stats="tokens" if remember else return_stats, **options)
    head.state.fused += 1
    stats = None
    if remember or return_stats:
        loss, stats = loss
    if remember:
        _remember(x, kept.rows, stats)
    if dtype is None:
        lowered = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
        dtype = torch.float32 if lowered else x.dtype
    loss = _tied(loss.to(dtype), x)
    return (loss, _with_tie(stats, x)) if return_stats else loss


def _cross_entropy(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
):
    smoothed = weight is not None and label_smoothing
    if not _is_lazy(input, LOGITS) or not _is_labels(input, target) or smoothed:
        return NotImplemented
    if size_average is not None or reduce is not None:
        return NotImplemented
    options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    return _loss(input, target, weight=weight, **options)


def _our_cross_entropy(
    input, target, weight=None, *, softcap=None, logit_scale=None, dtype=None, label_smoothing=0.0, **options
):
    """:func:`sft_kernels.cross_entropy`, on real logits if it asks for more than the head's op has."""
    options = {"ignore_index": -100, **options, "label_smoothing": label_smoothing, "weight": weight}
    fits = dtype in (None, torch.float32, input.dtype) and not (weight is not None and label_smoothing)
    if fits and softcap is logit_scale is None and _is_lazy(input, LOGITS) and _is_labels(input, target):
        return _loss(input, target, dtype=dtype, **options)
    real = RealTensor.apply(input, False)
    return cross_entropy(real, target, dtype=dtype, softcap=softcap, logit_scale=logit_scale, **options)


def _nll_loss(input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean"):
    if not _is_lazy(input, LOG_PROBS) or input.source.factor != 1 or not _is_labels(input, target):
        return NotImplemented
    if size_average is not None or reduce is not None:
        return NotImplemented
    return _loss(input, target, weight=weight, ignore_index=ignore_index, reduction=reduction)


def _is_labels(x, target):
    """Returns True if ``target`` holds class indices, and the classes of ``x`` stand where torch expects them."""
    if not isinstance(target, torch.Tensor) or isinstance(target, LazyLogits):
        return False
    where = x.rows.axis == min(1, x.dim() - 1)
    shape = x.shape[: x.rows.axis] + x.shape[x.rows.axis + 1 :]
    indices = not (target.is_floating_point() or target.dtype == torch.bool)
    return where and indices and target.shape == shape and target.device == x.device


class _Tie(torch.autograd.Function):
    """``result`` again, whose backward also runs the nodes behind ``x``, without a gradient."""

    @staticmethod
    def forward(ctx, result, x):
        ctx.set_materialize_grads(False)
        return result.view_as(result)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _tied(result, x):
    """``result``, computed past ``x``, and tied to it if a hook, or somebody's node, waits for its backward.

    Such are the hooks that wrappers of distributed training put on a model's outputs.
    """
    if not result.requires_grad or not (x.source.head.hooked or _way_back(x)):
        return result
    return _Tie.apply(result, x)


# Nodes that hand their gradient on as it is, and wait for their backward.
_SINKS = ("_DDPSinkBackward",)


def _way_back(x):
    """How the gradient of ``x`` comes to its heads: True past somebody's node that must run, False past none.

    Returns None if it does not come to all of them, or if a node on the way may change it: ``x`` was detached, or went
    through somebody's own ``autograd.Function``. The fused op must then not compute past it.
    """
    tokens, ends = set(), set()
    x.source.head.add_to(tokens, ends)
    sink, nodes = False, [x.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in ends:
            continue
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            kind = type(node).__name__
            if kind == "HeadCalledBackward":
                tokens.discard(node.token)
                continue
            if kind not in _SINKS:
                return None
            sink = True
        nodes += [following for following, _ in node.next_functions]
    return None if tokens else sink


# ---- statistics of each token


def _statistics(x, labels=None):
    """:class:`TokenStats` of the tokens that ``x`` shows, shaped as ``x`` without the classes.

    ``logprob`` means something only if ``labels`` say of which class.
    """
    if torch.is_inference_mode_enabled():  # what is kept may be used outside of it
        with torch.inference_mode(False), torch.no_grad():
            return _statistics(x, labels)
    key = x.source.shaping
    history = _history(x)
    if labels is not None:
        found = _of_every_token(x, x.rows, labels, history)
    else:
        found = _found(x, key, history)
        if found is None and not history:
            return _known(x)
        if found is None:  # if x is one of several pieces, the others will be asked for next
            _of_every_token(x, x.rows.pieces or x.rows, None, history)
            found = _found(x, key, history)
    return _with_tie(found, x) if history else found


def _with_tie(stats, x):
    """``stats`` with their gradients tied to ``x``; :class:`LossStats` have none."""
    if not isinstance(stats, TokenStats):
        return stats
    return TokenStats(*(_tied(field, x) for field in stats[:3]), stats.prediction)


def _found(x, key, history):
    """The statistics that a view before ``x`` has already, as ``x`` shows them; None without any."""
    view = x.rows
    keys = {history_key(True), history_key(history)}
    while view is not None:
        for history_of in keys:
            if stats := x.source.head.stats.get((view, key, history_of)):
                stats = (field.unsqueeze(view.axis) for field in stats)
                stats = (x.rows.of(field, view).squeeze(x.rows.axis) for field in stats)
                return TokenStats(*(field if history else field.detach() for field in stats))
        view = view.parent
    return None


def _of_every_token(x, view, labels, history):
    """Computes, and keeps with ``view``, the statistics of all its tokens."""
    head = x.source.head
    hidden, *matrix = _inputs(head, history)
    hidden = _classes_last(view.of(hidden), view)
    if labels is None:
        labels = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    check_once(x)
    _, found = _op(x, hidden, matrix, labels, reduction="none", ignore_index=_NEVER, return_stats="tokens")
    head.state.fused += 1
    head.stats[view, x.source.shaping, history_key(history)] = found
    return found


class _Known:
    """Statistics of some of the rows of a head's logits, without a history."""

    def __init__(self, rows, dtype, device):
        self.here = torch.zeros(rows, dtype=torch.bool, device=device)
        self.lse = torch.zeros(rows, dtype=dtype, device=device)
        self.entropy = torch.zeros(rows, dtype=dtype, device=device)
        self.prediction = torch.zeros(rows, dtype=torch.int64, device=device)

    def put(self, rows, stats):
        self.here[rows] = True
        for mine, found in zip((self.lse, self.entropy, self.prediction), stats[1:], strict=True):
            mine[rows] = found.detach().to(mine.dtype)


def _row_numbers(x, view):
    """Which row of the head's logits each token of ``view`` is."""
    lead = x.source.head.hidden.shape[:-1]
    numbers = torch.arange(math.prod(lead), device=x.device).view(*lead, 1)
    return view.of(numbers).squeeze(view.axis)


def _known_rows(x):
    head = x.source.head
    known = head.known.get(x.source.shaping)
    if known is None:
        rows = math.prod(head.hidden.shape[:-1])
        known = head.known[x.source.shaping] = _Known(rows, torch.promote_types(head.dtype, torch.float32), x.device)
    return known


def _remember(x, kept, stats):
    """Keeps what a loss found for the tokens ``kept`` [K] of ``x``."""
    rows = _row_numbers(x, x.rows).reshape(-1)[kept]
    _known_rows(x).put(rows, [field.reshape(-1)[kept] for field in stats])


def _known(x):
    """The statistics without a history; rows that no loss left behind are computed now."""
    head = x.source.head
    head.state.statistics_wanted = True
    known = _known_rows(x)
    rows = _row_numbers(x, x.rows)
    missing = rows[~known.here[rows]]
    if missing.numel():
        wanted = rows if x.rows.pieces is None else _row_numbers(x, x.rows.pieces)
        wanted = wanted[~known.here[wanted]]
        hidden, *matrix = _inputs(head, history=False)
        hidden = hidden.reshape(-1, hidden.shape[-1])[wanted]
        with torch.no_grad():
            _, found = _op(x, hidden, matrix, torch.zeros_like(wanted), return_stats="tokens")
        head.state.fused += 1
        known.put(wanted, found)
    lse = known.lse[rows]
    return TokenStats(lse, lse, known.entropy[rows], known.prediction[rows])


# ---- reductions over the classes


def _over_classes(x, dim):
    """Returns True if ``dim``, a number or a sequence of one, is the dimension of the classes."""
    if isinstance(dim, (tuple, list)):
        dim = dim[0] if len(dim) == 1 else None
    return isinstance(dim, int) and (dim + x.dim() if dim < 0 else dim) == x.rows.axis


def _reduced(field, x, keepdim, dtype=None):
    field = field if field.dtype == torch.int64 else field.to(dtype or x.dtype)
    return field.unsqueeze(x.rows.axis) if keepdim else field


def _logsumexp(input, dim, keepdim=False, **others):
    if others or not _is_lazy(input, LOGITS) or not _over_classes(input, dim):
        return NotImplemented
    return _reduced(_statistics(input).lse.clone(), input, keepdim)  # what is kept is nobody's to write to


def _argmax(input, dim=None, keepdim=False, **others):
    if others or not _is_lazy(input, LOGITS, LOG_PROBS, PROBS) or not _over_classes(input, dim):
        return NotImplemented
    if input.source.factor <= 0:
        return NotImplemented
    with torch.no_grad():
        return _reduced(_statistics(input).prediction.clone(), input, keepdim)


def _sum(input, dim=None, keepdim=False, *, dtype=None, **others):
    """Σ p log p is minus the entropy, Σ p x the logsumexp minus the entropy."""
    if others or not _is_lazy(input, PLOGP, PX) or not _over_classes(input, dim):
        return NotImplemented
    stats = _statistics(input)
    found = -stats.entropy if input.source.kind == PLOGP else stats.lse - stats.entropy
    return _reduced(found * input.source.factor, input, keepdim, dtype)


def _gather(input, dim, index, *, sparse_grad=False, **others):
    if others or not _is_lazy(input, LOGITS, LOG_PROBS) or not _over_classes(input, dim):
        return NotImplemented
    if input.source.kind == LOG_PROBS and input.source.factor < 0:
        return NotImplemented  # a label smoother's: it goes on to sum all classes, for which it needs real logits
    axis = input.rows.axis
    one_each = (*input.shape[:axis], 1, *input.shape[axis + 1 :])
    if not isinstance(index, torch.Tensor) or isinstance(index, LazyLogits) or index.shape != one_each:
        return NotImplemented
    stats = _statistics(input, index.squeeze(axis))
    logprob = stats.logprob if input.source.kind == LOG_PROBS else stats.logprob + stats.lse
    return _reduced(logprob * input.source.factor, input, keepdim=True)


for _functions, _catch in (
    ((F.cross_entropy,), _cross_entropy),
    ((cross_entropy,), _our_cross_entropy),
    ((F.nll_loss,), _nll_loss),
    ((torch.logsumexp, torch.Tensor.logsumexp), _logsumexp),
    ((torch.argmax, torch.Tensor.argmax), _argmax),
    ((torch.sum, torch.Tensor.sum), _sum),
    ((torch.gather, torch.Tensor.gather), _gather),
):
    CAUGHT.update(dict.fromkeys(_functions, _catch))


# ---- is the record right?


def check_once(x, target=None, ignore_index=-100):
    """Compare a head's first fused result with the unpatched head's, and raise ``RuntimeError`` if they differ.

    Compared are the loss and its gradient by the hidden states on a few rows, kept ones if there are any. Under
    DistributedDataParallel all ranks raise if one does.
    """
    head = x.source.head
    state = head.state
    if state.checked:
        return
    state.checked = True
    try:
        problem = _difference(x, target, ignore_index)
    except Exception:
        _any_rank(True, head)  # the others wait for this rank's answer
        raise
    if _any_rank(problem is not None, head):
        raise RuntimeError(
            f"patch: the fused loss of {state.name} is not that of the unpatched model:"
            f" {problem or 'seen on another rank'}. The model does something else to its logits; call unpatch(model)"
        )


def _difference(x, target, ignore_index):
    """Says how the fused op differs from the unpatched head; None if it does not."""
    values, head = x.source, x.source.head
    while values.kind != LOGITS:
        values = values.op[1][0].values
    hidden, *matrix = _inputs(head, history=False)
    at, labels = _some_rows(x, target, ignore_index, head.classes)
    if at is None:
        return None
    rows = []

    def select(hidden):
        rows.append(_rows(x, hidden.detach()).reshape(-1, hidden.shape[-1])[at].requires_grad_())
        return rows[-1]

    with torch.enable_grad(), _saving_alone(), _as_called(head):
        logits = stock_rows(values, select).reshape(len(at), -1)
        stock = torch_cross_entropy(logits.float(), labels, reduction="none")
        same_rows = isinstance(head, HeadCall)
        ours = rows[0] if same_rows else select(hidden)
        fused = _op(x, ours, matrix, labels, reduction="none", ignore_index=_NEVER)
        pairs = [(stock, fused)]
        if same_rows:
            pairs.append(tuple(torch.autograd.grad(loss.sum(), ours)[0].float() for loss in (stock, fused)))
    largest = 1 + logits.detach().abs().max()
    if not largest.isfinite():
        return None  # nothing to compare: the loss is not finite either
    # The unpatched head rounds its logits, and a rounding of z changes the gradient's p by as much of itself.
    allowed = 4 * max(coarsest(values), torch.finfo(logits.dtype).eps, 1e-5) * largest
    for name, (theirs, found) in zip(("losses", "gradients"), pairs, strict=False):
        theirs, found = theirs.detach(), found.detach()
        size = 1 if name == "losses" else theirs.abs().max()
        distance = (theirs - found).abs().max()
        if not distance <= allowed * size + 1e-12:
            return f"{name} of {len(at)} rows differ by up to {float(distance):.3g}"
    return None


def _saving_alone():
    """Keeps what the comparison saves for its backward from the hooks of a checkpoint around the model."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _some_rows(x, target, ignore_index, classes):
    """Returns ``(rows, labels)`` of a few tokens of ``x``, kept ones if there are any; ``(None, None)`` without any."""
    count = math.prod(x.shape[: x.rows.axis] + x.shape[x.rows.axis + 1 :])
    labels = torch.zeros(count, dtype=torch.int64, device=x.device) if target is None else target.reshape(-1)
    at = (labels != ignore_index).nonzero()[:_CHECKED_ROWS, 0]
    if at.numel() == 0:
        at = torch.arange(min(count, _CHECKED_ROWS), device=x.device)
    labels = labels[at].clamp(0, classes - 1)  # a label outside is for the loss to refuse
    return (at, labels) if at.numel() else (None, None)


def _any_rank(problem, head):
    """Returns True if ``problem`` is True, under DistributedDataParallel on any rank."""
    if head.ranks is None:
        return problem
    flag = torch.tensor([float(problem)], device=head.hidden.device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, head.ranks.process_group)
    return bool(flag)
