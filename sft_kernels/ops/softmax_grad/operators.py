"""The core as operators, so that ``torch.compile`` sees schemas and not kernels: what Triton's and CUDA's share."""

import torch

from .rows import RowStats

_REST = (
    "Tensor target, Tensor? scale, Tensor? lse, Tensor? keep, int classes, float label_smoothing, float? softcap,"
    " float? logit_scale, float z_loss, bool stats"
)
_FIELDS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
SCHEMAS = (
    f"softmax_stats(Tensor logits, {_REST}) -> {_FIELDS}",
    f"softmax_grad_(Tensor(a!) logits, {_REST}) -> {_FIELDS}",
    f"softmax_grad_out(Tensor logits, Tensor(a!) out, {_REST}) -> {_FIELDS}",
)
TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)


def call(operators, logits, out, target, scale, lse, keep, *options_and_stats):
    """:class:`RowStats` by those of ``operators`` that fits; None where ``lse`` is given."""
    rest = (target, scale, lse, keep, *options_and_stats)
    if out is not None and scale is not None:
        found = operators.softmax_grad_out(logits, out, *rest)
    elif scale is not None:
        found = operators.softmax_grad_(logits, *rest)
    else:
        found = operators.softmax_stats(logits, *rest)
    if lse is not None:
        return None
    _classes, label_smoothing, *_, stats = options_and_stats
    return RowStats(*found[:3], found[3] if stats else None, found[4] if label_smoothing else None)


def fields(logits, lse, label_smoothing, stats):
    """Memory for the fields of :class:`RowStats`, empty where not asked for or where ``lse`` is given."""
    rows = logits.shape[0] if lse is None else 0
    wanted = (
        (torch.float64, True),
        (torch.float32, True),
        (torch.float32, True),
        (torch.float64, stats),
        (torch.float64, bool(label_smoothing)),
    )
    return tuple(torch.empty(rows if want else 0, dtype=dtype, device=logits.device) for dtype, want in wanted)


def fake(logits, *rest):
    """The results of any of the operators, without values."""
    *_, lse, _keep, _classes, label_smoothing, _softcap, _logit_scale, _z_loss, stats = rest
    return fields(logits, lse, label_smoothing, stats)
