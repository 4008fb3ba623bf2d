"""A pretended GPU answers as one, computes as a CPU, and leaves torch as it was."""

import os
import subprocess
import sys

import pytest
import torch

from bench import timing
from bench.pretend import GPU, HOST, pretended


@pytest.fixture
def gpu():
    with pretended():
        yield GPU


def test_tensors_lie_where_they_were_asked_to(gpu):
    host, there = torch.zeros(3), torch.zeros(3, device="cuda")
    assert (host.device, host.is_cuda, host.is_cpu, host.get_device()) == (HOST, False, True, -1)
    assert (there.device, there.is_cuda, there.is_cpu, there.get_device()) == (GPU, True, False, 0)
    for moved in (host.to("cuda"), host.to(GPU), host.cuda(), host.to(there), host.to("cuda", torch.float64)):
        assert moved.device == GPU
        assert moved.cpu().device == moved.to("cpu").device == moved.to(host).device == HOST
    assert there.to("cuda") is there
    assert host.to("cuda") is not host
    assert host.device == HOST  # still
    with torch.device("cuda"):
        assert torch.zeros(2).device == GPU


def test_results_lie_with_their_operands(gpu):
    host, there = torch.ones(3), torch.ones(3, device="cuda")
    for found in (there + 1, there[:2], there.new_empty(2), torch.empty_like(there), there.sum(), there + host):
        assert found.device == GPU
    for found in (host * 2, host[:2], torch.zeros_like(host), host.new_zeros(2)):
        assert found.device == HOST
    assert torch.zeros_like(host, device="cuda").device == GPU
    assert all(t.device == HOST for t in host.split(1))
    assert torch.nn.Parameter(there).device == GPU
    module = torch.nn.Linear(2, 2).to("cuda")
    assert {p.device for p in module.parameters()} == {GPU}


def test_numbers_and_gradients_are_the_cpus(gpu):
    seen = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(x.device)
            return 2 * x

        @staticmethod
        def backward(ctx, dout):
            seen.append((dout + 0).device)
            return 2 * dout

    x = torch.arange(3.0, device="cuda").requires_grad_()
    y = Double.apply(x)
    y.sum().backward()
    assert torch.autograd.grad(Double.apply(x).sum(), x)[0].tolist() == x.grad.tolist() == [2, 2, 2]
    assert y.tolist() == [0, 2, 4]
    assert seen == [GPU] * 4


def test_generators_and_pinned_memory(gpu):
    generator = torch.Generator("cuda").manual_seed(3)
    assert generator.device == GPU
    first = torch.randn(4, generator=generator, device="cuda")
    assert torch.equal(first, torch.randn(4, generator=torch.Generator("cuda").manual_seed(3), device="cuda"))
    assert torch.Generator().device == HOST
    assert torch.empty(2, pin_memory=True).pin_memory().shape == (2,)


def test_small_work_is_timed_behind_a_filled_queue_too(gpu, monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "_sleep", waits.append)
    rivals = {"small": timing.Rival(lambda _: None), "large": timing.Rival(lambda _: timing.time.sleep(0.006))}
    samples, failed = timing.interleaved(rivals, [()], gpu, budget=0, rounds=(3, 3))
    assert not failed
    # From the second round on, and all of them: a ratio has one kind of time on either side.
    assert [len(s) for s in samples["small"]] == [len(s) for s in samples["large"]] == [3, 2, 3]
    assert samples["small"].device is samples["small"].queued
    assert len(waits) == 4
    del rivals["small"]
    samples, _ = timing.interleaved(rivals, [()], gpu, budget=0, rounds=(3, 3))
    assert [len(s) for s in samples["large"]] == [3, 0, 3]
    assert samples["large"].device is samples["large"].called
    assert min(waits) > 1e-4 * 1.5e9  # cycles: longer than the launches take


def test_torch_is_itself_again_afterwards():
    before = torch.cuda.is_available, torch.Generator, torch.library.Library.impl
    with pretended():
        assert torch.cuda.is_available()
    assert (torch.cuda.is_available, torch.Generator, torch.library.Library.impl) == before
    assert torch.zeros(3).device == HOST


def test_the_gpus_branch_of_an_op_is_taken_and_is_right():
    """In a process of its own: the bodies of operators are deceived where they are registered."""
    code = """
import torch, sft_kernels
from sft_kernels import _triton
entered = []
on = _triton.on
_triton.on = lambda device: entered.append(device.type) or on(device)
from sft_kernels.ops.softmax_grad import triton_impl
x, y = torch.randn(5, 40, device="cuda", requires_grad=True), torch.tensor([1, 2, -100, 39, 0], device="cuda")
loss = sft_kernels.cross_entropy(x, y)
loss.backward()
plain = torch.nn.functional.cross_entropy(x.detach().cpu(), y.cpu())
assert loss.device.type == "cuda" and abs(float(loss) - float(plain)) < 1e-5, (loss, plain)
assert entered and set(entered) == {"cuda"}, entered
h, w = (torch.randn(n, 16, device="cuda").bfloat16().requires_grad_() for n in (5, 40))
loss = sft_kernels.linear_cross_entropy(h, w, y)
dh, dw = torch.autograd.grad(loss, (h, w))
plain = [t.detach().cpu().float().requires_grad_() for t in (h, w)]
expected = torch.autograd.grad(torch.nn.functional.cross_entropy(plain[0] @ plain[1].T, y.cpu()), plain)
assert all(torch.allclose(a.cpu().float(), b, atol=1e-2) for a, b in zip((dh, dw), expected))
from sft_kernels.ops.packed_attention import triton_tiles
launched = []
launch = triton_tiles.launch
triton_tiles.launch = lambda *args: launched.append(args[0].device.type) or launch(*args)
bounds = torch.tensor([0, 3, 40])
host = sft_kernels.AttentionTiles.from_cu_seqlens(bounds, 50)
assert launched == [], launched
there = sft_kernels.AttentionTiles.from_cu_seqlens(bounds.to("cuda"), 50)
assert launched == ["cuda"] and there.lists.device.type == "cuda", launched
assert torch.equal(host.lists, there.lists.cpu())
print("right")
"""
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = [sys.executable, "-c", f"from bench.pretend import pretended\nwith pretended():\n exec({code!r})"]
    done = subprocess.run(
        run, env=os.environ | path | {"TRITON_INTERPRET": "1"}, cwd=timing.ROOT, capture_output=True, text=True
    )
    assert done.stdout == "right\n", done.stderr
