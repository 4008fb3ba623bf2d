"""Which loop, and how large its chunks: the cost model behind ``chunking="auto"``.

With K kept rows, D hidden, V vocabulary, and a machine of B FLOPs per byte of memory traffic, :func:`cost` counts what
both loops compute and move; ``"auto"`` takes the one with less FLOPs + B · bytes.

- ``tokens``: gradients with the forward, 2 · K · D · V FLOPs for each of the products asked for (three in training).
- ``vocab``: one more product to recompute the logits.

Memory beside the inputs and the gradients: the logits of one chunk and the gathered rows; with several chunks of
tokens, or in fp16, a fp32 gradient of the weight (none where the weight is fp32); with vocabulary chunks a fp32
gradient of the rows.
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


def make_plan(K, D, V, itemsize, *, device_type, chunking, max_logits_bytes, grads, accumulator):
    """The loop and its chunk.

    Args:
        K, D, V: kept rows, hidden size, vocabulary.
        itemsize: bytes of a logit.
        chunking: ``"auto"``, ``"tokens"`` or ``"vocab"``.
        max_logits_bytes: bound on the logits that exist at a time; None for the rows at which longer chunks gain
            nothing, plus what several chunks would need as an accumulator: a single chunk needs none.
        grads: how many of the two gradients are asked for, 0 to 2.
        accumulator: bytes that several chunks of tokens would need beside the gradient, 0 where it is its own
            accumulator.
    """
    row, column = matmul.padded(V) * itemsize, max(K, 1) * itemsize
    if max_logits_bytes is None:
        max_logits_bytes = max(_ROWS.get(device_type, _ROWS_DEVICE) * row, column)
        single = max_logits_bytes + accumulator
    else:
        single = max_logits_bytes
    if K * row <= single:
        tokens = Plan("tokens", max(K, 1))
    else:
        tokens = Plan("tokens", _even(K, max_logits_bytes // row))
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
        needed = row if chosen.loop == "tokens" else column
        raise ValueError(
            f"max_logits_bytes: one {'row' if chosen.loop == 'tokens' else 'column'} of logits takes {needed} bytes, "
            f"got {max_logits_bytes}"
        )
    return chosen


def cost(plan, K, D, V, itemsize, *, dx, dw):
    """FLOPs of the products, and the bytes of matrices that a loop reads and writes, forward and backward.

    For a reduction, an upstream gradient of 1 and no bias. The core reads a logit twice and writes it once where it
    makes gradients in the forward, reads it once for statistics, and reads and writes it where the logsumexp is known.
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
        moved += b * (logits + weight) + (1 + 2 * n) * 4 * rows
    if dw:
        moved += b * (logits + n * rows + weight)
    return (2 + grads) * product, moved


def _even(total, largest):
    """The length of equal chunks, none over ``largest``; 0 where not even one fits."""
    if largest < 1:
        return 0
    return -(-total // -(-total // largest)) if total else 1
