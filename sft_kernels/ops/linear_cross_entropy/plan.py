"""Which loop, and how large its chunks: the cost model behind ``chunking="auto"``.

With K kept rows, D hidden, V vocabulary, and a machine of B FLOPs per byte of memory traffic, :func:`cost` counts what
both loops compute and move; ``"auto"`` takes the one with less FLOPs + B · bytes.

- ``tokens``: gradients with the forward, 2 · K · D · V FLOPs for each of the products asked for (three in training).
- ``vocab``: one more product to recompute the logits.

Memory beside the inputs and the gradients: the logits of one chunk and the gathered rows; with several chunks of
tokens, or in fp16, a fp32 gradient of the weight (none where the weight is fp32); with vocabulary chunks a fp32
gradient of the rows.

A head of another dtype than the products is cast for them. The vocabulary loop casts its chunk, which counts as the
chunk's logits do. The token loop reads the head twice a chunk. It casts a head that is wider than the products (fp32
under autocast) once, if the copy [V, D] fits in ``max_logits_bytes`` beside logits of a length that gains nothing from
more; by default there is room for it, half of the accumulator that such a head does not need. Else each product casts a
slice of the vocabulary at a time.
"""

from typing import NamedTuple

from . import matmul

# Rows past which a longer chunk gains nothing: the products are at full rate, the weight's re-reads are hidden.
_ROWS = {"cpu": 1024}
_ROWS_DEVICE = 4096
# FLOPs that cost as much as a byte. H200, bf16: 790 TFLOP/s over 4.3 TB/s; two CPU cores: 100 GFLOP/s over 10 GB/s.
_BALANCE = {"cpu": 10}
_BALANCE_DEVICE = 184


class Plan(NamedTuple):
    loop: str  # "tokens" or "vocab"
    chunk: int  # rows, or columns, of logits that exist at a time
    copy: bool = False  # of tokens: whether the head is cast to the products' dtype as a whole


def make_plan(K, D, V, dtype, head_dtype, *, device_type, chunking, max_logits_bytes, grads, accumulator):
    """The loop and its chunk.

    Args:
        K, D, V: kept rows, hidden size, vocabulary.
        dtype, head_dtype: of the products, hence of the logits, and of the weight.
        chunking: ``"auto"``, ``"tokens"`` or ``"vocab"``.
        max_logits_bytes: bound on the logits that exist at a time and the copy of the weight; None for the rows at
            which longer chunks gain nothing and the copy, plus what several chunks would need as an accumulator: a
            single chunk needs none.
        grads: how many of the two gradients are asked for, 0 to 2.
        accumulator: bytes that several chunks of tokens would need beside the gradient, 0 where it is its own
            accumulator.
    """
    itemsize = dtype.itemsize
    row, column = matmul.padded(V) * itemsize, max(K, 1) * itemsize
    enough = _ROWS.get(device_type, _ROWS_DEVICE)
    wider = head_dtype.itemsize > itemsize
    head = V * D * itemsize if wider else 0
    if max_logits_bytes is None:
        max_logits_bytes = max(enough * row, column) + head
        single = max_logits_bytes + accumulator
    else:
        single = max_logits_bytes
    copy = wider and min(K, enough) * row <= max_logits_bytes - head
    taken = head if copy else 0
    if K * row <= single - taken:
        tokens = Plan("tokens", max(K, 1), copy)
    else:
        tokens = Plan("tokens", _even(K, (max_logits_bytes - taken) // row), copy)
    if head_dtype != dtype:
        column += D * itemsize
    room = max_logits_bytes // column
    columns = _even(V, room)
    vocab = Plan("vocab", min(matmul.padded(columns), room // 8 * 8) if columns >= 8 else columns)

    if chunking != "auto":
        chosen = tokens if chunking == "tokens" else vocab
    elif tokens.chunk == 0 or vocab.chunk == 0:
        chosen = tokens if vocab.chunk == 0 else vocab
    else:
        balance = _BALANCE.get(device_type, _BALANCE_DEVICE)
        costs = [cost(plan, K, D, V, itemsize, dx=grads > 0, dw=grads > 1) for plan in (tokens, vocab)]
        token_cost, vocab_cost = (flops + balance * moved for flops, moved in costs)
        chosen = tokens if token_cost <= vocab_cost else vocab
    if chosen.chunk == 0:
        one, needed = ("row of logits", row) if chosen.loop == "tokens" else ("column of logits", column)
        if chosen.loop == "vocab" and head_dtype != dtype:
            one += f", with the cast row of the head, {D} elements,"
        raise ValueError(f"max_logits_bytes: one {one} takes {needed} bytes, got {max_logits_bytes}")
    return chosen


def cost(plan, K, D, V, itemsize, *, dx, dw):
    """FLOPs of the products, and the bytes of matrices that a loop reads and writes, forward and backward.

    For a reduction, an upstream gradient of 1, no bias and a head that is not cast. The core reads a logit twice and
    writes it once where it makes gradients in the forward, reads it once for statistics, and reads and writes it where
    the logsumexp is known.
    """
    grads, b = dx + dw, itemsize
    rows, weight, logits = K * D, V * D, K * V
    product = 2 * K * D * V
    if plan.loop == "tokens":
        n = max(1, -(-K // plan.chunk))
        moved = b * (rows + n * weight + logits)  # x, W → logits
        moved += b * logits * (3 if grads else 1)
        if dx:
            moved += b * (logits + n * weight + rows)
        if dw:
            moved += b * (logits + rows + weight)
            if n > 1:  # summed in fp32: every chunk but the first reads it too, and the last is rounded
                moved += (4 - b) * weight + (n - 1) * 8 * weight + ((4 + b) * weight if b < 4 else 0)
        return (1 + grads) * product, moved
    n = -(-V // plan.chunk)
    logit_bytes = b * (n * rows + weight + logits)
    if not grads:
        return product, logit_bytes + b * logits
    moved = 2 * logit_bytes + b * logits * (1 + 2)
    if dx:  # in fp32
        moved += b * (logits + weight) + (2 * n - 1) * 4 * rows
    if dw:
        moved += b * (logits + n * rows + weight)
    return (2 + grads) * product, moved


def _even(total, largest):
    """The length of equal chunks, none over ``largest``; 0 where not even one fits."""
    if largest < 1:
        return 0
    return -(-total // -(-total // largest)) if total else 1
