"""Packed attention in Triton: the operators over both passes' launchers, and the autograd Function over these."""

import math

import torch

from ..._plain import is_batch_of_gradients
from . import triton_backward, triton_forward
from .tiles import AttentionTiles


def packed_attention(
    query, key, value, cu_seqlens, max_seqlen, lengths, *, tiles, scale, window_size, softcap, return_lse
):
    """See :func:`sft_kernels.packed_attention`, for bf16 and fp16 and head dimensions to 256, fp32 to 128.

    Boundaries are not read on the host. Without ``tiles`` they are made here, one small launch.
    """
    if tiles is None:
        tiles = AttentionTiles.from_cu_seqlens(cu_seqlens, query.shape[0], device=query.device)
    scale = query.shape[2] ** -0.5 if scale is None else float(scale)
    softcap = None if softcap is None else float(softcap)
    out, lse = _PackedAttention.apply(query, key, value, tiles.lists, tiles.block, scale, window_size, softcap)
    return out, (lse * math.log(2)).float() if return_lse else None


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, tiles, *options):
        out, lse = torch.ops.sft_kernels.packed_attention.default(query, key, value, tiles, *options)
        ctx.save_for_backward(query, key, value, out, lse, tiles)
        ctx.options = options
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # else zeros are made for the lse in every backward
        return out, lse

    @staticmethod
    def backward(ctx, dout, _):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "packed_attention: impl='triton' is differentiable once, its backward has no graph (create_graph=True);"
                " use impl='torch'"
            )
        if dout is None:
            return (None,) * (4 + len(ctx.options))
        if not torch.compiler.is_compiling() and is_batch_of_gradients(dout):
            raise RuntimeError(
                "packed_attention: impl='triton' does not support batches of gradients (is_grads_batched=True); use"
                " impl='torch'"
            )
        gradients = torch.ops.sft_kernels.packed_attention_backward.default(dout, *ctx.saved_tensors, *ctx.options)
        return *gradients, *[None] * (1 + len(ctx.options))


# ---- the passes as operators, so that torch.compile sees schemas and not kernels

_OPTIONS = "int block, float scale, int[] window_size, float? softcap"
_library = torch.library.Library("sft_kernels", "FRAGMENT")


def _register(schema, function, fake):
    """Define an operator, for the GPU and, interpreted, the CPU; ``fake`` makes its results without values."""
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
    for device in ("CUDA", "CPU"):
        _library.impl(name, function, device)
    torch.library.register_fake(f"sft_kernels::{name}", fake, lib=_library)


_register(
    f"packed_attention(Tensor query, Tensor key, Tensor value, Tensor tiles, {_OPTIONS}) -> (Tensor, Tensor)",
    triton_forward.launch,
    lambda query, *rest: triton_forward.results(query),
)
_register(
    "packed_attention_backward(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse,"
    f" Tensor tiles, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    triton_backward.launch,
    lambda dout, query, key, *rest: triton_backward.results(query, key),
)
