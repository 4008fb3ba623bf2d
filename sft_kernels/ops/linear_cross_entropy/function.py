"""The ``autograd.Function`` of ``linear_cross_entropy``: what the forward makes, and what waits for the backward."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..._plain import without_autocast
from ..softmax_grad.composed import composed_loss
from ..softmax_grad.options import LossOptions
from ..softmax_grad.reduction import hold_back, or_again, reduce_rows
from ..softmax_grad.rows import RowFactors
from ..softmax_grad.stats import coefficients
from . import matmul, tokens, vocab
from .parallel import Shards
from .plan import Plan


class Needs(NamedTuple):
    """Which gradients are asked for."""

    dx: bool
    dw: bool
    db: bool


class Dtypes(NamedTuple):
    """The dtypes in which the token loop makes the gradients."""

    dx: torch.dtype
    dw: torch.dtype
    db: torch.dtype | None

    @classmethod
    def of(cls, hidden, weight, bias, dtype, fp16, sharded):
        """Those of the inputs, or of sums in fp32 where something is yet to multiply or to add.

        The rows' may be wider than ``dtype``, that of the products: fp32 rows under autocast get an unrounded gradient.
        """
        sums = matmul.accumulator_dtype
        if fp16 or sharded:
            dx = sums(dtype)
        else:
            dx = hidden.dtype if hidden.dtype.itemsize > dtype.itemsize else dtype
        return cls(dx, *(None if t is None else sums(t.dtype) if fp16 else t.dtype for t in (weight, bias)))


class Options(NamedTuple):
    core: Any  # the implementation of softmax_grad, with the loss's options
    scale_: Any  # and its way to multiply a gradient
    statistics: dict  # the core's arguments that ask for statistics
    loss: LossOptions
    plan: Plan
    dtype: torch.dtype  # of the products
    needs: Needs
    dtypes: Dtypes
    fp16: bool  # whether products or head are in fp16: gradients then stay in fp32 until the upstream scalar comes
    reduce: bool
    return_stats: bool | str
    shards: Shards | None  # of a head that is split over ranks

    def merged(self, rows):
        """The statistics over the whole vocabulary."""
        return rows if self.shards is None else self.shards.merge(rows)


class LinearCrossEntropy(torch.autograd.Function):
    """``losses = scale · loss`` of the kept rows, summed where ``reduce``; and their statistics.

    With the token loop and a reduction, the gradients of the loss are ready at the end of the forward, but for the
    upstream scalar. The first backward hands them out and forgets them; should another follow (``retain_graph``), it
    computes its own, so no gradient is ever shared between two callers. Without a reduction, or with the vocabulary
    loop, backward recomputes.

    Values of each token (``return_stats="tokens"``) have gradients of their own, which only the backward knows. Logits
    that one chunk of tokens holds wait for them, and the first backward makes the gradients in their place. With more
    chunks, or of the vocabulary, a gradient that arrives through a statistic is recomputed, that of the loss with it.

    fp16 holds neither a gradient without the loss scale nor, perhaps, one of a steep loss: there gradients stay in fp32
    until the upstream scalar has multiplied them, and are then rounded once.

    Gradients of gradients repeat the loss in plain torch, over the logits of all kept rows.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, rows, targets, scale, padding, outside, options):
        x = gather(hidden, rows, padding, options.dtype)
        if options.shards is not None:
            targets = targets - options.shards.start
        ctx.options, ctx.differentiable = options, 3
        ctx.logits = ctx.gradients = None
        plan, per_token = options.plan, options.return_stats == "tokens"
        common = (x, weight, bias, targets)
        # In a compiler's trace every statistic has a gradient, if only zeros: that of the loss alone is of no use.
        early = options.reduce and any(options.needs) and not (per_token and torch.compiler.is_compiling())
        if plan.loop == "vocab":
            stats = options.merged(vocab.loss(options.core, *common, plan.chunk, options.statistics))
        elif per_token and tokens.is_one_chunk(plan, len(targets)):
            ctx.logits = tokens.logits(x, weight, bias, plan)
            stats = options.merged(options.core(ctx.logits, targets, **options.statistics))
        elif early:
            stats, ctx.back, ctx.gradients = _token_gradients(*common, RowFactors(scale), options, options.statistics)
        else:
            stats = options.merged(tokens.loss(options.core, *common, plan, options.statistics))
        out = reduce_rows(ctx, stats, options.loss, scale, padding, options.reduce, options.return_stats, outside)
        entropy = out[3] if per_token else None
        ctx.save_for_backward(hidden, weight, bias, rows, targets, scale, padding, outside, stats.lse, entropy)
        return out

    @staticmethod
    def _again(ctx, hidden, weight, bias, rows, targets, scale, padding, outside, lse, entropy):
        options = ctx.options
        if options.shards is not None:
            raise RuntimeError(
                "process_group: the loss of a head that is split over ranks is differentiable once, a gradient at a"
                " time (no create_graph=True, no is_grads_batched=True)"
            )
        asked = options.return_stats == "tokens" and "tokens"
        with plain_products(hidden.device):
            logits = whole_logits(hidden, weight, bias, rows, padding, options.dtype)
            out = composed_loss(
                None,
                logits,
                targets.clamp(0, weight.shape[0] - 1),
                None,
                scale,
                outside,
                padding,
                options.loss,
                options.reduce,
                asked,
            )
        return out if asked else (out,)

    @staticmethod
    @or_again(_again)
    def backward(ctx, grad, *of_stats):
        options = ctx.options
        hidden, weight, bias, rows, targets, scale, padding, outside, lse, entropy = ctx.saved_tensors
        logits, ctx.logits = ctx.logits, None
        gradients, ctx.gradients = ctx.gradients, None
        through_stats = options.return_stats == "tokens" and any(g is not None for g in of_stats)
        if gradients is not None and not through_stats:
            factor = grad if ctx.back is None else grad * ctx.back
        else:
            if through_stats:
                columns = coefficients(options.loss, scale, lse, entropy, grad, of_stats[:3], outside)
                factors = RowFactors(coefficients=columns, lse=lse)
            else:
                known = logits is not None or options.plan.loop == "vocab"
                factors = RowFactors(scale * grad, lse=lse if known else None)
            gradients = None  # of the loss alone
            common = (gather(hidden, rows, padding, options.dtype), weight, bias, targets, factors, options)
            with plain_products(hidden.device):
                if options.plan.loop == "vocab":
                    factor, gradients = None, _vocab_gradients(*common)
                else:
                    _, factor, gradients = _token_gradients(*common, logits=logits)
        if factor is not None:
            for gradient in gradients:
                if gradient is not None:
                    options.scale_(gradient, factor)
        dx, dw, db = gradients
        dw, db = (None if d is None else d.to(t.dtype) for d, t in ((dw, weight), (db, bias)))
        return scatter(dx, hidden, rows, padding), dw, db, *[None] * 6


