"""Stand-ins for the FlashAttention libraries: their recorded signatures over the NumPy oracle.

A stand-in binds its arguments as the real function does, fails on an argument that is recorded but not modelled here,
refuses what the real one refuses, and leaves unwritten (NaN) what the real one leaves unwritten. Each record names
where its signature and its conventions were read: a function's default for an argument is part of the record.
"""

import inspect
import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.attention.varlen

from .attention import oracle


def flash_attn_4(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
    seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    score_mod=None, score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None,
    return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
):  # fmt: skip
    """flash-attn-4 4.0.0b36, flash_attn/cute/interface.py. Forward and backward, with a softcap or a window too, were
    compiled for sm_90a by it; its deterministic backward was read."""


def flash_attn_4_beta4(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, seqused_q=None, seqused_k=None,
    page_table=None, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
    num_splits=1, pack_gqa=None, deterministic=False, score_mod=None, aux_tensors=None, return_lse=False,
):  # fmt: skip
    """Dao-AILab/flash-attention, flash_attn/cute/interface.py, fa4-v4.0.0.beta4."""


def flash_attn_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, softmax_scale=None,
    causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0,
    softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    """Dao-AILab/flash-attention, hopper/flash_attn_interface.py, 0251105 of August 2026; hopper/flash_api.cpp."""


def flash_attn_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    """Dao-AILab/flash-attention, flash_attn/flash_attn_interface.py, v2.6.3 to v2.8.3; csrc/flash_attn."""


def varlen_attn_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):  # fmt: skip
    """pytorch/pytorch, torch/nn/attention/varlen.py, 2.11; aten/src/ATen/native/transformers/cuda/flash_attn.

    Fewer key heads than query heads are handed on: mha_varlen_fwd and mha_varlen_bwd take them, and sum dK and dV."""


