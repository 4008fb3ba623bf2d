"""The launches of the losses' core, and what each may cost."""

from functools import partial

import torch

from sft_kernels.ops.softmax_grad import triton_impl
from sft_kernels.ops.softmax_grad.options import LossOptions

from ..binary import Need

_N = 4
_EVERY = {"label_smoothing": 0.1, "softcap": 30.0, "logit_scale": 0.5, "z_loss": 1e-4}


def _core(
    V,
    dtype,
    *,
    stride=None,
    scale=True,
    lse=False,
    coefficients=False,
    keep=False,
    out=False,
    stats=False,
    predict=False,
    **options,
):
    logits = torch.empty(_N, stride or V, dtype=dtype)[:, :V]
    row = torch.ones(_N)
    triton_impl.softmax_grad(
        logits,
        torch.zeros(_N, dtype=torch.int64),
        LossOptions(V, **options),
        row if scale else None,
        lse=row.double() if lse else None,
        coefficients=torch.ones(_N, 4) if coefficients else None,
        stats=stats,
        predict=predict,
        keep=row.bool() if keep else None,
        out=torch.empty(_N, V, dtype=dtype) if out else None,
    )


def _scale(dtype):
    triton_impl.scale_(torch.empty(1 << 16, dtype=dtype), torch.ones(()))


# What must be in flight in every loop to use all bandwidth: the latency of memory, 0.7 µs, times an SM's share, 19 B/ns
# on an A100 and 36 on an H200. With a softcap six special functions a logit, of which an SM does 27 in a ns, let it ask
# for 27. Rows of less than a tile run each loop once, with no tile ahead; their second read comes from a cache.
_NEED = Need(registers=104, each_in_flight={80: 13 << 10, 90: 25 << 10})
_CAPPED = Need(registers=112, each_in_flight={80: 14 << 10, 90: 19 << 10})
_SHORT = Need(registers=104, each_in_flight={80: 13 << 10, 90: 16 << 10})

_PREDICTION = {"scale": False, "stats": True, "predict": True}
_COEFFICIENTS = {"scale": False, "lse": True, "coefficients": True, "out": True}

# Options, budget, and instructions a logit in half precision and in fp32, a twentieth above what the compilers of
# triton 3.6 and 3.7 need. While 6 bytes of a logit pass, an SM of an H100 has 55 slots, one of an H200 38.
_CORES = {
    "training": ({"V": 128256}, _NEED, 31, 37),
    "training, statistics": ({"V": 128256, "stats": True}, _NEED, 34, 37),
    "forward": ({"V": 128256, "scale": False}, _NEED, 16.5, 20),
    "forward, statistics": ({"V": 128256, "scale": False, "stats": True}, _NEED, 18.5, 23.5),
    "training, all options": ({"V": 128256, "stats": True, **_EVERY}, _CAPPED, 97, 100),
    "odd vocabulary": ({"V": 50257}, _NEED, 31, 33),
    "odd vocabulary, all options": ({"V": 50257, "stats": True, **_EVERY}, _CAPPED, 101, 104),
    "slice, given lse": ({"V": 16384, "lse": True}, _NEED, 12, 12),
    "given logits": ({"V": 128256, "keep": True, "out": True}, _NEED, 31, 37),
    "short rows": ({"V": 1024}, _SHORT, 28, 32),
    "statistics, prediction": ({"V": 128256, **_PREDICTION}, _NEED, 18.5, 23.5),
    "given lse, coefficients": ({"V": 128256, **_COEFFICIENTS}, _NEED, 14.5, 14.5),
    "odd V, prediction, softcap": ({"V": 50257, **_PREDICTION, "softcap": 30.0}, _CAPPED, 48.5, 51.5),
    "odd V, given lse, softcap": ({"V": 50257, "lse": True, "softcap": 30.0}, _CAPPED, 46.5, 47.5),
    "odd V, coefficients, softcap": ({"V": 50257, **_COEFFICIENTS, "softcap": 30.0}, _CAPPED, 48.5, 49.5),
}
CASES = {
    f"{name}, {str(dtype)[6:]}": (
        partial(_core, dtype=dtype, **options),
        {
            "_softmax_grad_kernel": need._replace(
                element=dtype.itemsize, instructions=single if dtype == torch.float32 else half
            )
        },
    )
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for name, (options, need, half, single) in _CORES.items()
} | {
    # Its second loop is over what is left behind the last whole block, which no vector divides.
    f"upstream scale, {str(dtype)[6:]}": (partial(_scale, dtype), {"_scale_kernel": Need(registers=64, narrow=8)})
    for dtype in (torch.bfloat16, torch.float32)
}
