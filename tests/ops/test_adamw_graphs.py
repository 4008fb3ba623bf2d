"""CUDA graphs of ``AdamW``: a replay takes the numbers of its capture, every other step those of now.

Without a GPU: what a graph would capture is recorded and waits for its replay.
"""

import contextlib

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sft_kernels import AdamW
from sft_kernels.ops.adamw import tables, triton_impl

from .adamw import KERNELS, snapshot
from .helpers import same_bits

both = pytest.mark.parametrize("impl", KERNELS)


class Graph(TorchDispatchMode):
    """Copies into tensors, launches of Triton and operators of CUDA, in the order in which they were captured."""

    def __init__(self):
        super().__init__()
        self.nodes, self.launched_with = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        copies = func is torch.ops.aten.copy_.default
        if not copies and func.namespace != "sft_kernels_cuda":
            return func(*args, **kwargs)
        if not copies:  # the table of addresses travels by value
            args = (args[0].clone(), *args[1:])
        self.nodes.append(lambda: func(*args, **kwargs))
        return args[0] if copies else None

    def replay(self):
        for node in self.nodes:
            node()


@pytest.fixture
def capturing(monkeypatch):
    """A context that captures into the :class:`Graph` it gives; with the addresses that the kernels are launched with
    outside of any."""
    current = [None]

    class Kernel:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                if current[0] is None:
                    capture.launched_with.append(args[0])
                    self.kernel[grid](*args, **kwargs)
                else:
                    current[0].launched_with.append(args[0])
                    current[0].nodes.append(lambda: self.kernel[grid](*args, **kwargs))

            return launch

    @contextlib.contextmanager
    def capture():
        with Graph() as graph:
            current[0] = graph
            yield graph
            current[0] = None

    capture.launched_with = []
    for name in ("_sum_of_squares_kernel", "_update_kernel"):
        monkeypatch.setattr(triton_impl, name, Kernel(getattr(triton_impl, name)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] is not None)
    monkeypatch.setattr(tables, "is_capturing", lambda device: torch.cuda.is_current_stream_capturing())
    return capture


def pair(impl, lr=1e-2, **options):
    """Two optimisers of the same parameters and gradients, in two groups."""

    def one():
        params = [nn.Parameter(x.clone()) for x in start]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.3}]
        return AdamW(groups, lr=lr, max_grad_norm=1.0, skip_nonfinite=True, impl=impl, **options)

    start, grads = ([torch.randn(n) for n in (1030, 7)] for _ in range(2))
    return one(), one()


def set_rate(lr, *optimizers):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def step_at(optimizer, lr):
    set_rate(lr, optimizer)
    optimizer.step()


@both
def test_a_replay_takes_the_rate_of_its_capture_and_a_step_that_of_now(impl, capturing):
    ours, eager = pair(impl)

    def check(act, lr):
        act()
        step_at(eager, lr)
        assert same_bits(snapshot(ours), snapshot(eager))

    check(ours.step, 1e-2)
    with capturing() as old:  # with what is on the device already
        ours.step()
    set_rate(3e-3, ours)
    with capturing() as graph:  # sends a rate of its own
        ours.step()
    check(ours.step, 3e-3)  # which no replay has sent yet
    check(graph.replay, 3e-3)
    for rate in (1e-3, 5e-4):
        check(lambda rate=rate: step_at(ours, rate), rate)
        check(graph.replay, 3e-3)
        check(ours.step, rate)
        check(old.replay, 1e-2)
        check(ours.step, rate)
        with capturing() as graph_of_now:
            ours.step()
        check(graph.replay, 3e-3)
        check(graph_of_now.replay, rate)


@both
def test_a_rate_that_is_a_tensor_is_read_by_steps_and_replays(impl, capturing):
    lr = torch.tensor(1e-2)
    ours, eager = pair(impl, lr=lr, capturable=True)
    ours.step()
    with capturing() as graph:
        ours.step()
    eager.step()
    for rate in (1e-2, 3e-3, 1e-3):
        lr.fill_(rate)
        for act in (graph.replay, ours.step):
            act()
            eager.step()
            assert same_bits(snapshot(ours), snapshot(eager))


def test_a_step_sends_the_addresses_that_only_a_capture_has_sent(capturing):
    ours, eager = pair("triton")
    for optimizer in (ours, eager):
        optimizer.step()
    for group in ours.param_groups:
        for p in group["params"]:
            p.grad = p.grad.clone()  # elsewhere, as the gradients of a whole captured step are
    with capturing() as graph:
        ours.step()
    capturing.launched_with.clear()
    for act in (ours.step, graph.replay, ours.step):
        act()
        eager.step()
        assert same_bits(snapshot(ours), snapshot(eager))
    found = {id(x) for x in capturing.launched_with}
    assert found.isdisjoint(map(id, graph.launched_with))


@both
def test_captures_of_the_same_keep_it_once(impl, capturing):
    ours, _ = pair(impl)
    ours.step()
    kept = []
    for _ in range(3):
        with capturing() as graph:
            ours.step()
        assert all(id(x) in ours._captured for x in graph.launched_with)
        kept.append(len(ours._captured))
    assert kept[0] == kept[1] == kept[2] > 0
