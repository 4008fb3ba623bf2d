"""Which loop, and how large its chunks: the cost model behind ``chunking="auto"``.

With K kept rows, D hidden, V vocabulary, b bytes a logit, and a machine of B FLOPs per byte of memory traffic:

- ``tokens``: gradients with the forward, 2 · K · D · V FLOPs for each of the products asked for (three in training).
  Every chunk reads the weight once per product and reads and writes the weight's gradient once.
- ``vocab``: one more product to recompute the logits. Every chunk reads the rows once per product and reads and writes
  the fp32 gradient of the rows; the weight and its gradient pass once.

Memory beside the inputs and the gradients: the logits of one chunk and the gathered rows, and with several chunks of
tokens a fp32 gradient of the weight (none where the weight is fp32), with vocabulary chunks a fp32 gradient of the
rows.
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
        product = 2 * K * D * V
        passes = grads > 0
        token_bytes = -(-K // tokens.chunk) * D * V * ((1 + grads) * itemsize + 8 * passes)
        vocab_bytes = -(-V // vocab.chunk) * D * K * ((1 + passes + grads) * itemsize + 8 * passes)
        token_cost = (1 + grads) * product + balance * token_bytes
        vocab_cost = (1 + passes + grads) * product + balance * vocab_bytes
        chosen = tokens if token_cost <= vocab_cost else vocab
    if chosen.chunk == 0:
        needed = row if chosen.loop == "tokens" else column
        raise ValueError(
            f"max_logits_bytes: one {'row' if chosen.loop == 'tokens' else 'column'} of logits takes {needed} bytes, "
            f"got {max_logits_bytes}"
        )
    return chosen


def _even(total, largest):
    """The length of equal chunks, none over ``largest``; 0 where not even one fits."""
    if largest < 1:
        return 0
    return -(-total // -(-total // largest)) if total else 1
