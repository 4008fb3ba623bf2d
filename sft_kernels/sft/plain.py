"""The plain PyTorch way to train, to compare ours with: padded batches, all logits, torch's own loss and AdamW."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from .. import AdamW, KeptTokens, decay_groups, linear_cross_entropy
from ..ops.softmax_grad.composed import torch_cross_entropy
from . import model as models
from .masking import IGNORE
from .run import Run

_TorchAdamW = AdamW.__base__  # whatever the name torch.optim.AdamW stands for


class PaddedBatch(NamedTuple):
    """Examples, one a row, filled up on the right to the longest of them."""

    input_ids: torch.Tensor  # int64 [B, S]
    attention_mask: torch.Tensor  # int64 [B, S]
    labels: torch.Tensor  # int64 [B, S], not yet shifted
    kept: KeptTokens  # shift=True
    token_weight: torch.Tensor | None  # fp32 [B, S]

    @property
    def inputs(self):
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    @property
    def tokens(self):
        return self.input_ids.numel()

    @property
    def examples(self):
        return len(self.input_ids)

    rows = examples

    def to(self, device):
        moved = {
            name: value.to(device, non_blocking=True) for name, value in self._asdict().items() if hasattr(value, "to")
        }
        return self._replace(**moved)


def pad(examples, pad_id, weigh_examples=False):
    """The :class:`PaddedBatch` of some examples; ``weigh_examples`` as in :func:`~.packing.collate`."""
    ids = [torch.tensor(example.input_ids) for example in examples]
    labels = [torch.tensor(example.labels) for example in examples]
    labels = pad_sequence(labels, batch_first=True, padding_value=IGNORE)
    mask = pad_sequence([torch.ones_like(t) for t in ids], batch_first=True)
    weight = None
    if weigh_examples:
        weight = torch.tensor([[1 / example.kept] for example in examples]).expand(labels.shape)
    return PaddedBatch(
        pad_sequence(ids, batch_first=True, padding_value=pad_id),
        mask,
        labels,
        KeptTokens.from_labels(labels, IGNORE, shift=True),
        weight,
    )


class Padded(Run):
    """Our loss and our optimiser over padded batches, which are the examples of each micro-batch."""

    def batch(self, rows):
        examples = [example for row in rows for example in row]
        return pad(examples, self.ready.pad_id, self.recipe.weigh == "examples")

    def loss(self, batch, num_items):
        base = models.causal_lm(self.model).base_model
        return linear_cross_entropy(
            base(**batch.inputs, use_cache=False).last_hidden_state,
            **models.head(self.model),
            shift=True,
            kept=batch.kept,
            token_weight=batch.token_weight,
            num_items=num_items,
        )


class Plain(Padded):
    """Nothing of ours but the order of the data, the labels and the schedule."""

    def __init__(self, ready, **options):
        super().__init__(ready, **options)
        ours = self.parts.optimizer
        optimizer = _TorchAdamW(
            decay_groups(self.model, self.recipe.weight_decay),
            lr=self.recipe.lr,
            betas=ours.defaults["betas"],
            eps=ours.defaults["eps"],
            fused=True if self.device.type == "cuda" else None,
        )
        self.parts = self.parts._replace(optimizer=optimizer)

    def loss(self, batch, num_items):
        logits = self.model(**batch.inputs, use_cache=False).logits.flatten(0, 1).float()
        # As transformers does it: labels are shifted, since a slice of the logits would be a copy of them.
        targets = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORE).flatten()
        if batch.token_weight is None:
            return torch_cross_entropy(logits, targets, reduction="sum") / num_items
        losses = torch_cross_entropy(logits, targets, reduction="none")
        return (losses * F.pad(batch.token_weight[:, 1:], (0, 1)).flatten()).sum() / num_items

    def update(self, step):
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
        self.parts.optimizer.step()
        return {"grad_norm": norm}