def gather(hidden, rows, padding, dtype):
    """The kept rows, ``[K, D]``, 0 where ``rows`` is only padded; where all are kept, the hidden states themselves."""
    if padding is not None:  # where row -1 reads the last
        return hidden[rows].masked_fill_(padding[:, None], 0).to(dtype)
    return (hidden if rows.numel() == hidden.shape[0] else hidden[rows]).to(dtype)


def whole_logits(hidden, weight, bias, rows, padding, dtype):
    """The kept rows' logits under autograd, ``[K, V]``; with ``rows`` None all of them.

    ``padding`` are rows that carry no loss: they are 0, whatever stands there. ``weight`` may be ``[V, d1, …, D]``.
    """
    V, *places, D = weight.shape
    P = math.prod(places)
    if rows is None and padding is not None:
        hidden = hidden.masked_fill(padding.reshape(-1, P).all(1)[:, None], 0)
    elif rows is not None and not places:
        hidden = gather(hidden, rows, padding, dtype)
    elif rows is not None:  # what stands where no place carries loss must not reach the products
        used = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        used[rows // P] = True
        hidden = hidden.where(used[:, None], 0)
    logits = F.linear(
        hidden.to(dtype), weight.reshape(-1, D).to(dtype), None if bias is None else bias.reshape(-1).to(dtype)
    )
    if places:
        logits = logits.reshape(hidden.shape[0], V, -1).movedim(1, 2).reshape(-1, V)
        if rows is not None:
            logits = logits[rows]
        elif padding is not None:
            logits = logits.masked_fill(padding[:, None], 0)
    return logits


def scatter(dx, hidden, rows, padding):
    """The gradient of all hidden states: ``dx`` at ``rows``, 0 elsewhere; None stays None."""
    if dx is None:
        return None
    N, D = hidden.shape
    dx = dx.to(hidden.dtype)
    if padding is None:
        return dx if rows.numel() == N else hidden.new_zeros(N, D).index_copy_(0, rows, dx)
    # Row -1 is one row more, which nobody sees.
    return hidden.new_zeros(N + 1, D).index_put_((rows,), dx)[:N]


def plain_products(device):
    """No autocast inside: the op has chosen its dtype, and casting again would round the weight a second time."""
    return without_autocast(device)


def _held_back(factors, options):
    if not options.fp16 or factors.rows == 0:
        return None, factors
    return hold_back(factors, options.loss)


def _token_gradients(x, weight, bias, targets, factors, options, statistics=None, logits=None):
    """``(row statistics, power of two, gradients)``."""
    back, factors = _held_back(factors, options)
    core = options.core if options.shards is None else options.shards.core(options.core)
    stats, gradients = tokens.loss_and_gradients(
        core, x, weight, bias, targets, factors, options.plan, options.needs, options.dtypes, statistics or {}, logits
    )
    return stats, back, _over_ranks(gradients, options)


def _vocab_gradients(x, weight, bias, targets, factors, options):
    back, factors = _held_back(factors, options)
    gradients = vocab.gradients(
        options.core, x, weight, bias, targets, factors, options.plan.chunk, options.needs, back
    )
    return _over_ranks(gradients, options)


def _over_ranks(gradients, options):
    dx, *head = gradients
    return dx if dx is None or options.shards is None else options.shards.sum(dx), *head
