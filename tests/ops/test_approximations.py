"""The error budget has room for a GPU's own functions.

The interpreter computes exponentials, logarithms and divisions right to the last bit. A GPU does not: here they carry
errors up to the bounds that the PTX ISA documents, 2⁻²² of the value for ``ex2.approx``, ``lg2.approx`` and
``div.full``.
"""

import numpy as np
import pytest
import torch
import triton
from triton.runtime import interpreter

from sft_kernels.verify import _ATTENTION_FAMILIES, _LOSS_FAMILIES, _attention_case, _loss_case, _row

if not triton.knobs.runtime.interpret:
    pytest.skip("Triton does not interpret here", allow_module_level=True)

BOUND = 2.0**-22
LOG2_E = np.float32(np.log2(np.e))
FUNCTIONS = {
    "create_exp": lambda x: np.exp2((x * LOG2_E).astype(np.float64)),  # as compiled: the product is rounded to fp32
    "create_exp2": lambda x: np.exp2(x.astype(np.float64)),
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
                found *= 1 + random.uniform(-BOUND, BOUND, found.shape)
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
