"""What a run would train on, before it runs: tokens beside their shifted labels, and what packing saves."""

import numpy as np

from .masking import IGNORE
from .packing import lengths_of, pack

_BATCH = 8  # of the padded batches that packing is compared with


def label_table(example, tokenizer):
    """A line per position: the token, and the token that the hidden state there is trained to predict (· for none)."""

    def show(token):
        return repr(tokenizer.decode([token], skip_special_tokens=False))[1:-1]

    shifted = [*example.labels[1:], IGNORE]
    lines = [
        f"{example.source}: {len(example.input_ids)} tokens, {example.kept} kept",
        f"{'':>6} {'token':<24} predicts",
    ]
    for position, (token, label) in enumerate(zip(example.input_ids, shifted, strict=True)):
        lines.append(f"{position:>6} {show(token):<24} {'·' if label == IGNORE else show(label)}")
    return "\n".join(lines)


def summary(examples, row_tokens):
    """Counts of a data set, as lines: kept share, padding of batches and of packed rows, what packing saves.

    The padded batches are eight examples each in the order given, filled up to their longest.
    """
    lengths = lengths_of(examples)
    tokens, kept = int(lengths.sum()), int(examples.kept.sum())
    rows = len(pack(lengths, row_tokens))
    starts = np.arange(0, len(lengths), _BATCH)
    sizes = np.diff(np.append(starts, len(lengths)))
    padded, packed = int((sizes * np.maximum.reduceat(lengths, starts)).sum()), rows * row_tokens
    return "\n".join(
        [
            f"examples        {len(examples)}",
            f"tokens          {tokens} (mean {tokens / len(examples):.1f}, longest {max(lengths)})",
            f"kept            {kept} ({kept / tokens:.1%})",
            f"padded          {padded} tokens in batches of {_BATCH}, {1 - tokens / padded:.1%} padding",
            f"packed          {packed} tokens in {rows} rows of {row_tokens}, {1 - tokens / packed:.1%} padding",
            f"packing saves   {1 - packed / padded:.1%} of the padded tokens",
        ]
    )
