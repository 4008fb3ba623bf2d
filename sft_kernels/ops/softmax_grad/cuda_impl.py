"""The core in CUDA C++ (``csrc/softmax_grad.cuh``): a cluster of blocks holds a row and reads it once.

The operators are implemented by the compiled library; their schemas and fakes are here.
"""

import torch

from . import operators

NAMESPACE = "sft_kernels_cuda"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # AdamW has its own
for _schema in operators.SCHEMAS:
    _library.define(_schema, tags=operators.TAGS)
    torch.library.register_fake(f"{NAMESPACE}::{_schema.split('(')[0]}", operators.fake, lib=_library)


def softmax_grad(logits, target, options, scale=None, *, lse=None, stats=False, keep=None, out=None):
    """As ``torch_impl.softmax_grad``, for fp32, bf16 and fp16, without ``logit_scale`` and ``z_loss``. Logits whose
    columns are not adjacent are copied."""
    rest = (target, scale, lse, keep, *options, stats)
    destination = logits if out is None else out
    if logits.stride(1) == 1 and destination.stride(1) == 1:
        return operators.call(torch.ops.sft_kernels_cuda, logits, out, *rest)
    copy = logits.clone(memory_format=torch.contiguous_format)
    rows = operators.call(torch.ops.sft_kernels_cuda, copy, None, *rest)
    if scale is not None:
        destination.copy_(copy)
    return rows
