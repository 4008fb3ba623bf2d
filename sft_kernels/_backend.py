"""Which implementation of an op runs here, and why not another.

Implementations are named by import strings and loaded on first use, so that importing the package loads none of them.
"""

import os
from importlib import import_module

IMPLS = ("torch", "triton", "cuda", "flash")

_IMPLEMENTATIONS = {
    "softmax_grad": {"torch": "sft_kernels.ops.softmax_grad.torch_impl:softmax_grad"},
    "adamw": {"torch": "sft_kernels.ops.adamw.torch_impl:step"},
    "packed_attention": {
        "torch": "sft_kernels.ops.packed_attention.torch_impl:packed_attention",
        "flash": "sft_kernels.ops.packed_attention.flash_impl:packed_attention",
    },
}


class Unavailable(RuntimeError):
    """An implementation that cannot do here what was asked of it; the message says which requirement is missing."""


def implementations(op):
    """The names of the implementations that ``op`` has, whether or not they run here."""
    return tuple(_IMPLEMENTATIONS[op])


def resolve(op, impl="auto"):
    """The callable that implements ``op``.

    ``impl="auto"`` takes ``SFT_KERNELS_IMPL`` where that is set, else the best implementation that runs here.
    Raises ``ValueError`` for a name that is none, :class:`Unavailable` for one that cannot run here, with the reason.
    """
    source = "impl"
    if impl == "auto":
        impl = os.environ.get("SFT_KERNELS_IMPL") or "auto"
        source = "SFT_KERNELS_IMPL"
    if impl == "auto":
        impl = "torch"
    if impl not in IMPLS:
        raise ValueError(f"{source}: expected one of {('auto', *IMPLS)}, got {impl!r}")
    available = _IMPLEMENTATIONS[op]
    if impl not in available:
        raise Unavailable(f"{source}={impl!r}: {op} has no such implementation; it has {', '.join(available)}")
    module, name = available[impl].split(":")
    return getattr(import_module(module), name)


def checks_enabled(device):
    """Whether device data may be read to check it: always on the CPU, elsewhere under ``SFT_KERNELS_CHECK=1``."""
    return device.type == "cpu" or os.environ.get("SFT_KERNELS_CHECK") == "1"
