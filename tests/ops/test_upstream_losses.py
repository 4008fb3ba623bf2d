"""torch's own inputs: every sample of ``op_db`` for the two losses, values and gradients, and its error inputs."""

import pytest
import torch
import torch.nn.functional as F

from sft_kernels import cross_entropy, linear_cross_entropy
from sft_kernels._budget import check

from .helpers import DTYPES, as_in_float64

op_db = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db
OURS = {
    "nn.functional.cross_entropy": cross_entropy,
    "nn.functional.linear_cross_entropy": linear_cross_entropy,
}
OPS = [op for op in op_db if op.name in OURS and not op.variant_test_name]  # variants are those with `options`
each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


def test_torch_has_samples_for_both():
    expected = {name for name in OURS if hasattr(F, name.rsplit(".", 1)[1])}
    assert {op.name for op in OPS} == expected
    assert all(len(list(op.sample_inputs("cpu", torch.float32))) >= 20 for op in OPS)


def differentiate(function, sample, dtype):
    """Value and gradients of ``function`` at ``sample``, its tensors in ``dtype``, by all that asks for one."""
    leaves = []

    def cast(value):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        leaf = value.detach().to(dtype).requires_grad_(value.requires_grad)
        leaves.append(leaf)
        return leaf

    out = function(cast(sample.input), *map(cast, sample.args), **{k: cast(v) for k, v in sample.kwargs.items()})
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))


@each_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples(op, dtype):
    for number, sample in enumerate(op.sample_inputs("cpu", dtype, requires_grad=True)):
        ours, eager = (differentiate(f, sample, dtype) for f in (OURS[op.name], op.op))
        ref = differentiate(op.op, sample, torch.float64)
        if dtype == torch.float64:
            eager = as_in_float64(differentiate(op.op, sample, torch.float32), ref)
        assert len(ours) == len(ref) >= 2
        for i, (x, r, e) in enumerate(zip(ours, ref, eager, strict=True)):
            check(f"sample {number}, {f'gradient {i}' if i else 'value'}", x, r, e, output_dtype=dtype)
        if op.name == "nn.functional.cross_entropy":
            assert ours[0].dtype == dtype


@each_op
def test_error_inputs(op):
    """What torch refuses is refused, by name, with an error of our own."""
    for case in op.error_inputs("cpu") if op.error_inputs_func is not None else ():
        sample = case.sample_input
        with pytest.raises((ValueError, TypeError), match=r"^(input|linear_weight|linear_bias|target|ignore_index)"):
            OURS[op.name](sample.input, *sample.args, **sample.kwargs)
