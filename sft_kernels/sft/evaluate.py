"""The masked loss of a model on held-out examples."""

from typing import NamedTuple

import torch

from .. import linear_cross_entropy
from .model import head, hidden_states


class Loss(NamedTuple):
    """Means over the kept tokens of all batches."""

    loss: float  # nats a token
    accuracy: float
    entropy: float  # nats a token
    kept: int


@torch.no_grad()
def masked_loss(model, batches, device):
    """The :class:`Loss` of ``model`` over packed batches, one denominator for all of them."""
    was_training = model.training
    model.eval()
    totals, kept = None, 0
    for batch in batches:
        kept += batch.kept.count
        moved = batch.to(device)
        hidden = hidden_states(model, moved)
        _, stats = linear_cross_entropy(hidden, **head(model), shift=True, kept=moved.kept, return_stats=True)
        sums = torch.stack([stats.nll_sum.double(), stats.correct.double(), stats.entropy_sum.double()])
        totals = sums if totals is None else totals + sums
    model.train(was_training)
    if not kept:
        raise ValueError("batches: no kept token to evaluate on")
    return Loss(*(totals / kept).tolist(), kept)
