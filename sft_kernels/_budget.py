"""The one error budget: how far a result may stand from the float64 oracle. Tests and ``verify`` use the same.

::

    ‖x - ref‖∞ ≤ 2 · ‖eager - ref‖∞ + c · eps(compute dtype) · ‖ref‖∞ + ½ · eps(output dtype) · ‖ref‖∞

``ref`` is the float64 oracle, ``eager`` the plain PyTorch code in the same dtype on the same inputs, ``c`` is 4, and 8
for scalars, into which a whole batch is summed. The first term is what the inputs' dtype costs anyone, the second the
order of a summation, the third the rounding of the result.
"""

import torch


def compute_dtype_of(dtype):
    """The dtype of statistics and sums over inputs of ``dtype``: fp32 for half precision and fp32, fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def allowed_error(ref, eager, *, compute_dtype, output_dtype):
    """The right-hand side of the budget, a float.

    Entries where ``ref`` or ``eager`` is not finite enter no norm: an overflow of the plain code excuses nothing.
    """
    ref, eager = _float64(ref), _float64(eager)
    if ref.shape != eager.shape:
        raise ValueError(f"eager: expected the shape of ref {tuple(ref.shape)}, got {tuple(eager.shape)}")
    finite = ref.isfinite()
    size = _norm(ref[finite])
    c = 8 if ref.dim() == 0 else 4
    rounding = c * torch.finfo(compute_dtype).eps + torch.finfo(output_dtype).eps / 2
    return 2 * _norm((eager - ref)[finite & eager.isfinite()]) + rounding * size


def check(name, x, ref, eager, *, compute_dtype=None, output_dtype=None):
    """Raise ``AssertionError`` saying what is off and by how much, unless ``x`` is within the budget.

    NaN and infinities must stand where ``ref`` has them, and nowhere else. The dtypes default to those of ``x``.
    """
    output_dtype = output_dtype or torch.as_tensor(x).dtype
    compute_dtype = compute_dtype or compute_dtype_of(output_dtype)
    x, ref = _float64(x), _float64(ref)
    if x.shape != ref.shape:
        raise AssertionError(f"{name}: expected shape {tuple(ref.shape)}, got {tuple(x.shape)}")
    finite = ref.isfinite()
    alike = (finite & x.isfinite()) | (x == ref) | (x.isnan() & ref.isnan())
    if not alike.all():
        at = int((~alike).flatten().nonzero()[0])
        raise AssertionError(
            f"{name}: NaN or infinite where the reference is not, or the reverse: {int((~alike).sum())} of"
            f" {x.numel()} entries; at flat index {at} got {x.flatten()[at]}, reference {ref.flatten()[at]}"
        )
    allowed = allowed_error(ref, eager, compute_dtype=compute_dtype, output_dtype=output_dtype)
    error = (x - ref).where(finite, 0).abs()
    if _norm(error) > allowed:
        at = int(error.argmax())
        raise AssertionError(
            f"{name}: error {_norm(error):.3e}, allowed {allowed:.3e};"
            f" at flat index {at} got {x.flatten()[at]:.9g}, reference {ref.flatten()[at]:.9g}"
        )


def _float64(x):
    return torch.as_tensor(x).detach().to("cpu", torch.float64)


def _norm(x):
    return float(x.abs().max()) if x.numel() else 0.0
