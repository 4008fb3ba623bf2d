"""The three products of the head: in which dtype they run, and where they are summed.

``x`` and ``dlogits`` are in the compute dtype. The weight may be in another (half precision on a CPU; fp32 under
autocast, if memory is short for a copy); then it is cast a slice of the vocabulary at a time.
"""

import torch
import torch.nn.functional as F

from ..._plain import autocast_on

_SLICE = 4096  # rows of the weight that are cast at a time


def compute_dtype(x):
    """The dtype of the products: autocast's where it is on, and fp32 for half precision on a CPU.

    Without native instructions a half-precision product on a CPU is 20 to 50 times slower than its fp32 twin.
    """
    device = x.device.type
    dtype = x.dtype
    if autocast_on(x.device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return torch.float32 if device == "cpu" and dtype != torch.float64 else dtype


def accumulator_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def padded(V):
    """How many elements lie between two rows of ``V`` logits: unless there are but a few, rows start at 16 bytes, for
    the products as for the core."""
    return V if V < 8 else -(-V // 8) * 8


def logits(x, weight, bias=None):
    """``x Wᵀ + b``: [N, V] in the compute dtype, the rows :func:`padded`."""
    if bias is not None:
        bias = bias.to(x.dtype)
    V = weight.shape[0]
    if weight.dtype == x.dtype and padded(V) == V:
        return F.linear(x, weight, bias)
    out = x.new_empty(x.shape[0], padded(V))[:, :V]
    for s in [slice(0, V)] if weight.dtype == x.dtype else _slices(weight):
        columns = out[:, s]
        if bias is not None:
            columns.copy_(bias[s])
        _addmm_(columns, x, weight[s].to(x.dtype).T, beta=0 if bias is None else 1)
    return out


def grad_input(dlogits, weight, out):
    """``out = dlogits W``: [N, D], summed over the vocabulary in fp32 throughout, rounded once to the dtype of ``out``,
    which need not be theirs.

    In half precision too it goes through fp32 memory: a product with few rows and a long sum is split over the
    vocabulary, and cuBLAS may add up the parts in the dtype of its result.
    """
    dtype = accumulator_dtype(dlogits.dtype)
    acc = out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)
    for i, s in enumerate([slice(0, len(weight))] if weight.dtype == dlogits.dtype else _slices(weight)):
        accumulate(acc, dlogits[:, s], weight[s].to(dlogits.dtype), beta=min(i, 1))
    if acc is not out:
        out.copy_(acc)


def grad_weight(dlogits, x, out):
    """``out = dlogitsᵀ x``: [V, D], rounded once to the dtype of ``out``."""
    dtype = accumulator_dtype(x.dtype)
    if out.dtype == x.dtype:
        torch.mm(dlogits.T, x, out=out)
    elif out.dtype == dtype:
        accumulate(out, dlogits.T, x, beta=0)
    else:
        for s in _slices(out):
            part = torch.empty_like(out[s], dtype=dtype)
            accumulate(part, dlogits[:, s].T, x, beta=0)
            out[s] = part


def grad_bias(dlogits):
    """``Σ_i dlogits_i``: [V], summed in fp32."""
    return dlogits.sum(0, dtype=accumulator_dtype(dlogits.dtype))


def accumulate(acc, a, b, beta=1):
    """``acc = beta · acc + a b`` in place, ``beta`` 0 or 1, summed in the dtype of ``acc`` and each product in fp32 at
    least; with a ``beta`` of 0 ``acc`` is not read."""
    if a.dtype == acc.dtype:
        _addmm_(acc, a, b, beta)
    elif acc.dtype == torch.float32 and a.dtype.itemsize < 4 and acc.is_cuda and not torch.compiler.is_compiling():
        _addmm_cuda(acc, a, b, beta)
    elif acc.dtype == torch.float32 and a.dtype.itemsize < 4:
        torch.ops.sft_kernels.addmm_(acc, a, b, beta)
    else:  # float64 beside another dtype, under autocast
        part = torch.empty_like(acc, dtype=accumulator_dtype(a.dtype))
        accumulate(part, a, b, beta=0)
        acc.copy_(part) if beta == 0 else acc.add_(part)


def _addmm_(acc, a, b, beta):
    """The same for one dtype: as torch's FlopCounterMode counts it, except in a compiler's trace."""
    if torch.compiler.is_compiling():
        acc.addmm_(a, b, beta=beta)
    else:
        torch.addmm(acc, a, b, beta=beta, out=acc)


def _slices(weight):
    return (slice(i, i + _SLICE) for i in range(0, weight.shape[0], _SLICE))


# ---- the sum in fp32 of a product in half precision, as an operator: before 2.13 torch's own cannot be traced


def _addmm_cuda(acc, a, b, beta):
    torch.addmm(acc, a, b, beta=beta, out_dtype=acc.dtype, out=acc)


def _addmm(acc, a, b, beta):
    acc.addmm_(a.to(acc.dtype), b.to(acc.dtype), beta=beta)


_library = torch.library.Library("sft_kernels", "FRAGMENT")
_library.define("addmm_(Tensor(a!) acc, Tensor a, Tensor b, int beta) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("addmm_", _addmm_cuda, "CUDA")
_library.impl("addmm_", _addmm, "CompositeExplicitAutograd")  # other devices, for which torch has no such product
torch.library.register_fake("sft_kernels::addmm_", lambda acc, a, b, beta: None, lib=_library)
