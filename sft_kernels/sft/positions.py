"""How long an example may be for a model that looks its positions up in a table."""

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .masking import IGNORE, Example
from .packing import collate, lengths_of
from .progress import say
from .rows import DataError

aten = torch.ops.aten


def most_positions(model, forward):
    """Returns the length of the longest example that ``model`` has positions for, or None if it has no table of them.

    Learned positions (GPT-2, OPT) and sinusoids (GPT-J) are a table with a row for each position. The table is found by
    what is done, not by its name: the model runs on a row of three tokens and on one of five, and a table is whatever
    is indexed by the positions of both and has as many rows in both. Rotary embeddings are computed, so that they have
    no end.

    Args:
        model: a causal LM.
        forward: computes its hidden states, as ``forward(model, batch)``.
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        found = []
        for n in (3, 5):
            example = Example([0] * n, [IGNORE] * n, "")
            with torch.no_grad(), _Tables(n) as tables:
                forward(model, collate([[example]], n, 0).to(device))
            found.append(tables.lengths)
    finally:
        model.train(was_training)
    return min(found[0] & found[1], default=None)


class _Tables(TorchDispatchMode):
    """Collects how many positions there are in each tensor that is indexed by the positions 0 to ``n - 1``."""

    def __init__(self, n):
        super().__init__()
        self.n, self.lengths = n, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function == aten.embedding.default:
            self._see(args[0].shape[0], args[1])
        elif function in (aten.index_select.default, aten.gather.default):
            self._see(args[0].shape[args[1]], args[2])
        elif function == aten.index.Tensor:
            for dim, index in enumerate(args[1]):
                if index is not None:
                    self._see(args[0].shape[dim], index)
        return function(*args, **(kwargs or {}))

    def _see(self, rows, index):
        if index.dtype not in (torch.int64, torch.int32) or not index.numel() or index.numel() % self.n:
            return
        of_token = index.reshape(self.n, -1)  # a gather repeats the index of a token
        beyond = of_token - torch.arange(self.n, device=index.device)[:, None]
        if bool((beyond == beyond[0, 0]).all()):
            self.lengths.add(rows - int(beyond[0, 0]))


def without_longer(examples, most, skip_bad=False):
    """The examples of at most ``most`` tokens; all of them if it is None.

    Raises :class:`~.rows.DataError` for the first that is longer. With ``skip_bad`` longer ones are left out and
    reported, and it is raised only if none is left.
    """
    if most is None:
        return examples
    lengths = lengths_of(examples)
    fits, long = np.flatnonzero(lengths <= most), np.flatnonzero(lengths > most)

    def refusal(example):
        path, _, line = example.source.rpartition(":")
        reason = f"{len(example.input_ids)} tokens, longer than the {most} positions that the model has"
        return DataError(path, line, reason)

    if len(long) and (not skip_bad or not len(fits)):
        raise refusal(examples[int(long[0])])
    for i in long[:20]:
        say(f"skipped {refusal(examples[int(i)])}")
    if len(long):
        say(f"skipped {len(long)} lines that are longer than the model's positions")
    return examples.choose(fits) if len(long) else examples
