"""On a GPU the compiled library does what its bodies do over fibers: AdamW to the bit, the core inside the budget."""

import pytest
import torch
from torch import nn

from sft_kernels import AdamW, _csrc, cross_entropy
from sft_kernels._backend import resolve
from sft_kernels.ops.softmax_grad.options import LossOptions

from ..ops.helpers import same_bits
from .host import on_cpu, why_not
from .test_softmax_grad import EVERY, at_phase, inputs, judge

GPU = torch.device("cuda")
REASON = "needs a CUDA device" if not torch.cuda.is_available() else _csrc.why_not(GPU)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize("options", [{}, EVERY], ids=["plain", "every option"])
@pytest.mark.parametrize("V", [128256, 50257, 1031, 7, 1 << 20])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_the_core_stays_within_the_budget(dtype, V, options):
    core = resolve("softmax_grad", "cuda", GPU)
    options = LossOptions(V, **options)
    logits, target, scale = inputs(V, dtype)
    x, phase = logits.to(GPU), at_phase(logits.to(GPU), 3)
    rows = core(x, target.to(GPU), options, scale.to(GPU), stats=True)
    again = core(phase, target.to(GPU), options, scale.to(GPU), stats=True)
    for found, dlogits in ((rows, x), (again, phase)):
        judge(
            type(found)(*(None if f is None else f.cpu() for f in found)), dlogits.cpu(), logits, target, scale, options
        )
    out = torch.empty(x.shape[0], V + 3, dtype=dtype, device=GPU)[:, 1 : V + 1]
    assert core(logits.to(GPU), target.to(GPU), options, scale.to(GPU), lse=rows.lse, out=out) is None
    judge(None, out.cpu(), logits, target, scale, options)


def test_labels_outside_the_vocabulary_are_not_read():
    x = torch.randn(3, 50000, device=GPU, dtype=BF16)
    losses = cross_entropy(x, torch.tensor([1, 2**40, -5], device=GPU), reduction="none", impl="cuda")
    assert losses.isnan().tolist() == [False, True, True]


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (FP32, {}),
        (FP32, {"amsgrad": True, "maximize": True}),
        (FP32, {"state_dtype": BF16}),
        (BF16, {}),
        (BF16, {"state_dtype": FP32}),
        (BF16, {"state_dtype": FP32, "master_weights": "float32"}),
        (BF16, {"state_dtype": FP32, "master_weights": "split"}),
        (BF16, {"state_dtype": FP32, "stochastic_rounding": True}),
        (FP16, {"state_dtype": FP32, "master_weights": "float32"}),
    ],
    ids=str,
)
def test_adamw_gives_the_bits_of_its_bodies_on_the_host(dtype, options):
    ends = []
    for device in ("cpu", "cuda"):
        random = torch.Generator().manual_seed(0)
        start = [torch.randn(n, generator=random).to(dtype) for n in (70001, 1000, 5, 0)]
        params = [nn.Parameter(p.to(device)) for p in start]
        with on_cpu():
            optimizer = AdamW(params, lr=1e-2, impl="cuda", max_grad_norm=1e9, **options)
            for _ in range(3):
                for p in params:
                    p.grad = torch.randn(p.shape, generator=random).to(device, dtype)
                optimizer.step()
        states = [sorted((name, t.cpu()) for name, t in optimizer.state[p].items()) for p in params]
        ends.append(([p.detach().cpu() for p in params], [[t for _, t in state] for state in states]))
    assert same_bits(*ends)
