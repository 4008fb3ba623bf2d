"""``packed_attention``, its forward and its backward, causal, against every peer and the work that cannot be left out.

Useful FLOPs only: a forward has ``2 D Hq Σ l(l + 1)``, a backward 2.5 times that. The mixes are lognormal with mean
350, the logarithm's deviation 1.0, within [16, 4096], as the examples of real fine-tuning sets are.
"""

import math
import random

import pytest
import torch

from . import peers, right, timing
from .suite import Suite

# Layout, tokens, query and key heads. The uniform ones of 32 k tokens and 16 heads have the shapes of
# FlashAttention's own tables (hidden 2048, D = 128). The first cells matter most: a call may have no time
# for the last.
_K = 1 << 10
GPU_SHAPES = [
    *(("mix", 16 * _K, 32, 8), (8 * _K, 16 * _K, 32, 8), ("mix", 64 * _K, 32, 8), ("mix", 8 * _K, 32, 8)),
    *((n * _K, 32 * _K, 16, 16) for n in (1, 4, 16)),
    *(("mix", 32 * _K, 32, 8), ("mix", 16 * _K, 8, 2), ("mix", 64 * _K, 8, 2), (512, 16 * _K, 32, 8)),
]
FLEX = "mix", 16 * _K, 32


class PackedAttention(Suite):
    op = "packed_attention"
    passes = "one pass"

    def adapters(self):
        return peers.attentions(self.device)

    def cells(self):
        cuda = self.device.type == "cuda"
        if self.tiny:
            shapes, D = [("mix", 256, 4, 2)], 32
        elif cuda:
            shapes, D = GPU_SHAPES, 128
        else:
            shapes, D = [("mix", 4096, 8, 2), (512, 4096, 8, 2)], 64
        cells = {}
        for layout, T, Hq, Hkv in shapes:
            for which in ("forward", "backward"):
                lengths = f"mix of {T}" if layout == "mix" else f"{T // layout} × {layout}"
                cells[f"{lengths}, {Hq}/{Hkv} heads, {which}"] = {
                    "layout": layout, "T": T, "Hq": Hq, "Hkv": Hkv, "D": D, "pass": which,
                    "dtype": "bfloat16" if cuda else "float32",
                    "peak_on_cpu": layout == "mix",
                }  # fmt: skip
        return cells

    def left_out(self, name, p):
        """FlexAttention compiles for some 20 s for each mask and pass, more than all other cells together take."""
        if name == "FlexAttention" and self.device.type == "cuda" and (p["layout"], p["T"], p["Hq"]) != FLEX:
            return f"measured on the mix of {FLEX[1]} alone: it compiles anew for each mask"

    def error(self, adapter, p):
        return right.checked(right.attention_error, adapter, self.device, getattr(torch, p["dtype"]))

    def sets(self, p):
        T, D, dtype = p["T"], p["D"], getattr(torch, p["dtype"])
        each = 2 * (p["Hq"] + p["Hkv"]) * T * D * dtype.itemsize
        sets = []
        for seed in range(timing.sets_beyond_cache(each, self.device)):
            generator = torch.Generator(self.device).manual_seed(seed)
            shapes = [(T, H, D) for H in (p["Hq"], p["Hkv"], p["Hkv"], p["Hq"])]
            q, k, v, dout = (
                torch.randn(s, generator=generator, device=self.device, dtype=torch.float32).to(dtype) for s in shapes
            )
            sets.append((*(t.requires_grad_() for t in (q, k, v)), dout))
        return sets

    def rival(self, make, p):
        lengths = lengths_of(p["layout"], p["T"])
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(self.device, torch.int32)
        attention = make(bounds, max(lengths))
        if p["pass"] == "backward" and not attention.backward:
            raise peers.Absent("no backward on this device")

        def prepare(q, k, v, dout):
            leaves = attention.pack(q, k, v)
            if p["pass"] == "forward":
                return leaves, None, None
            return leaves, attention.attend(*leaves), attention.pack(dout, dout, dout)[0]

        def run(prepared):
            leaves, out, dout = prepared
            if out is None:
                return attention.attend(*leaves)
            return torch.autograd.grad(out, leaves, dout)

        return timing.Rival(run, prepare)

    def machine(self, p):
        n = 64 if self.tiny else 8192 if self.device.type == "cuda" else 1024
        product = timing.matmul(n, getattr(torch, p["dtype"]), self.device)
        return {"copy": timing.copy(self._copied(p), self.device), f"matmul {n}": product}

    def _copied(self, p):
        """Bytes that a pass must move: q, k, v and out; backward reads these and dout and writes three gradients."""
        tensors = (p["Hq"] + p["Hkv"]) * 2 if p["pass"] == "forward" else p["Hq"] * 4 + p["Hkv"] * 4
        return tensors * p["T"] * p["D"] * getattr(torch, p["dtype"]).itemsize

    def floor(self, p, medians):
        (name,) = medians.keys() - {"copy"}
        rate = 2 * int(name.split()[1]) ** 3 / medians[name]
        by_bytes = medians["copy"] / 2  # the copy read and wrote as many
        by_flops = useful_flops(p) / rate
        if by_bytes > by_flops:
            return by_bytes, "unavoidable bytes at copy bandwidth"
        return by_flops, "useful FLOPs at a plain matmul's rate"


def lengths_of(layout, T, seed=0):
    """Lengths of examples that fill ``T`` tokens: all of length ``layout``, or the "mix", whose last one is cut."""
    if layout != "mix":
        return [layout] * (T // layout)
    draw = random.Random(seed).lognormvariate
    lengths = []
    while sum(lengths) < T:
        l = min(4096, max(16, round(draw(math.log(350) - 0.5, 1.0))))
        lengths.append(min(l, T - sum(lengths)))
    return lengths


def useful_flops(p):
    """What a causal pass must multiply and add."""
    forward = 2 * p["D"] * p["Hq"] * sum(l * (l + 1) for l in lengths_of(p["layout"], p["T"]))
    return forward if p["pass"] == "forward" else 2.5 * forward


def one_run(name, cell, tiny=False):
    suite = PackedAttention("cpu", tiny)
    return suite.one_run(name, suite.cells()[cell])


SUITE = PackedAttention


@pytest.mark.benchmark(timer=timing.CLOCK)
def test_packed_attention(row):
    row()
