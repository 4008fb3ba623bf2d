"""The core as operators, so that ``torch.compile`` sees schemas and not kernels: what Triton's and CUDA's share."""

import torch

from .rows import RowStats

_REST = (
    "Tensor target, Tensor? scale, Tensor? lse, Tensor? keep, int classes, float label_smoothing, float? softcap,"
    " float? logit_scale, float z_loss, bool stats"
)
TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)


def schemas(more="", fields=5):
    """The schemas of the three operators, which return ``fields`` tensors; ``more`` arguments come after the shared."""
    rest, results = _REST + more, f"({', '.join(['Tensor'] * fields)})"
    return (
        f"softmax_stats(Tensor logits, {rest}) -> {results}",
        f"softmax_grad_(Tensor(a!) logits, {rest}) -> {results}",
        f"softmax_grad_out(Tensor logits, Tensor(a!) out, {rest}) -> {results}",
    )


SCHEMAS = schemas()  # of the compiled library


def call(operators, logits, out, gradient, *rest):
    """The results of the one of ``operators`` that fits: without a ``gradient``, with one in place, with one in
    ``out``."""
    if not gradient:
        return operators.softmax_stats(logits, *rest)
    if out is None:
        return operators.softmax_grad_(logits, *rest)
    return operators.softmax_grad_out(logits, out, *rest)


def row_stats(found, *wanted):
    """:class:`RowStats` of an operator's results. ``wanted`` says which of those after the third were asked for."""
    return RowStats(*found[:3], *(field if want else None for field, want in zip(found[3:], wanted, strict=True)))


def fields(logits, lse, label_smoothing, stats):
    """Memory for the fields of :class:`RowStats`, empty where not asked for or where ``lse`` is given."""
    wanted = (
        (torch.float64, True),
        (torch.float32, True),
        (torch.float32, True),
        (torch.float64, stats),
        (torch.float64, bool(label_smoothing)),
    )
    return tuple(field(logits, lse, dtype, want) for dtype, want in wanted)


def field(logits, lse, dtype, wanted):
    """Memory for one field, empty if it is not ``wanted`` or ``lse`` is given."""
    return torch.empty(logits.shape[0] if wanted and lse is None else 0, dtype=dtype, device=logits.device)


def fake(logits, *rest):
    """The results of any operator of :data:`SCHEMAS`, without values."""
    *_, lse, _keep, _classes, label_smoothing, _softcap, _logit_scale, _z_loss, stats = rest
    return fields(logits, lse, label_smoothing, stats)
