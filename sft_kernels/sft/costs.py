"""Works out what a planned run costs: bytes a GPU, and FLOPs a step.

``plan`` is a :class:`~.plan.Plan` throughout, checked.
"""

from typing import NamedTuple

import torch

from .._terminal import printable
from ..ops.linear_cross_entropy import matmul
from ..ops.linear_cross_entropy.plan import make_plan
from .activations import Counted, count, read_config
from .llama3 import nearest
from .precision import dtype_of

# Bytes a parameter, as precision.py has them kept: (parameter, gradient, moments, master).
STATES = {"fp32": (4, 4, 8, 0), "bf16+master": (2, 2, 8, 2), "bf16+stochastic": (2, 2, 8, 0)}
COLUMNS = ("no sharding", "ZeRO-1", "FSDP")


class Shape(NamedTuple):
    """The model of a plan, with one micro-batch of it counted."""

    name: str
    parameters: float  # those asked for, to which whole layers do not quite come
    counted: Counted


class Loss(NamedTuple):
    """Bytes of :func:`sft_kernels.linear_cross_entropy`, by the loop that it chooses on a GPU."""

    loop: str
    chunk: int  # rows or columns of logits at a time
    logits: int
    head: int  # a copy in bf16, a sum in fp32, a gradient beside that of earlier micro-batches
    hidden: int  # kept rows, and their gradient

    @property
    def total(self):
        return self.logits + self.head + self.hidden


def shape_of(plan):
    """The :class:`Shape` of the plan's model."""
    forward = plan.examples_of_a_batch, dtype_of(plan.parameters), plan.casts
    if plan.model:
        counted = count(read_config(plan.model, plan.trust_remote_code), *forward)
        name = printable(plan.model)
        return Shape(name if len(name) <= 50 else f"…{name[-49:]}", counted.parameters, counted)
    shape, published = nearest(plan.params)
    name = f"shape of {shape.name}"
    if shape != published:
        name += f" with {shape.layers:,} layers in place of {published.layers}"
    return Shape(name, plan.params, count(shape.config(), *forward))


def memory(plan, shape, loss):
    """Returns ``[(name, bytes a GPU in each of COLUMNS)]``; None stands for what there is not."""
    counted, n = shape.counted, plan.gpus
    weights, gradients, moments, masters = (each * shape.parameters for each in STATES[plan.parameters])
    # Outside of the layers all is whole, also its gradients. Of the layers one is whole with its
    # gradients, and the parameters of the next are on their way.
    gathered = plan.computed.itemsize * (2 * counted.outside + 3 * counted.layer)
    rows = [
        ("parameters", (weights, weights, weights / n)),
        ("gradients", (gradients, gradients, gradients / n)),
        ("moments", (moments, moments / n, moments / n)),
        ("masters", (masters, masters / n, masters / n)),
        ("bf16 copies of weights", (counted.copies, counted.copies, None)),
        ("units gathered", (None, None, gathered)),
        ("logits and loss", (loss.total,) * 3),
    ]
    before = [sum(column[i] or 0 for _, column in rows) for i in range(3)]
    kept = [("", counted.kept)]
    if counted.between is not None:
        kept.append((", checkpointed", counted.between + counted.largest))
    for how, each in kept:
        rows += [(f"activations{how}", (each,) * 3), (f"total{how}", tuple(bytes + each for bytes in before))]
    return rows


def loss_of(plan, counted):
    """The :class:`Loss` of one micro-batch."""
    (V, D), K, dtype, head = counted.head, plan.kept_of_a_batch, plan.computed, dtype_of(plan.parameters)
    accumulator = 0 if head == torch.float32 else V * D * 4
    chosen = make_plan(
        K, D, V, dtype, head, device_type="cuda", chunking="auto", max_logits_bytes=None, grads=2,
        accumulator=accumulator,
    )  # fmt: skip
    item = dtype.itemsize
    if chosen.loop == "vocab":
        logits, gradient = K * chosen.chunk * item, 4
        of_head = 0 if head == dtype else chosen.chunk * D * item
    else:
        logits, gradient = chosen.chunk * matmul.padded(V) * item, max(counted.hidden.itemsize, item)
        of_head = V * D * item if chosen.copy else 0
        of_head += accumulator if chosen.chunk < K else 0
        of_head += V * D * head.itemsize if plan.accumulate > 1 else 0
    copied = counted.hidden != dtype or plan.tokens_of_a_batch > K
    return Loss(chosen.loop, chosen.chunk, logits, of_head, K * D * (gradient + (item if copied else 0)))


def plain_logits(plan, counted):
    """Bytes that ``F.cross_entropy(head(hidden).float(), labels)`` and its backward hold at most.

    All positions have logits; in fp32 their log-softmax, the gradient by it and the gradient by the
    logits; and there is the head that autocast copies.
    """
    V, D = counted.head
    return plan.tokens_of_a_batch * V * (plan.computed.itemsize + 3 * 4) + (V * D * 2 if plan.casts else 0)


def flops(plan, shape):
    """Returns ``(products, attention, again)``: FLOPs of one step of all GPUs.

    Backward has two products for each one of the forward, and twice the attention. ``again`` is what
    checkpointing adds, the forward of the layers once more.
    """
    counted, (V, D) = shape.counted, shape.counted.head
    layers = counted.products + 2 * (shape.parameters - counted.parameters) * plan.tokens_of_a_batch
    products = 3 * (layers + 2 * V * D * plan.kept_of_a_batch)
    times = plan.gpus * plan.accumulate
    return products * times, 3 * counted.attention * times, (layers + counted.attention) * times
