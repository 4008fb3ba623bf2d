"""The one error budget: how far a result may stand from the float64 oracle. Tests and ``verify`` use the same.

::

    ‖x - ref‖∞ ≤ 2 · ‖eager - ref‖∞ + c · eps(compute dtype) · ‖ref‖∞ + ½ · eps(output dtype) · ‖ref‖∞

``ref`` is the float64 oracle, ``eager`` the plain PyTorch code in the same dtype on the same inputs, ``c`` is 4, and 8
for scalars, into which a whole batch is summed. The first term is what the inputs' dtype costs anyone, the second the
order of a summation, the third the rounding of the result.
"""

from typing import NamedTuple

import torch


class Comparison(NamedTuple):
    """A result beside the oracle and the plain code; ``error`` is infinite where NaN or infinities stand wrongly."""

    error: float
    eager_error: float
    allowed: float

    @property
    def ok(self):
        return self.error <= self.allowed


def compute_dtype_of(dtype):
    """The dtype of statistics and sums over inputs of ``dtype``: fp32 for half precision and fp32, fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def compare(x, ref, eager, *, compute_dtype=None, output_dtype=None):
    """:class:`Comparison` of ``x`` with the budget.

    NaN and infinities must stand where ``ref`` has them, and nowhere else. Entries where ``ref`` or ``eager`` is not
    finite enter no norm: an overflow of the plain code excuses nothing. The dtypes default to those of ``x``.
    """
    output_dtype = output_dtype or torch.as_tensor(x).dtype
    compute_dtype = compute_dtype or compute_dtype_of(output_dtype)
    x, ref, eager = _float64(x), _float64(ref), _float64(eager)
    for name, other in (("x", x), ("eager", eager)):
        if other.shape != ref.shape:
            raise AssertionError(f"{name}: expected the shape of ref {tuple(ref.shape)}, got {tuple(other.shape)}")
    finite = ref.isfinite()
    c = 8 if ref.dim() == 0 else 4
    rounding = c * torch.finfo(compute_dtype).eps + torch.finfo(output_dtype).eps / 2
    eager_error = _norm((eager - ref)[finite & eager.isfinite()])
    error = _norm((x - ref)[finite]) if _alike(x, ref).all() else float("inf")
    return Comparison(error, eager_error, 2 * eager_error + rounding * _norm(ref[finite]))


def check(name, x, ref, eager, *, compute_dtype=None, output_dtype=None):
    """Raise ``AssertionError`` saying what is off and by how much, unless ``x`` is within the budget."""
    found = compare(x, ref, eager, compute_dtype=compute_dtype, output_dtype=output_dtype)
    if found.ok:
        return
    x, ref = _float64(x).flatten(), _float64(ref).flatten()
    unlike = ~_alike(x, ref)
    if unlike.any():
        at = int(unlike.nonzero()[0])
        count = f"{int(unlike.sum())} of {x.numel()} entries"
        problem = f"NaN or infinite where the reference is not, or the reverse: {count}"
    else:
        at = int((x - ref).where(ref.isfinite(), 0).abs().argmax())
        problem = f"error {found.error:.3e}, allowed {found.allowed:.3e}"
    raise AssertionError(f"{name}: {problem}; at flat index {at} got {x[at]:.9g}, reference {ref[at]:.9g}")


def _alike(x, ref):
    """Where both are finite, or the same infinity, or both NaN."""
    return (ref.isfinite() & x.isfinite()) | (x == ref) | (x.isnan() & ref.isnan())


def _float64(x):
    return torch.as_tensor(x).detach().to("cpu", torch.float64)


def _norm(x):
    return float(x.abs().max()) if x.numel() else 0.0
