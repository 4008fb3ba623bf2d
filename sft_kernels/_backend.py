"""Which implementation of an op runs here, and why not another.

Implementations are named by import strings and loaded on first use, so that importing the package loads none of them.
"""

import os
import sys
from importlib import import_module
from importlib.util import find_spec

import torch

IMPLS = ("torch", "triton", "cuda", "flash")

_IMPLEMENTATIONS = {
    "softmax_grad": {
        "torch": "sft_kernels.ops.softmax_grad.torch_impl:softmax_grad",
        "triton": "sft_kernels.ops.softmax_grad.triton_impl:softmax_grad",
        "cuda": "sft_kernels.ops.softmax_grad.cuda_impl:softmax_grad",
    },
    "scale_": {
        "torch": "sft_kernels.ops.softmax_grad.torch_impl:scale_",
        "triton": "sft_kernels.ops.softmax_grad.triton_impl:scale_",
        "cuda": "sft_kernels.ops.softmax_grad.triton_impl:scale_",
    },
    "adamw": {
        "torch": "sft_kernels.ops.adamw.torch_impl:step",
        "triton": "sft_kernels.ops.adamw.triton_impl:step",
        "cuda": "sft_kernels.ops.adamw.cuda_impl:step",
    },
    "packed_attention": {
        "torch": "sft_kernels.ops.packed_attention.torch_impl:packed_attention",
        "triton": "sft_kernels.ops.packed_attention.triton_impl:packed_attention",
        "flash": "sft_kernels.ops.packed_attention.flash_impl:packed_attention",
    },
}


class Unavailable(RuntimeError):
    """An implementation that cannot do here what was asked of it; the message says which requirement is missing."""


def implementations(op):
    """The names of the implementations that ``op`` has, whether or not they run here."""
    return tuple(_IMPLEMENTATIONS[op])


def named(op, impl):
    """Returns ``(impl, source)``: the name that holds, and whether ``impl`` or the environment gave it.

    ``SFT_KERNELS_IMPL`` replaces ``"auto"`` if it is set. Raises ``ValueError`` for a name that is none,
    :class:`Unavailable` for one that ``op`` does not have.
    """
    source = "impl"
    if impl == "auto":
        impl = os.environ.get("SFT_KERNELS_IMPL") or "auto"
        source = "SFT_KERNELS_IMPL"
    if impl not in ("auto", *IMPLS):
        raise ValueError(f"{source}: expected one of {('auto', *IMPLS)}, got {impl!r}")
    available = _IMPLEMENTATIONS[op]
    if impl not in ("auto", *available):
        raise Unavailable(f"{source}={impl!r}: {op} has no such implementation; it has {', '.join(available)}")
    return impl, source


def instead(source):
    """Returns what to ask for if only torch's code serves a call, in words; ``source`` gave the name that was asked."""
    return "use impl='torch' or 'auto'" if source == "impl" else f"use impl='torch', or unset {source}"


def resolve(op, impl="auto", device=None, needs_torch=None, needs_triton=None):
    """The callable that implements ``op`` on ``device`` (None: the CPU).

    ``impl="auto"`` takes ``SFT_KERNELS_IMPL`` where that is set, else the best implementation that runs here: Triton on
    a GPU. ``needs_torch`` says what of the call our own kernels do not carry, if anything: ``"auto"`` then takes
    torch's code (``"flash"`` says itself what its libraries lack). ``needs_triton`` says what of it the CUDA kernels do
    not carry.

    Raises ``ValueError`` for a name that is none, :class:`Unavailable` for one that cannot run here, with the reason.
    """
    impl, source = named(op, impl)
    available = _IMPLEMENTATIONS[op]
    if impl == "auto":
        triton = "triton" in available and not needs_torch and not _why_no_triton(device, interpreted=False)
        impl = "triton" if triton else "torch"
    reason = None
    if impl in ("triton", "cuda") and needs_torch:
        reason = f"{needs_torch} are torch's own code; {instead(source)}"
    elif impl == "triton":
        reason = _why_no_triton(device, interpreted=True)
    elif impl == "cuda":
        reason = f"the CUDA kernels have no {needs_triton}; Triton's have" if needs_triton else _why_no_cuda(device)
    if reason:
        raise Unavailable(f"{source}={impl!r}: {reason}")
    return _load(available[impl])


def _why_no_triton(device, interpreted):
    """Why Triton cannot run on ``device``, ``interpreted`` on a CPU or compiled; None where it can."""
    if not _has_triton():
        return "triton is not installed"
    if device is None or device.type == "cpu":
        if not interpreted or os.environ.get("TRITON_INTERPRET") != "1":
            return "needs a GPU (or, to be interpreted on a CPU, TRITON_INTERPRET=1 before triton is imported)"
    elif device.type != "cuda":
        return f"needs a CUDA device, got {device}"
    return None


def _has_triton():
    return find_spec("triton") is not None


def _why_no_cuda(device):
    return import_module("sft_kernels._csrc").why_not(device)


def _load(target):
    module, name = target.split(":")
    _import(module)
    return getattr(sys.modules[module], name)


def _import(module):
    import_module(module)


# A compiler need not look inside. torch.compiler.assume_constant_result says so too, but imports the compiler, and
# with it triton.
for _function in (_import, _has_triton, _why_no_cuda):
    _function._dynamo_marked_constant = True


def checks_enabled(device):
    """Whether device data may be read to check it: on the CPU, elsewhere under ``SFT_KERNELS_CHECK=1``, and not in what
    ``torch.compile`` traces."""
    if torch.compiler.is_compiling():
        return False
    return device.type == "cpu" or os.environ.get("SFT_KERNELS_CHECK") == "1"
