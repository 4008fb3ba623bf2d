"""Packed attention by a FlashAttention that is installed: flash-attn 4, 3 or 2, else torch's own ``varlen_attn``.

Untested on a GPU: the adapters are held to the libraries' recorded signatures and conventions alone
(tests/ops/flash_signatures.py). What the libraries leave undefined is defined here: they write neither the output nor
the gradients of rows that are in no segment.
"""

import inspect
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import NamedTuple

import torch

from ..._backend import Unavailable
from .segments import attend_nothing, segment_lengths


class Options(NamedTuple):
    """What all libraries are asked in the words of :func:`sft_kernels.packed_attention`."""

    scale: float | None
    window_size: tuple[int, int]  # -1 for no bound; causal where right is 0
    softcap: float | None
    return_lse: bool
    gradient: bool = False  # whether one will be asked for

    @property
    def causal(self):
        return self.window_size[1] == 0


def packed_attention(query, key, value, cu_seqlens, max_seqlen, lengths, *, tiles, **options):
    """See :func:`sft_kernels.packed_attention`; the lse is None unless asked for, ``tiles`` are not needed.

    ``lengths`` are the segments', None where the boundaries were not read. Then without ``max_seqlen`` they are read on
    the host, a sync; with it they are forced into the row, so that no library reads past it.
    """
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    options = Options(**options, gradient=gradient)
    attend = choose(query, key, options)
    T = query.shape[0]
    ragged = True  # whether there may be rows behind the last segment
    bounds = cu_seqlens.to(query.device, torch.int32).contiguous()
    if lengths is None and max_seqlen is None:
        lengths = segment_lengths(cu_seqlens, T, max_seqlen)
    if lengths is not None:
        max_seqlen, ragged = max(lengths, default=0), sum(lengths) < T
    elif bounds.numel() > 1:
        bounds = bounds.cummax(0).values.clamp(0, T)
    if T == 0 or bounds.numel() == 1 or max_seqlen == 0:
        return attend_nothing(query, key, value)
    tail = torch.arange(T, device=query.device) >= bounds[-1] if ragged else None
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    if ragged:
        q, k, v = (_ZeroGradient.apply(t, tail) for t in (q, k, v))
    # FlashAttention-2 takes a bound of one for exactly one token a segment and regroups the rows by it.
    out, lse = attend(q, k, v, bounds, max(max_seqlen, 2), options)
    if ragged:
        out = out.masked_fill(tail[:, None, None], 0)
        lse = lse.masked_fill(tail, -torch.inf) if options.return_lse else None
    return out, lse


class _ZeroGradient(torch.autograd.Function):
    """``tensor`` as it is, with a gradient of zero in ``rows`` whatever came from behind."""

    @staticmethod
    def forward(ctx, tensor, rows):
        ctx.save_for_backward(rows)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        (rows,) = ctx.saved_tensors
        return gradient.masked_fill(rows[:, None, None], 0), None


class Library(NamedTuple):
    """One FlashAttention: where its function is, what it cannot do, and how it is called."""

    name: str
    modules: tuple[str, ...]  # of which the first that imports is taken
    function: str
    lacks: Callable  # (query, key, options, compute capability, names of the function's parameters) → reason or None
    call: Callable  # (function, q, k, v, bounds, max_seqlen, options) → out, lse or None


def choose(query, key, options):
    """The newest library here that computes ``options``, as ``attend(q, k, v, bounds, max_seqlen, options)``.

    Raises :class:`Unavailable` with what each of them lacks.
    """
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise Unavailable(f"impl='flash': query must be fp16 or bf16, got {query.dtype}")
    capability = compute_capability(query.device)
    if capability is None:
        raise Unavailable(f"impl='flash': query must be on an NVIDIA GPU, got {query.device}")
    reasons = []
    for library in LIBRARIES:
        function, reason = _load(library.modules, library.function)
        if function is not None:
            reason = library.lacks(query, key, options, capability, _parameters(function))
            if reason is None:
                return partial(library.call, function)
        reasons.append(f"{library.name}: {reason}")
    raise Unavailable("impl='flash': no FlashAttention here computes this. " + "; ".join(reasons))


