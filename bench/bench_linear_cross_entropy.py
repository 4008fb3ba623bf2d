"""``linear_cross_entropy``, forward and backward, against every peer and the three plain products of the kept rows."""

import pytest
import torch

from . import peers, right, timing
from .suite import Suite, confident, labels, sweep

# Hugging Face TRL, issue 6858: chunked, Liger, unfused and Cut Cross-Entropy on an H100, bf16, nothing
# masked. The other cells' shape is that of Liger's and QuACK's own tables.
PUBLISHED = {"N": 16384, "D": 2048, "V": 248320}


class LinearCrossEntropy(Suite):
    op = "linear_cross_entropy"
    passes = "forward + backward"

    def adapters(self):
        return peers.linear_losses(self.device)

    def cells(self):
        cuda = self.device.type == "cuda"
        N, D, V = (64, 32, 512) if self.tiny else (8192, 4096, 128256) if cuda else (1024, 512, 32000)
        shape = {"N": N, "D": D, "V": V, "dtype": "bfloat16" if cuda else "float32"}
        cells = {name: shape | cell for name, cell in sweep(cuda, self.tiny)}
        if cuda and not self.tiny:  # early: what a call has no time for is cut off at the end
            early = [*cells][:5]
            whole = PUBLISHED | {"dtype": "bfloat16"} | dict(sweep(cuda, self.tiny))[early[0]]
            rest = {name: cells.pop(name) for name in [*cells] if name not in early}
            cells |= {f"{' × '.join(map(str, PUBLISHED.values()))}, {early[0]}": whole} | rest
        return cells

    def error(self, adapter, p):
        return right.checked(right.linear_loss_error, adapter, self.device, getattr(torch, p["dtype"]))

    def sets(self, p):
        N, D, V, dtype = p["N"], p["D"], p["V"], getattr(torch, p["dtype"])
        each = (N + V) * D * dtype.itemsize
        sets = []
        for seed in range(timing.sets_beyond_cache(each, self.device)):
            generator = torch.Generator(self.device).manual_seed(seed)
            y = labels(N, V, p["kept"], p["pattern"], generator)
            w = torch.randn(V, D, generator=generator, device=self.device).mul_(D**-0.5)
            x = torch.randn(N, D, generator=generator, device=self.device)
            if p["logits"] == "peaked":
                target = w[y.clamp(min=0)]
                x += confident(V) * target / target.norm(dim=1, keepdim=True) ** 2
            sets.append((x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), y))
        return sets

    def rival(self, loss, p):
        count = getattr(loss, "count", lambda y: y)  # before the clock starts
        return timing.Rival(
            lambda inputs: torch.autograd.grad(loss(*inputs), inputs[:2]), lambda x, w, y: (x, w, count(y))
        )

    def machine(self, p):
        def prepare(x, w, y):
            return x.detach()[y != -100], w.detach()

        def three_products(inputs):
            kept, w = inputs
            logits = torch.mm(kept, w.T)
            return torch.mm(logits, w), torch.mm(logits.T, kept)

        return {"three products": timing.Rival(three_products, prepare)}

    def floor(self, p, medians):
        return medians["three products"], "three torch.mm at the kept rows' shapes"


def one_run(name, cell, tiny=False):
    suite = LinearCrossEntropy("cpu", tiny)
    return suite.one_run(name, suite.cells()[cell])


def peak_extra_bytes(name, masked):
    """Growth of the peak resident set over one forward and backward on the CPU, fp32, 1024 × 256 × 32000.

    ``name`` is "ours" or a peer's, ``masked`` the share of labels that are -100.
    """
    return timing.peak_extra_bytes(f"{__name__}:_unswept", name, masked)


def _unswept(name, masked):
    shape = {"N": 1024, "D": 256, "V": 32000, "dtype": "float32"}
    cell = shape | {"kept": 1 - masked, "pattern": "prompt", "logits": "uniform"}
    return LinearCrossEntropy("cpu").one_run(name, cell)


SUITE = LinearCrossEntropy


@pytest.mark.benchmark(timer=timing.CLOCK)
def test_linear_cross_entropy(row):
    row()
