"""The launches of packed attention's two passes, and what each may cost."""

from functools import partial

import torch

from sft_kernels.ops.packed_attention import triton_backward, triton_forward
from sft_kernels.ops.packed_attention.tiles import AttentionTiles

from ..binary import Need

_T, _HQ, _HKV = 256, 32, 8
_CAUSAL, _FULL, _WINDOW = (-1, 0), (-1, -1), (64, 0)


def _both(D, dtype, window_size=_CAUSAL, softcap=None):
    query, key = torch.empty(_T, _HQ, D, dtype=dtype), torch.empty(_T, _HKV, D, dtype=dtype)
    tiles = AttentionTiles.from_cu_seqlens(torch.tensor([0, 100, _T]), _T)
    options = (tiles.block, D**-0.5, window_size, softcap)
    out, lse = triton_forward.launch(query, key, key, tiles.query, *options)
    triton_backward.launch(out, query, key, key, out, lse, tiles.query, tiles.key, *options)


def _needs(forward=0, dquery=0, dkey=0, tensor_core=None):
    """Bytes of stack that each kernel may have. Statistics are read a number at a time, so loads of 32 bits abound."""
    need = {"narrow": None, "tensor_core": tensor_core or {80: "HMMA", 90: "HGMMA"}}
    stacks = {"_forward_kernel": forward, "_dquery_kernel": dquery, "_dkey_kernel": dkey}
    return {name: Need(stack=stack, **need) for name, stack in stacks.items()}


CASES = {
    f"{name}, bfloat16": (partial(_both, dtype=torch.bfloat16, **options), _needs())
    for name, options in {
        "D 64": {"D": 64},
        "D 64, full": {"D": 64, "window_size": _FULL},
        "D 64, window": {"D": 64, "window_size": _WINDOW},
        "D 64, softcap, window": {"D": 64, "window_size": _WINDOW, "softcap": 50.0},
        "D 128": {"D": 128},
        "D 128, full": {"D": 128, "window_size": _FULL},
        "D 128, window": {"D": 128, "window_size": _WINDOW},
        "D 128, softcap, window": {"D": 128, "window_size": _WINDOW, "softcap": 50.0},
        "D 80": {"D": 80},
        "D 96": {"D": 96},
        "D 192": {"D": 192},
        "D 256": {"D": 256},
        "D 256, softcap": {"D": 256, "softcap": 50.0},
    }.items()
} | {
    "D 64, float16": (partial(_both, 64, torch.float16), _needs()),
    "D 128, float16": (partial(_both, 128, torch.float16), _needs()),
}
