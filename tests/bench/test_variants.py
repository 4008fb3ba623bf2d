"""Ragged batches do not compile the losses' kernels anew: each compilation would stall a training step for a second."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# Sixty batches through the real launcher, in a process that does not interpret. Prints the compiled variants of each
# kernel, [ways of calling, variants].
_BATCHES = """
import json, random, torch
from bench.compile_report import recording
from sft_kernels.ops.softmax_grad import triton_impl
from sft_kernels.ops.softmax_grad.options import LossOptions

V, random = 1024, random.Random(0)
rows = [1, 2, 16, 17, *(random.randint(2, 12000) for _ in range(56))]

def cut(tensor, begin):
    return torch.cat((tensor[:begin], tensor))[begin:]  # so that it may begin anywhere

def one_read(N, begin):
    return {"lse": cut(torch.ones(N, dtype=torch.float64), begin)}

def options_and_stats(N, begin):
    return {"stats": True, "keep": cut(torch.ones(N, dtype=torch.bool), begin)}

ways = {"two reads": lambda N, begin: {}, "one read": one_read, "statistics": options_and_stats}
found = {}
with recording(90) as launched:
    for N in rows:
        begin = random.randint(0, N)
        target, scale = cut(torch.zeros(N, dtype=torch.int64), begin), cut(torch.ones(N), begin)
        for way, arguments in ways.items():
            x = torch.empty(N, V, dtype=torch.bfloat16)
            options = LossOptions(V, z_loss=random.choice((1e-4, 0.5, 1.0)), label_smoothing=random.choice((0.1, 1.0)))
            triton_impl.softmax_grad(x, target, options, scale, **arguments(N, begin))
            found.setdefault(way, set()).add(launched[-1].compiled.hash)
        for n in (N * V, N * V + begin, N):
            triton_impl.scale_(torch.empty(n, dtype=torch.bfloat16), scale[0])
            found.setdefault("scale", set()).add(launched[-1].compiled.hash)
    # Only allocated: nothing is launched, and so nothing read. Its size does not fit 32 bits.
    triton_impl.scale_(torch.empty(2**31 + 1, dtype=torch.bfloat16), torch.ones(()))
    found["scale"].add(launched[-1].compiled.hash)
print(json.dumps({way: len(hashes) for way, hashes in found.items()}))
"""


def test_sixty_ragged_batches_compile_each_kernel_once(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.getcwd(), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", _BATCHES], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"two reads": 1, "one read": 1, "statistics": 1, "scale": 1}
