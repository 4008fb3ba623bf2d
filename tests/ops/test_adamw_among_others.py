"""``AdamW`` among others: closures, hooks, schedulers; and in the place of torch's."""

import copy
import pickle
from importlib import import_module

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from sft_kernels import AdamW

from .adamw import HYPER, PATHS, gradients, parameters, snapshot, train
from .helpers import same_bits
from .test_adamw_scaler import train_scaled

# ---- in the place of torch's


@pytest.fixture
def swapped(monkeypatch):
    """Puts ours in the place of torch's, under both of its names."""
    torchs = torch.optim.AdamW

    def swap():
        monkeypatch.setattr(torch.optim, "AdamW", AdamW)
        monkeypatch.setattr(import_module("torch.optim.adamw"), "AdamW", AdamW)
        return torchs

    return swap


def whole_run(make, path):
    """Parameters and state after a schedule, a checkpoint, copies, and a gradient scaler."""
    torch.manual_seed(0)
    params, steps = parameters(), gradients(9)
    optimizer = make(params, **HYPER, max_grad_norm=1.0, **path)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for grads in steps[:3]:
        train(optimizer, params, [grads])
        schedule.step()
    state_dict = copy.deepcopy(optimizer.state_dict())
    optimizer = make(params, **path)
    optimizer.load_state_dict(state_dict)
    for duplicate in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        optimizer = duplicate(optimizer)
        params = optimizer.param_groups[0]["params"]
        train(optimizer, params, steps[3:5])
    train_scaled(optimizer, params, steps[5:])
    return snapshot(optimizer)


@PATHS
def test_in_the_place_of_torchs_every_bit_is_the_same(path, swapped):
    expected = whole_run(AdamW, path)
    torchs = swapped()
    assert same_bits(whole_run(torch.optim.AdamW, path), expected)
    assert isinstance(torch.optim.AdamW(parameters()), torchs)
    assert issubclass(torch.optim.AdamW, torchs)


def test_verify_compares_with_torchs_own_also_then(swapped):
    from sft_kernels import verify

    options = {"max_grad_norm": 100.0}
    expected = verify._adamw_case("adamw", "torch", torch.float32, "cpu", options)
    swapped()
    found = verify._adamw_case("adamw", "torch", torch.float32, "cpu", options)
    for name in expected:
        assert same_bits([*map(torch.as_tensor, found[name])], [*map(torch.as_tensor, expected[name])])


# ---- closures, hooks, schedulers


@PATHS
def test_a_closure_is_run_once_with_gradients_and_its_loss_returned(path):
    p = nn.Parameter(torch.ones(2))
    optimizer = AdamW([p], max_grad_norm=1.0, **path)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) == 2
    assert calls == [True]
    assert (p < 1).all()


def test_a_closure_that_raises_changes_nothing():
    params, steps = parameters(), gradients(2)
    optimizer = AdamW(params, max_grad_norm=1.0, skip_nonfinite=True)
    train(optimizer, params, steps)
    before = snapshot(optimizer)

    def closure():
        raise ArithmeticError("from the closure")

    with pytest.raises(ArithmeticError, match="from the closure"):
        optimizer.step(closure)
    assert same_bits(snapshot(optimizer), before)


@PATHS
@pytest.mark.parametrize("torch_first", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
def test_step_hooks_run_once(path, options, torch_first, monkeypatch):
    """torch wraps a class's step when its first instance is made; ours inherits from a class that may be wrapped."""
    for cls in (torch.optim.Adam, torch.optim.AdamW, AdamW):
        step = cls.__dict__.get("step")
        while getattr(step, "hooked", False):
            step = step.__wrapped__
        if step is not None:
            monkeypatch.setattr(cls, "step", step)
    if torch_first:
        torch.optim.Adam(parameters())
        torch.optim.AdamW(parameters())
    params, seen = parameters(), []
    optimizer = AdamW(params, **path, **options)
    if not torch_first:
        torch.optim.AdamW(parameters())
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    everywhere = register_optimizer_step_post_hook(lambda *_: seen.append("everywhere"))
    try:
        train(optimizer, params, gradients(2))
    finally:
        everywhere.remove()
    assert seen.count("before") == seen.count("after") == seen.count("everywhere") == 2


@pytest.mark.filterwarnings("error")
def test_a_scheduler_sets_the_rate_of_the_next_step():
    p = nn.Parameter(torch.zeros(1))
    optimizer = AdamW([p], lr=1.0, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step == 1 else 1.0)
    values = []
    for _ in range(3):
        train(optimizer, [p], [[torch.ones(1)]])
        scheduler.step()
        values.append(p.item())
    assert values[0] == pytest.approx(-1)
    assert values[1] == values[0]
    assert values[2] == pytest.approx(-2)


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "options", [{}, {"foreach": True}, {"master_weights": "float32"}, {"impl": "triton"}, {"impl": "cuda"}], ids=str
)
def test_sharded_parameters_step_as_whole_ones(options, one_rank):
    """What FSDP2 hands an optimiser; here on one rank."""
    values, steps = torch.randn(5, 3).bfloat16(), torch.randn(3, 5, 3).bfloat16()
    whole, sharded = nn.Parameter(values), nn.Parameter(distribute_tensor(values, one_rank, [Shard(0)]))
    mine, other = (AdamW([p], **HYPER, max_grad_norm=1.0, skip_nonfinite=True, **options) for p in (sharded, whole))
    for grad in steps:
        sharded.grad, whole.grad = distribute_tensor(grad, one_rank, [Shard(0)]), grad.clone()
        mine.step()
        other.step()
    assert same_bits(sharded.detach().full_tensor(), whole.detach())
    assert mine.last_grad_norm == other.last_grad_norm
    assert mine.skipped_steps == 0
