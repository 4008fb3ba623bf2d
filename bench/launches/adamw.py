"""The launches of AdamW, one case a combination of dtypes, and what each may cost."""

from functools import partial

import torch

from sft_kernels import AdamW
from sft_kernels.ops.adamw.tables import Tables
from sft_kernels.ops.adamw.triton_impl import step

from ..binary import Need

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32


def _step(dtype, scaled=False, mapped=False, odd=False, **options):
    """One step of three tensors, on the CPU, through the launcher: ``scaled`` by a GradScaler, ``mapped`` as a
    DTensor's columns are, with gradients at ``odd`` addresses as in a bucket."""
    params = [torch.nn.Parameter(torch.zeros(n, dtype=dtype)) for n in (1 << 16, 4096, 5)]
    optimizer = AdamW(params, impl="torch", **options)
    for p in params:
        p.grad = torch.zeros(p.numel() + 1, dtype=dtype)[1:] if odd else torch.zeros_like(p)
    if scaled:
        optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
    optimizer._tables = Tables(optimizer, 1024)
    optimizer._tables.mapped = mapped
    step(optimizer)


# Name: dtype, options, accesses of the tail's loop (8 elements a thread, each on its own), warps on an SM. Addresses
# are known at run time alone, so every kernel has all three loops: "odd gradients" is the kernel of "bf16".
_OPTIONS = {
    "bf16": (_BF16, {}, 56, 20),
    "bf16, odd gradients": (_BF16, {"odd": True}, 56, 20),
    "bf16, fp32 moments": (_BF16, {"state_dtype": _FP32}, 56, 20),
    "bf16, fp32 master": (_BF16, {"state_dtype": _FP32, "master_weights": "float32"}, 64, 20),
    "bf16, split master": (_BF16, {"state_dtype": _FP32, "master_weights": "split"}, 72, 16),
    "bf16, rounded": (_BF16, {"state_dtype": _FP32, "stochastic_rounding": True}, 56, 16),
    "fp16, fp32 master": (_FP16, {"state_dtype": _FP32, "master_weights": "float32"}, 64, 20),
    "fp16, scaled": (_FP16, {"state_dtype": _FP32, "scaled": True}, 56, 20),
    "fp32": (_FP32, {}, 56, 20),
    "fp32, bf16 moments": (_FP32, {"state_dtype": _BF16}, 56, 20),
    "fp32, amsgrad": (_FP32, {"amsgrad": True}, 72, 20),
    "bf16, split, statistics": (
        _BF16,
        {"state_dtype": _FP32, "master_weights": "split", "update_stats": True},
        72,
        12,
    ),
}
# The norm's loop over chunks also reads six words of the table, and adds up in fp64.
_NORM = Need(narrow=8 + 6, fp64=2, warps=36, in_flight=40 << 10)


def _update(tail, warps, scaled=False, **_):
    # Beside wide accesses of everything else the loop of odd gradients loads its 8 elements each on its own. In fp64
    # are the norm's root, two divisions and what becomes fp32, and one division by a scale. The corrections by the
    # powers of the betas, some 60 instructions in step 1000, are found in memory.
    return Need(narrow=tail + 8, mixed=(0, 8), fp64=54 if scaled else 44, warps=warps, in_flight=40 << 10)


CASES = {
    name: (
        partial(_step, dtype, max_grad_norm=1.0, skip_nonfinite=True, **options),
        {"_sum_of_squares_kernel": _NORM, "_update_kernel": _update(tail, warps, **options)},
    )
    for name, (dtype, options, tail, warps) in _OPTIONS.items()
} | {  # its inner loop is that over maps
    "bf16, rounded columns": (
        partial(_step, _BF16, state_dtype=_FP32, stochastic_rounding=True, mapped=True),
        {"_update_kernel": Need(width=None, fp64=23)},
    )
}
