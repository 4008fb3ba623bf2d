"""The error budget has room for a GPU's own functions.

The interpreter computes exponentials, logarithms and divisions right to the last bit. A GPU does not: here they carry
errors up to the bounds that the PTX ISA documents, 2⁻²² of the value for ``ex2.approx``, ``lg2.approx`` and
``div.full``. ``ex2.approx.ftz`` takes and gives 0 for denormals, and gives 1 for 0.
"""

import numpy as np
import pytest
import torch
import triton
from triton.runtime import interpreter

from sft_kernels._budget import compare
from sft_kernels.ops.softmax_grad import triton_impl
from sft_kernels.ops.softmax_grad.options import LossOptions
from sft_kernels.verify import _ATTENTION_FAMILIES, _LOSS_FAMILIES, _attention_case, _loss_case, _row

from .per_token import OPTIONS, Case

if not triton.knobs.runtime.interpret:
    pytest.skip("Triton does not interpret here", allow_module_level=True)

BOUND = 2.0**-22
SMALLEST = 2.0**-126  # that is not denormal
LOG2_E = np.float32(np.log2(np.e))


def flushed(x):
    return np.where(np.abs(x) < SMALLEST, 0.0, x)


FUNCTIONS = {
    "create_exp": lambda x: np.exp2((x * LOG2_E).astype(np.float64)),  # as compiled: the product is rounded to fp32
    "create_exp2": lambda x: flushed(np.exp2(flushed(x).astype(np.float64))),
    "create_log": lambda x: np.log(x.astype(np.float64)),
    "create_log2": lambda x: np.log2(x.astype(np.float64)),
    "create_fdiv": lambda x, y: x.astype(np.float64) / y,
}


@pytest.fixture(params=range(2))
def approximate(request, monkeypatch):
    random = np.random.default_rng(request.param)

    def with_errors(name, exact):
        original = getattr(interpreter.InterpreterBuilder, name)

        def function(self, *args):
            data = [a.data for a in args]
            if data[0].dtype != np.float32:
                return original(self, *args)
            with np.errstate(all="ignore"):
                found = exact(*data)
                noisy = found * (1 + random.uniform(-BOUND, BOUND, found.shape))
                found = np.where(data[0] == 0, found, noisy) if "exp" in name else noisy
                return interpreter.TensorHandle(found.astype(np.float32), args[0].dtype)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, function)

    for name, exact in FUNCTIONS.items():
        with_errors(name, exact)


CASES = [
    *(("cross_entropy", _loss_case, _LOSS_FAMILIES, family) for family in _LOSS_FAMILIES
      if family == "mean" or "softcap" in family or family == "scalars together"),
    ("linear_cross_entropy", _loss_case, _LOSS_FAMILIES, "softcap, logit_scale"),
    ("packed_attention", _attention_case, _ATTENTION_FAMILIES, "scale"),
    ("packed_attention", _attention_case, _ATTENTION_FAMILIES, "softcap"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "case", "families", "family"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_three_quarters_of_the_budget_suffice(approximate, op, case, families, family):
    row = _row((op, "triton", "float32", family), case, torch.float32, "cpu", families[family])
    assert row.verdict == "ok"
    assert row.ratio <= 0.75, row


@pytest.mark.parametrize("options", [{}, {"softcap": 6.0}, OPTIONS], ids=["plain", "softcap", "every option"])
def test_three_quarters_suffice_for_gradients_by_coefficients(approximate, options):
    v = 307
    case = Case(4 * torch.randn(24, v), torch.randint(0, v, (24,)), **options)
    triton_impl.softmax_grad(found := case.logits.clone(), case.target, case.options, **case.given)
    compared = compare(found, case.oracle(), case.autograd())
    assert compared.error <= 0.75 * compared.allowed, compared


def test_a_sure_token_keeps_the_digits_of_its_gradient(approximate):
    """Each row by itself, for beside the others a sure row's errors would not be seen. An exponential of x has an error
    of |x| 2⁻²⁴ for the rounding of its argument besides its own, so has the rest that the gradient is made of."""
    V, gaps = 4099, torch.tensor([1.0, 10.0, 20.0, 40.0, 60.0, 78.0])
    logits = torch.randn(len(gaps), V)
    target = torch.arange(len(gaps)) * 700
    largest = logits.scatter(1, target[:, None], float("-inf")).max(1).values
    logits[torch.arange(len(gaps)), target] = largest + gaps
    found = logits.clone()
    rows = triton_impl.softmax_grad(found, target, LossOptions(V), torch.ones(len(gaps)))
    below = logits.double() - logits.gather(1, target[:, None])
    others = below.exp().scatter(1, target[:, None], 0)
    rest = others.sum(1, keepdim=True)
    exact = others.scatter(1, target[:, None], -rest) / (1 + rest)
    bound = 2 * BOUND - below * 2.0**-23  # with as much again for the sums
    bound.scatter_(1, target[:, None], bound.max(1, keepdim=True).values)
    assert (((found - exact) / exact).abs() <= bound).all()
    nll = rest.log1p()[:, 0]
    assert ((rows.nll - nll).abs() <= bound.max(1).values * nll + torch.finfo(torch.float64).eps * rows.lse).all()


def test_exponentials_that_are_denormal_are_zero(approximate):
    V = 64
    logits = torch.zeros(2, V)
    logits[:, 0] = torch.tensor([80.0, 90.0])  # exp(−87.4) is the smallest that is not denormal
    target = torch.zeros(2, dtype=torch.int64)
    rows = triton_impl.softmax_grad(logits, target, LossOptions(V), torch.ones(2))
    assert (logits[0] != 0).all()
    assert (logits[1] == 0).all()
    assert rows.lse.tolist()[1] == 90.0
