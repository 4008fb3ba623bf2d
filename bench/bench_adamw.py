"""One step of ``AdamW``, clipping included where asked for, against every peer and the bytes it must move."""

import pytest
import torch

from . import peers, right, timing
from .suite import Suite


class AdamWStep(Suite):
    op = "adamw"
    passes = "one step"

    def adapters(self):
        return peers.optimizers(self.device)

    def cells(self):
        cuda = self.device.type == "cuda"
        layers, hidden, inner, kv, vocabulary = (
            (2, 32, 64, 16, 128)
            if self.tiny
            else (32, 1536, 4096, 512, 65536)  # 1.0 B parameters in 291 tensors
            if cuda
            else (32, 256, 688, 64, 4096)  # 24 M in 291
        )
        shape = {"layers": layers, "hidden": hidden, "inner": inner, "kv": kv, "vocabulary": vocabulary}
        combinations = [("float32", "float32", 1.0), ("float32", "float32", None), ("bfloat16", "float32", 1.0)]
        if cuda:
            combinations.append(("bfloat16", "bfloat16", 1.0))
        if self.tiny:
            combinations = combinations[:1]
        return {
            f"{dtype}, moments {state}{', clipped' if clip else ''}": shape
            | {"dtype": dtype, "state_dtype": state, "clip": clip, "peak_on_cpu": (dtype, clip) == ("float32", 1.0)}
            for dtype, state, clip in combinations
        }

    def error(self, adapter, p):
        dtypes = getattr(torch, p["dtype"]), getattr(torch, p["state_dtype"])
        return right.checked(right.optimizer_error, adapter, self.device, *dtypes, p["clip"])

    def sets(self, p):
        # One set is enough: parameters, gradients and everybody's own moments are many times the cache.
        return [()]

    def rival(self, make, p):
        state_dtype = getattr(torch, p["state_dtype"])
        step = make(self._parameters(p), state_dtype, p["clip"])
        return timing.Rival(lambda _: step())

    def _parameters(self, p):
        """One model for all rivals: each has moments of its own, and time does not depend on values."""
        if getattr(self, "_held", (None,))[0] is not p:
            generator = torch.Generator(self.device).manual_seed(0)
            dtype = getattr(torch, p["dtype"])
            params = [torch.randn(s, generator=generator, device=self.device).to(dtype) for s in llama_shapes(p)]
            for param in params:
                param.requires_grad_().grad = torch.randn_like(param)
            self._held = p, params
        return self._held[1]

    def machine(self, p):
        return {"copy": timing.copy(self._copied(p), self.device)}

    def _copied(self, p):
        return min(1 << 30, numel(p) * 4)

    def floor(self, p, medians):
        param, state = getattr(torch, p["dtype"]).itemsize, getattr(torch, p["state_dtype"]).itemsize
        each = 3 * param + 4 * state + (param if p["clip"] else 0)
        bandwidth = 2 * self._copied(p) / medians["copy"]
        return numel(p) * each / bandwidth, f"{each} bytes a parameter at copy bandwidth"


def llama_shapes(p):
    """The parameters of a Llama-shaped model: nine a layer, embedding, head and last norm."""
    hidden, inner, kv = p["hidden"], p["inner"], p["kv"]
    attention = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    layer = [*attention, (inner, hidden), (inner, hidden), (hidden, inner), (hidden,), (hidden,)]
    return [(p["vocabulary"], hidden), *layer * p["layers"], (hidden,), (p["vocabulary"], hidden)]


def numel(p):
    return sum(torch.Size(shape).numel() for shape in llama_shapes(p))


def one_run(name, cell, tiny=False):
    suite = AdamWStep("cpu", tiny)
    return suite.one_run(name, suite.cells()[cell])


SUITE = AdamWStep


@pytest.mark.benchmark(timer=timing.CLOCK)
def test_adamw(row):
    row()
