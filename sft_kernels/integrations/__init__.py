"""In other people's models: lazy logits by ``patch(model)``, TRL's trainers by ``patch_trl()``, noise by ``neftune``,
and ``attn_implementation="sft_kernels"``, which importing this makes known to transformers."""

import warnings
from importlib.util import find_spec

from .attention import NAME, register, wanted
from .leak import assert_no_leak
from .neftune import neftune
from .patching import HeadCounts, head_counts, patch, unpatch
from .trl import patch_trl, unpatch_trl

__all__ = [
    "NAME",
    "HeadCounts",
    "assert_no_leak",
    "head_counts",
    "neftune",
    "patch",
    "patch_trl",
    "register",
    "unpatch",
    "unpatch_trl",
]

if find_spec("transformers") is not None:
    if message := wanted():
        warnings.warn(message, stacklevel=2)
    else:
        register()
