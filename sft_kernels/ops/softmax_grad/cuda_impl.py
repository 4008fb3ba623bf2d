"""The core in CUDA C++ (``csrc/softmax_grad.cuh``): a cluster of blocks holds a row and reads it once.

The operators are implemented by the compiled library; their schemas and fakes are here.
"""

import torch

from ..._backend import Unavailable
from . import operators

NAMESPACE = "sft_kernels_cuda"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # AdamW has its own
for _schema in operators.SCHEMAS:
    _library.define(_schema, tags=operators.TAGS)
    torch.library.register_fake(f"{NAMESPACE}::{_schema.split('(')[0]}", operators.fake, lib=_library)


def softmax_grad(
    logits,
    target,
    options,
    scale=None,
    *,
    lse=None,
    coefficients=None,
    stats=False,
    predict=False,
    keep=None,
    out=None,
):
    """As ``torch_impl.softmax_grad``, for fp32, bf16 and fp16, without ``coefficients``, ``predict``, ``logit_scale``
    and ``z_loss``. Logits whose columns are not adjacent are copied."""
    if predict or coefficients is not None:
        raise Unavailable("impl='cuda': the CUDA kernels have no predict and no coefficients; Triton's have")
    rest = (target, scale, lse, keep, *options, stats)
    destination = logits if out is None else out
    adjacent = logits.stride(1) == 1 and destination.stride(1) == 1
    if not adjacent:
        logits, out = logits.clone(memory_format=torch.contiguous_format), None
    found = operators.call(torch.ops.sft_kernels_cuda, logits, out, scale is not None, *rest)
    if scale is not None and not adjacent:
        destination.copy_(logits)
    return operators.row_stats(found, stats, options.label_smoothing) if lse is None else None
