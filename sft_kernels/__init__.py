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
    # A public name is loaded when it is first asked for, so that `sft-kernels --help` imports no torch.
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
    # Importing the package used to import these too.
    _SUBMODULES = ("_backend", "_checks", "_plain", "ops")

    def __getattr__(name):
        if name in _MODULES:
            globals()[name] = value = getattr(_load(_MODULES[name]), name)
            return value
        if name in _SUBMODULES:
            for module in _MODULES.values():
                _load(module)
            return globals()[name]  # where importing a submodule puts it
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__, *_SUBMODULES})

    def _load(module):
        try:
            return _import_module(module, __name__)
        except AttributeError as error:  # which would mean that the package has no such name
            raise ImportError(f"{__name__}{module} cannot be imported: {error}") from error