def varlen_attn_2_12(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    """The same file, 2.12 and 2.13."""


class _Kernel(torch.autograd.Function):
    """``(out, lse)`` [T, Hq, D], [Hq, T] fp32; rows of no segment, or past ``max_seqlen`` in theirs, stay unwritten."""

    @staticmethod
    def forward(ctx, q, k, v, bounds, max_seqlen, options):
        ctx.save_for_backward(q, k, v)
        ctx.bounds, ctx.options = bounds, options
        ctx.unwritten = torch.ones(q.shape[0], dtype=torch.bool)
        for start, end in pairwise(bounds):
            ctx.unwritten[start : min(end, start + max_seqlen)] = False
        out, lse, *_ = oracle((q, k, v), bounds, torch.zeros(q.shape), **options)
        lse = lse.float().masked_fill(ctx.unwritten, torch.nan)
        ctx.mark_non_differentiable(lse)
        return _leave(out, q, ctx.unwritten), lse

    @staticmethod
    def backward(ctx, dout, _):
        given = ctx.saved_tensors
        _, _, *gradients = oracle(given, ctx.bounds, dout, **ctx.options)
        return *(_leave(g, t, ctx.unwritten) for g, t in zip(gradients, given, strict=True)), None, None, None


def _leave(values, like, unwritten):
    return values.to(like.dtype).masked_fill(unwritten[:, None, None], torch.nan)


def _attend(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, left, right, softcap, head_dims, regroups=False):
    """What all of them check, and the answer. ``left``, ``right``: -1 for no bound."""
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert all(t.stride(-1) == 1 for t in (q, k, v))
    assert q.shape[1] % k.shape[1] == 0
    assert q.shape[2] in head_dims
    assert cu_q is cu_k
    assert cu_q.dtype == torch.int32
    assert cu_q.device == q.device
    assert cu_q.is_contiguous()
    assert cu_q.numel() > 1, "batch size must be positive"
    assert type(max_q) is int
    assert max_q == max_k > 0
    assert scale is None or scale > 0  # the maximum is taken before the scale
    bounds = cu_q.tolist()
    assert all(0 <= start <= end <= q.shape[0] for start, end in pairwise(bounds)), "read out of bounds"
    if regroups and max_q == 1 and q.shape[1] > k.shape[1] and left < 0 and right <= 0:
        assert q.shape[0] == len(bounds) - 1, "cannot reshape"
    options = {"causal": False, "window_size": (left, right), "scale": scale, "softcap": softcap or None}
    return _Kernel.apply(q, k, v, bounds, max_q, options)


def _flash_attn_4(a):
    left, right = a.window_size
    if a.causal:
        right = 0
    assert all(size is None or size >= 0 for size in (left, right))  # a negative size is a place before the token
    left, right = (-1 if size is None else size for size in (left, right))
    out, lse = _attend(
        a.q, a.k, a.v, a.cu_seqlens_q, a.cu_seqlens_k, a.max_seqlen_q, a.max_seqlen_k, scale=a.softmax_scale, left=left,
        right=right, softcap=a.softcap, head_dims=range(8, 257, 8),
    )  # fmt: skip
    return out, lse if a.return_lse or out.requires_grad else None


def _flash_attn_2_or_3(a, head_dims, regroups, *more):
    out, lse = _attend(
        a.q, a.k, a.v, a.cu_seqlens_q, a.cu_seqlens_k, a.max_seqlen_q, a.max_seqlen_k, scale=a.softmax_scale,
        left=a.window_size[0], right=0 if a.causal else a.window_size[1], softcap=a.softcap, head_dims=head_dims,
        regroups=regroups,
    )  # fmt: skip
    return (out, lse, *more) if a.return_attn_probs else out


def _flash_attn_3(a):
    return _flash_attn_2_or_3(a, range(8, 257, 8), False)


def _flash_attn_2(a):
    return _flash_attn_2_or_3(a, range(1, 257), True, None)  # pads the heads; a third result, of dropout


def _varlen_attn(a):
    assert a.query.shape[1] == a.key.shape[1] or getattr(a, "enable_gqa", True)
    out, lse = _attend(
        a.query, a.key, a.value, a.cu_seq_q, a.cu_seq_k, a.max_q, a.max_k, scale=a.scale,
        left=a.window_size[0], right=a.window_size[1], softcap=None, head_dims=range(8, 257, 8), regroups=True,
    )  # fmt: skip
    return (out, lse) if a.return_aux is not None and a.return_aux.lse else out


MODULES = ("flash_attn.cute", "flash_attn_interface", "flash_attn_3.flash_attn_interface", "flash_attn")
MODELLED = {
    "q", "k", "v", "query", "key", "value", "cu_seqlens_q", "cu_seqlens_k", "cu_seq_q", "cu_seq_k", "max_seqlen_q",
    "max_seqlen_k", "max_q", "max_k", "softmax_scale", "scale", "causal", "window_size", "softcap", "enable_gqa",
    "deterministic", "return_lse", "return_attn_probs", "return_aux",
}  # fmt: skip
_FLASH_ATTN, _VARLEN = "flash_attn_varlen_func", ("torch.nn.attention.varlen", "varlen_attn")
STAND_INS = {  # name: (record, what it computes, module, function)
    record.__name__: (record, *rest)
    for record, *rest in (
        (flash_attn_4, _flash_attn_4, "flash_attn.cute", _FLASH_ATTN),
        (flash_attn_4_beta4, _flash_attn_4, "flash_attn.cute", _FLASH_ATTN),
        (flash_attn_3, _flash_attn_3, "flash_attn_interface", _FLASH_ATTN),
        (flash_attn_2, _flash_attn_2, "flash_attn", _FLASH_ATTN),
        (varlen_attn_2_11, _varlen_attn, *_VARLEN),
        (varlen_attn_2_12, _varlen_attn, *_VARLEN),
    )
}


def install(monkeypatch, *names):
    """Make the named stand-ins, and no other library, importable. Returns the list of the calls that they get, each a
    dict of all its arguments, defaults too, and ``"name"``."""
    calls = []
    for module in MODULES:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delattr(torch.nn.attention.varlen, "varlen_attn")
    for name in names:
        record, compute, module, function = STAND_INS[name]
        if sys.modules[module] is None:
            monkeypatch.setitem(sys.modules, module, ModuleType(module))
        monkeypatch.setattr(sys.modules[module], function, _stand_in(record, compute, calls), raising=False)
    return calls


def _stand_in(record, compute, calls):
    signature = inspect.signature(record)

    def function(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        assert bound.arguments.keys() <= MODELLED
        bound.apply_defaults()
        calls.append({"name": record.__name__, **bound.arguments})
        return compute(SimpleNamespace(**bound.arguments))

    function.__signature__ = signature
    return function
