"""What only a GPU can show of ``AdamW``: the compiled kernels' bits, no wait for the device, replay in a CUDA graph."""

import time
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from sft_kernels import AdamW
from sft_kernels._budget import check

from . import adamw_twin as twin
from .helpers import same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = [1023, 1024, 3 * 16384 + 1029, 7, 1, 0]


def leaves(dtype=torch.float32):
    return [nn.Parameter(torch.randn(n).to("cuda", dtype)) for n in SIZES]


@pytest.fixture
def never_wait():
    """Raises where the host waits for the device."""

    def on():
        torch.cuda.set_sync_debug_mode("error")

    yield on
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_compiled_bits_are_the_twins(dtype):
    params = leaves(dtype)
    kind = None if dtype == torch.float32 else "split"
    optimizer = AdamW(params, lr=1e-2, max_grad_norm=1e9, state_dtype=torch.float32, master_weights=kind, impl="triton")
    thetas = [p.detach().float().cpu().numpy() for p in params]
    moments = [(np.zeros(n, np.float32), np.zeros(n, np.float32)) for n in SIZES]
    for step in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        for i, p in enumerate(params):
            hyper = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
            thetas[i], *moments[i], _ = twin.update(
                thetas[i], p.grad.float().cpu().numpy(), *moments[i], step=step, **hyper
            )
            state = optimizer.state[p]
            weight = torch.from_numpy(twin.encode(thetas[i])[0].view(np.int16)).view(dtype) if kind else None
            assert same_bits(p.detach().cpu(), torch.from_numpy(thetas[i]) if weight is None else weight)
            assert same_bits(state["exp_avg"].cpu(), torch.from_numpy(moments[i][0]))
            assert same_bits(state["exp_avg_sq"].cpu(), torch.from_numpy(moments[i][1]))
            assert state["step"].item() == step + 1


def test_the_norm_is_within_the_budget_and_the_same_each_time():
    grads = [torch.randn(n, device="cuda") for n in SIZES]
    norms = []
    for _ in range(5):
        params = leaves()
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer = AdamW(params, max_grad_norm=1.0, impl="triton")
        optimizer.step()
        norms.append(optimizer.last_grad_norm)
    ref = torch.cat([g.double() for g in grads]).norm()
    check("norm", norms[0], ref, torch.cat(grads).norm())
    assert len({norm.item() for norm in norms}) == 1


def test_no_step_waits(never_wait):
    params = leaves()
    optimizer = AdamW(params, lr=1e-3, max_grad_norm=1.0, skip_nonfinite=True, update_stats=True, impl="triton")
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()  # compiles
    torch.cuda.synchronize()
    never_wait()
    for i in range(3):
        optimizer.param_groups[0]["lr"] = 1e-3 / (i + 2)
        for p in params:
            p.grad = torch.ones_like(p) * p.grad  # elsewhere
        optimizer.step()
        optimizer.update_statistics()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_second_clip_is_noticed_without_waiting(never_wait, impl):
    params = leaves()
    optimizer = AdamW(params, max_grad_norm=1.0, impl=impl)
    noticed = []
    for i in range(20):
        for p in params:
            p.grad = torch.randn_like(p)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        if i == 2:  # the kernels are compiled, the host's memory is there
            torch.cuda.synchronize()
            never_wait()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        noticed += [w for w in caught if "clipped to 1.0" in str(w.message)]
        time.sleep(0.01)  # the norm of one step is there before the next
    assert len(noticed) == 1


def test_a_captured_step_replays():
    lr = torch.tensor(1e-2, device="cuda")
    params = leaves()
    others = [nn.Parameter(p.detach().clone()) for p in params]
    grads = [torch.randn_like(p) for p in params]
    options = {"capturable": True, "max_grad_norm": 1.0, "skip_nonfinite": True, "impl": "triton"}
    optimizer, eager = AdamW(params, lr=lr, **options), AdamW(others, lr=lr, **options)
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for p, g in zip(others, grads, strict=True):
        p.grad = g.clone()
    eager.step()
    for rate in (1e-2, 3e-3, 1e-3):
        lr.fill_(rate)
        graph.replay()
        eager.step()
        assert same_bits([p.detach() for p in params], [p.detach() for p in others])
    assert all(state["step"] == 4 for state in optimizer.state.values())
