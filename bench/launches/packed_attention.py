"""The launches of packed attention's two passes, and what each may cost."""

from functools import partial

import torch

from sft_kernels.ops.packed_attention import triton_backward, triton_forward, triton_tiles
from sft_kernels.ops.packed_attention.tiles import AttentionTiles

from ..binary import Need

_T = 256
_CAUSAL, _FULL, _WINDOW = (-1, 0), (-1, -1), (64, 0)


def _both(D, dtype, window_size=_CAUSAL, softcap=None, key_heads=8):
    query, key = torch.empty(_T, 4 * key_heads, D, dtype=dtype), torch.empty(_T, key_heads, D, dtype=dtype)
    tiles = AttentionTiles.from_cu_seqlens(torch.tensor([0, 100, _T]), _T)
    options = (tiles.block, D**-0.5, window_size, softcap)
    out, lse = triton_forward.launch(query, key, key, tiles.lists, *options)
    triton_backward.launch(out, query, key, key, out, lse, tiles.lists, *options)


def _tiles(dtype):
    triton_tiles.launch(torch.tensor([0, 100, _T], dtype=dtype), _T, 128)


def _needs(tensor_core=True, **stacks):
    """A kernel's stack is nothing but where ``stacks`` grants it bytes. Statistics are read number by number, so that
    loads of 32 bits stand beside those of 128."""
    instruction = {80: "HMMA", 90: "HGMMA"} if tensor_core else None
    return {
        f"_{name}_kernel": Need(stack=stacks.get(name, 0), narrow=None, tensor_core=instruction)
        for name in ("forward", "dquery", "dkey")
    }


# Two accumulators of 64 × 256 in fp32 and the operands of four products do not fit 255 registers.
_WIDE = {"forward": {80: 16, 90: 48}, "dkey": {80: 192, 90: 416}}
# Products of fp32 are made of single multiplications, of which the compiler unrolls more than it has registers for.
_FP32 = {"tensor_core": False, "forward": {80: 32, 90: 192}, "dquery": 384, "dkey": {80: 0, 90: 384}}
CASES = {
    f"{D} {name} {str(dtype)[6:]}": (partial(_both, D, dtype, **options), _needs(**(_WIDE if D > 128 else {})))
    for D, name, dtype, options in [
        *(
            (D, name, torch.bfloat16, options)
            for D in (64, 128)
            for name, options in {
                "causal": {},
                "full": {"window_size": _FULL},
                "window": {"window_size": _WINDOW},
                "few heads": {"key_heads": 2},
                "window cap": {"window_size": _WINDOW, "softcap": 50.0},
            }.items()
        ),
        *((D, "causal", torch.bfloat16, {}) for D in (80, 96, 192, 256)),
        (256, "cap", torch.bfloat16, {"softcap": 50.0}),
        *((D, "causal", torch.float16, {}) for D in (64, 128)),
    ]
} | {f"{D} causal float32": (partial(_both, D, torch.float32), _needs(**_FP32)) for D in (64, 128)}
# Twelve bytes a tile, written where its work puts it: no access is wide.
CASES |= {
    f"tiles {str(dtype)[6:]}": (partial(_tiles, dtype), {"_tiles_kernel": Need(width=None, narrow=None)})
    for dtype in (torch.int32, torch.int64)
}
