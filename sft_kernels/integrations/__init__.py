"""In other people's models: importing this makes ``attn_implementation="sft_kernels"`` known to transformers."""

from importlib.util import find_spec

from .attention import register
from .leak import assert_no_leak

__all__ = ["assert_no_leak", "register"]

if find_spec("transformers") is not None:
    register()
