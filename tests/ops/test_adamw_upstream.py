"""torch's own inputs for AdamW, ``optim_db``, and its options through every path, beside ``torch.optim.AdamW``."""

import copy
from importlib import import_module

import pytest
import torch
from torch import nn

from sft_kernels import AdamW
from sft_kernels._budget import check

from .adamw import (
    KERNELS,
    SHAPES,
    check_state,
    flat,
    gradients,
    only_what_triton_carries,
    oracle,
    parameters,
    train,
    twins,
)
from .helpers import same_bits

pytest.importorskip("expecttest", reason="torch's own test inputs need it")
from torch.testing._internal.common_optimizers import optim_db

INFO = copy.copy(next(info for info in optim_db if info.optim_cls is torch.optim.AdamW))
INFO.optim_cls = AdamW
CONFIGURATIONS = INFO.optim_inputs_func("cuda")  # those of the CPU and the capturable ones
ERRORS = INFO.optim_error_inputs_func("cpu", torch.float32)
FLAGS = {
    "chosen": {},
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "for-loop": {"foreach": False, "fused": False},
    "mixed": {"state_dtype": torch.float64},  # for fp64, the chosen one
    "triton": {"impl": "triton"},
    "cuda": {"impl": "cuda"},
}


def path_of(optimizer):
    """The flags by which torch takes the path that ``optimizer`` takes; for the mixed one, its plain code."""
    group = optimizer.param_groups[0]
    if optimizer._mixed or optimizer._impl in KERNELS:
        return {"foreach": False}
    return {name: group[name] for name in ("foreach", "fused")}


@pytest.fixture
def _capturable_on_a_cpu(monkeypatch):
    """torch's for-loop and foreach refuse ``capturable`` on a CPU, though nothing in them needs a GPU."""
    adam = import_module("torch.optim.adam")  # torch.optim hides its modules
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda supports_xla=True: ["cpu"])


def test_there_are_inputs():
    descriptions = {each.desc for each in CONFIGURATIONS}
    assert {"default", "maximize", "amsgrad", "capturable", "Tensor lr, Tensor betas, with capturable"} <= descriptions
    assert {each.desc for each in INFO.optim_inputs_func("cpu")} <= descriptions
    assert len(ERRORS) >= 12


@pytest.mark.usefixtures("_capturable_on_a_cpu")
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda each: each.desc)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_configuration_of_torchs(configuration, flags, dtype):
    only_what_triton_carries(FLAGS[flags], dtype)
    options = {"betas": (0.9, 0.999), "weight_decay": 1e-2, **copy.deepcopy(configuration.kwargs)}
    params, steps = parameters(dtype), gradients(5, dtype)
    mine, other = twins(params), twins(params)
    optimizer = INFO.optim_cls(mine, **options, **FLAGS[flags])
    eager = torch.optim.AdamW(other, **options, **path_of(optimizer))
    train(optimizer, mine, steps)
    train(eager, other, steps)
    assert optimizer._mixed or flags in KERNELS or same_bits(mine, other)
    ref, states = oracle(params, steps, eager.param_groups)
    check("parameters", flat(mine), flat(ref), flat(other))
    check_state(optimizer, states, eager)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.optimizer_error_input.desc)
def test_every_error_of_torchs(error):
    given = error.optimizer_error_input
    params = parameters() if given.params is None else given.params
    expect = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
    with expect(error.error_type, match=error.error_regex):
        INFO.optim_cls(params, **given.kwargs)


@pytest.mark.parametrize("options", [{"amsgrad": True}, {"maximize": True}, {"weight_decay": 0.0}], ids=str)
@pytest.mark.parametrize("tensors", [False, True])
def test_a_step_can_be_differentiated(options, tensors):
    """With respect to where it began, the gradients, and the hyperparameters that are tensors."""
    start, grads = ([torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in SHAPES] for _ in range(2))
    hyper = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.1, 0.9, 0.95)]

    def differentiated(make, **flags):
        lr, *betas = hyper if tensors else (0.1, 0.9, 0.95)
        params = [p.clone() for p in start]
        optimizer = make(params, lr=lr, betas=tuple(betas), differentiable=True, **{"weight_decay": 0.1, **options})
        for _ in range(1 if "amsgrad" in options else 2):  # torch overwrites what a second backward of amsgrad needs
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            optimizer.step()
        total = sum((p**3).sum() for p in params)
        return torch.autograd.grad(total, start + grads + (hyper if tensors else []))

    assert same_bits(differentiated(AdamW), differentiated(torch.optim.AdamW))


@pytest.mark.parametrize("lr", [torch.tensor(0.01), torch.tensor([[0.01]]), torch.tensor(0.01).double()], ids=str)
@pytest.mark.parametrize("flags", ["chosen", "for-loop", "mixed", *KERNELS])
def test_a_scheduler_may_write_into_a_tensor_of_a_rate(lr, flags):
    params, steps = parameters(), gradients(4)
    mine, other = twins(params), twins(params)
    optimizer = AdamW(mine, lr=lr.clone(), **FLAGS[flags])
    options = {"lr": lr.clone(), "betas": (0.9, 0.95), "weight_decay": 0.1}
    eager = torch.optim.AdamW(other, **options, **path_of(optimizer))
    for grads in steps:
        train(optimizer, mine, [grads])
        train(eager, other, [grads])
        for each in (optimizer, eager):
            each.param_groups[0]["lr"].mul_(0.5)
    assert optimizer._mixed or flags in KERNELS or same_bits(mine, other)
    ref, states = params, None
    for i, grads in enumerate(steps):
        groups = [{**eager.param_groups[0], "lr": float(lr) * 0.5**i}]
        ref, found = oracle(ref, [grads], groups, states)
        states = [{name: x.numpy() for name, x in state.items()} for state in found]
    check("parameters", flat(mine), flat(ref), flat(other))


def test_betas_that_a_graph_cannot_read_keep_off_the_fused_kernel():
    betas = torch.tensor(0.9), torch.tensor(0.99)
    fused = [
        AdamW(parameters(), **options).param_groups[0]["fused"]
        for options in ({"capturable": True, "betas": betas}, {"betas": betas}, {"capturable": True})
    ]
    assert fused == [None, True, True]


def test_named_parameters_are_taken():
    model = nn.Linear(3, 2)
    optimizer = AdamW(model.named_parameters(), state_dtype=torch.float64)
    train(optimizer, [*model.parameters()], [[torch.ones(2, 3), torch.ones(2)]])
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    other = AdamW(nn.Linear(3, 2).named_parameters())
    other.load_state_dict(optimizer.state_dict())
    assert other.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
