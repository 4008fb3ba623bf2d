"""A training run compiles each kernel of packed attention once, however its batches differ."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# Compiled and not launched, in a process that does not interpret.
_BATCHES = """
import collections, json, random
import torch
from bench.compile_report import recording
from sft_kernels.ops.packed_attention import tiles, triton_backward, triton_forward, triton_tiles

def attend(lengths, tail, shift):
    T = sum(lengths) + tail
    bounds = torch.zeros(len(lengths) + 1 + shift, dtype=torch.int32)[shift:]
    bounds[1:] = torch.tensor(lengths).cumsum(0)
    triton_tiles.launch(bounds, T, 128)
    found = tiles.lists_by_numpy(bounds, T, 128)
    lists = torch.empty(found.numel() + shift, dtype=torch.int32)[shift:].view(found.shape).copy_(found)
    query, key = torch.empty(T, 8, 64, dtype=torch.bfloat16), torch.empty(T, 4, 64, dtype=torch.bfloat16)
    options = (128, random.choice([0.125, 1.0]), (-1, 0), None)
    out, lse = triton_forward.launch(query, key, key, lists, *options)
    triton_backward.launch(out, query, key, key, out, lse, lists, *options)

random.seed(0)
with recording(90) as launched:
    attend([1], 0, 0)
    attend([], 16, 1)
    for _ in range(60):
        lengths = [random.randint(0, 400) for _ in range(random.randint(1, 20))]
        attend(lengths, random.choice([1, 16, 77]), random.choice([0, 1]))
kernels = collections.defaultdict(set)
for kernel, compiled in launched:
    kernels[kernel].add(compiled.hash)
print(json.dumps([len(launched), {kernel: len(hashes) for kernel, hashes in kernels.items()}]))
"""


def test_ragged_batches_compile_one_variant_of_each_kernel():
    """Other numbers of tokens, segments and tiles, and lists and boundaries at any address."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _BATCHES],
        env=environment | {"PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    launches, variants = json.loads(done.stdout)
    assert launches == 62 * 4
    assert variants == dict.fromkeys(("_tiles_kernel", "_forward_kernel", "_dquery_kernel", "_dkey_kernel"), 1)
