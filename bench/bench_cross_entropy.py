"""``cross_entropy`` over logits that exist, forward and backward, against every peer and the bytes it must move."""

import pytest
import torch

from . import peers, right, timing
from .suite import Suite, confident, labels, sweep


class CrossEntropy(Suite):
    op = "cross_entropy"
    passes = "forward + backward"

    def adapters(self):
        return peers.losses(self.device)

    def cells(self):
        cuda = self.device.type == "cuda"
        N, V = (64, 512) if self.tiny else (8192, 128256) if cuda else (1024, 32000)
        shape = {"N": N, "V": V, "dtype": "bfloat16" if cuda else "float32"}
        cells = {name: shape | cell for name, cell in sweep(cuda, self.tiny)}
        for cell in cells.values():
            cell["peak_on_cpu"] &= cell["kept"] in (1.0, 0.2)
        return cells

    def error(self, adapter, p):
        return right.checked(right.loss_error, adapter, self.device, getattr(torch, p["dtype"]))

    def sets(self, p):
        N, V, dtype = p["N"], p["V"], getattr(torch, p["dtype"])
        sets = []
        for seed in range(timing.sets_beyond_cache(N * V * dtype.itemsize, self.device)):
            generator = torch.Generator(self.device).manual_seed(seed)
            y = labels(N, V, p["kept"], p["pattern"], generator)
            x = torch.randn(N, V, generator=generator, device=self.device, dtype=dtype)
            if p["logits"] == "peaked":
                x[torch.arange(N, device=self.device), y.clamp(min=0)] += confident(V)
            sets.append((x.requires_grad_(), y))
        return sets

    def rival(self, peer, p):
        def prepare(x, y):  # who overwrites gets a copy, made before the clock starts
            return (x, x.clone() if peer.overwrites else x, y)

        def run(inputs):
            leaf, x, y = inputs
            return torch.autograd.grad(peer.loss(x, y), leaf)

        return timing.Rival(run, prepare)

    def machine(self, p):
        return {"copy": timing.copy(self._copied(p), self.device)}

    def _copied(self, p):
        return p["N"] * p["V"] * getattr(torch, p["dtype"]).itemsize

    def floor(self, p, medians):
        whole = self._copied(p)
        moved = whole * (1 + p["kept"])  # the kept rows are read, the whole gradient is written
        return medians["copy"] * moved / (2 * whole), "kept logits read, all gradients written, at copy bandwidth"


def one_run(name, cell, tiny=False):
    suite = CrossEntropy("cpu", tiny)
    return suite.one_run(name, suite.cells()[cell])


SUITE = CrossEntropy


@pytest.mark.benchmark(timer=timing.CLOCK)
def test_cross_entropy(row):
    row()