def compute_capability(device):
    """``(major, minor)`` of an NVIDIA GPU, None for any other device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.cuda else None


@cache
def _load(modules, name):
    """The function and None, or None and why it cannot be had."""
    reasons = []
    for module in modules:
        try:
            return getattr(import_module(module), name), None
        except (ImportError, AttributeError) as error:
            reasons.append(str(error))
    return None, f"not installed ({', '.join(reasons)})"


@cache
def _parameters(function):
    return frozenset(inspect.signature(function).parameters)


def _head_dim(query, largest):
    d = query.shape[2]
    return f"head dimensions are multiples of 8 up to {largest}, not {d}" if d % 8 or d > largest else None


def _flash_attn_4_lacks(query, key, options, capability, parameters):
    if capability[0] not in (9, 10, 11):
        return f"trains on compute capability 9, 10 and 11, this device has {capability[0]}.{capability[1]}"
    if not {"deterministic", "return_lse"} <= parameters:
        return "this version has no return_lse"
    if options.gradient and "score_mod_bwd" not in parameters:  # early betas refuse these
        if options.softcap is not None:
            return "the backward of this version has no softcap"
        if capability[0] == 9 and options.window_size not in ((-1, -1), (-1, 0)):
            return "the backward of this version has no window on compute capability 9"
        if capability[0] == 9 and torch.are_deterministic_algorithms_enabled():
            return "the backward of this version is not deterministic on compute capability 9"
    return _head_dim(query, 256 if capability[0] == 9 else 128)


def _flash_attn_4(function, q, k, v, bounds, max_seqlen, options):
    return function(
        q,
        k,
        v,
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        softmax_scale=options.scale,
        causal=options.causal,
        window_size=tuple(None if size < 0 else size for size in options.window_size),  # -1 is a place here
        softcap=options.softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        return_lse=options.return_lse,
    )


def _flash_attn_3_lacks(query, key, options, capability, parameters):
    if capability[0] != 9:
        return f"needs compute capability 9, this device has {capability[0]}.{capability[1]}"
    if "return_attn_probs" not in parameters:
        return "this version has no return_attn_probs"
    # Its deterministic backward refuses heads of 256, to which it rounds what is above 192.
    return _head_dim(query, 192 if torch.are_deterministic_algorithms_enabled() else 256)


def _flash_attn_2_lacks(query, key, options, capability, parameters):
    if capability[0] < 8:
        return f"needs compute capability 8, this device has {capability[0]}.{capability[1]}"
    if "softcap" not in parameters:  # came with version 2.6, as did an lse of [Hq, T]
        return "needs version 2.6"
    return None if query.shape[2] <= 256 else f"head dimensions reach 256, not {query.shape[2]}"


def _flash_attn_2_or_3(function, q, k, v, bounds, max_seqlen, options):
    result = function(
        q,
        k,
        v,
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        softmax_scale=options.scale,
        causal=options.causal,
        window_size=options.window_size,
        softcap=options.softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        return_attn_probs=options.return_lse,
    )
    return result[:2] if options.return_lse else (result, None)


def _varlen_attn_lacks(query, key, options, capability, parameters):
    if capability[0] < 8:
        return f"needs compute capability 8, this device has {capability[0]}.{capability[1]}"
    if options.softcap is not None:
        return "has no softcap"
    return _head_dim(query, 256)


def _varlen_attn(function, q, k, v, bounds, max_seqlen, options):
    """Deterministic where ``torch.use_deterministic_algorithms`` is: its backward asks for itself.

    torch 2.12 wants to be told of fewer key heads than query heads. 2.11 has no such argument, and hands them to the
    same kernels, which take them.
    """
    grouped = q.shape[1] != k.shape[1] and "enable_gqa" in _parameters(function)
    from torch.nn.attention.varlen import AuxRequest

    result = function(
        q,
        k,
        v,
        bounds,
        bounds,
        max_seqlen,
        max_seqlen,
        window_size=options.window_size,
        scale=options.scale,
        return_aux=AuxRequest(lse=options.return_lse),
        **({"enable_gqa": True} if grouped else {}),
    )
    return result if options.return_lse else (result, None)


LIBRARIES = (
    Library("flash-attn 4", ("flash_attn.cute",), "flash_attn_varlen_func", _flash_attn_4_lacks, _flash_attn_4),
    Library(
        "flash-attn 3",
        ("flash_attn_interface", "flash_attn_3.flash_attn_interface"),
        "flash_attn_varlen_func",
        _flash_attn_3_lacks,
        _flash_attn_2_or_3,
    ),
    Library("flash-attn 2", ("flash_attn",), "flash_attn_varlen_func", _flash_attn_2_lacks, _flash_attn_2_or_3),
    Library("torch's varlen_attn", ("torch.nn.attention.varlen",), "varlen_attn", _varlen_attn_lacks, _varlen_attn),
)
