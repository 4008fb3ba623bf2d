"""Masked cross-entropy, AdamW and packed attention for supervised fine-tuning."""

__version__ = "0.1.0"

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:  # the same names once more, for type checkers and editors
    from .ops.adamw.api import AdamW
    from .ops.adamw.groups import decay_groups
    from .ops.cross_entropy.api import CrossEntropyLoss, cross_entropy
    from .ops.linear_cross_entropy.api import LinearCrossEntropyLoss, linear_cross_entropy
    from .ops.linear_cross_entropy.kept import KeptTokens
    from .ops.packed_attention.api import packed_attention
    from .ops.packed_attention.tiles import AttentionTiles
    from .ops.softmax_grad.stats import LossStats, TokenStats
else:
    # They are loaded when one is first asked for, so that `sft-kernels --help` imports no torch.
    _MODULES = {
        "AdamW": ".ops.adamw.api",
        "AttentionTiles": ".ops.packed_attention.tiles",
        "CrossEntropyLoss": ".ops.cross_entropy.api",
        "KeptTokens": ".ops.linear_cross_entropy.kept",
        "LinearCrossEntropyLoss": ".ops.linear_cross_entropy.api",
        "LossStats": ".ops.softmax_grad.stats",
        "TokenStats": ".ops.softmax_grad.stats",
        "cross_entropy": ".ops.cross_entropy.api",
        "decay_groups": ".ops.adamw.groups",
        "linear_cross_entropy": ".ops.linear_cross_entropy.api",
        "packed_attention": ".ops.packed_attention.api",
    }
    # Modules that importing the package used to import, too.
    _SUBMODULES = ("_backend", "_checks", "_plain", "ops")

    def __getattr__(name):
        if name not in _MODULES and name not in _SUBMODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:  # all of them, so that sft_kernels.ops.adamw is there after any
            homes = {public: _import_module(home, __name__) for public, home in _MODULES.items()}
        except AttributeError as error:  # which would mean that the package has no such name
            raise ImportError(f"{__name__} cannot be imported: {error}") from error
        for public, home in homes.items():
            globals().setdefault(public, getattr(home, public))
        return globals()[name]

    def __dir__():
        return sorted({*globals(), *__all__, *_SUBMODULES})
