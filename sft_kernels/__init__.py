"""Masked cross-entropy, AdamW and packed attention for supervised fine-tuning."""

__version__ = "0.1.0"

from .ops.adamw.api import AdamW
from .ops.adamw.groups import decay_groups
from .ops.cross_entropy.api import CrossEntropyLoss, cross_entropy
from .ops.linear_cross_entropy.api import LinearCrossEntropyLoss, linear_cross_entropy
from .ops.linear_cross_entropy.kept import KeptTokens
from .ops.packed_attention.api import packed_attention
from .ops.packed_attention.tiles import AttentionTiles
from .ops.softmax_grad.stats import LossStats, TokenStats

__all__ = [
    "AdamW",
    "AttentionTiles",
    "CrossEntropyLoss",
    "KeptTokens",
    "LinearCrossEntropyLoss",
    "LossStats",
    "TokenStats",
    "cross_entropy",
    "decay_groups",
    "linear_cross_entropy",
    "packed_attention",
]
