"""What the tests of AdamW share: parameters, a training loop, the oracle, and the budget between them."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from sft_kernels._budget import check, compute_dtype_of
from sft_kernels.ops.adamw import reference
from sft_kernels.ops.adamw.rounding import decode, encode

KERNELS = ("triton", "cuda")  # implementations of the same formula, to the bit
PATHS = pytest.mark.parametrize(
    "path",
    [{}, {"foreach": True}, {"foreach": False}, {"impl": "triton"}, {"impl": "cuda"}],
    ids=["fused", "foreach", "single", "triton", "cuda"],
)
IMPLS = pytest.mark.parametrize("impl", ["torch", *KERNELS])
HYPER = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.05}
SHAPES = [(7, 5), (5,), (3, 2, 4), ()]
BAD = [float("nan"), float("inf"), -float("inf")]
HALF = [torch.bfloat16, torch.float16]
MOMENTS = {"exp_avg": "m", "exp_avg_sq": "v", "max_exp_avg_sq": "v_max"}  # torch's names, and the oracle's
# What takes the mixed path, by the dtype of the parameters.
MIXED = [
    (torch.bfloat16, {"state_dtype": torch.float32}),
    (torch.float16, {"state_dtype": torch.float32}),
    (torch.float32, {"state_dtype": torch.bfloat16}),
    (torch.float32, {"state_dtype": torch.float64}),
    (torch.float64, {"state_dtype": torch.float32}),
    (torch.bfloat16, {"master_weights": "float32"}),
    (torch.bfloat16, {"master_weights": "float32", "state_dtype": torch.float32}),
    (torch.float16, {"master_weights": "float32", "state_dtype": torch.float32}),
    (torch.bfloat16, {"master_weights": "split"}),
    (torch.bfloat16, {"master_weights": "split", "state_dtype": torch.float32}),
]


def flags(path):
    """The flags by which torch's own optimiser takes ``path``, or for what is not torch's the fused one."""
    return {"fused": True} if not path or "impl" in path else path


def only_what_triton_carries(impl, *dtypes):
    """``impl`` is a name, or options with one."""
    impl = impl.get("impl") if isinstance(impl, dict) else impl
    if impl in KERNELS and torch.float64 in dtypes:
        pytest.skip("float64 is torch's own code")


def precise(optimizer, p):
    """What the updates of ``p`` are collected in: its master, or itself."""
    state = optimizer.state.get(p, {})
    if "remainder" in state:
        return decode(p.detach(), state["remainder"])
    return state.get("master", p)


def parameters(dtype=torch.float32):
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def twins(params, dtype=None):
    return [nn.Parameter(p.detach().clone().to(dtype or p.dtype)) for p in params]


def gradients(steps, dtype=torch.float32):
    """Of very different sizes from step to step, so that a clip at 1 sometimes bites."""
    return [[(torch.randn(shape) * 10.0 ** (i % 4 - 2)).to(dtype) for shape in SHAPES] for i in range(steps)]


def train(optimizer, params, steps, before_step=lambda params: None):
    for grads in steps:
        for p, grad in zip(params, grads, strict=True):
            p.grad = None if grad is None else grad.clone().to(p.dtype)
        before_step(params)
        optimizer.step()
    return params


def clipped(max_grad_norm):
    """For ``train``: torch's own clip."""
    if max_grad_norm is None:
        return lambda params: None
    return lambda params: nn.utils.clip_grad_norm_(params, max_grad_norm)


def snapshot(optimizer):
    """Parameters, and state where there is any."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return copy.deepcopy(
        [[p.detach() for p in params], [dict(optimizer.state[p]) for p in params if p in optimizer.state]]
    )


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def in_two_groups(params):
    return [{"params": params[:2], "lr": 3e-2, "weight_decay": 0.3}, {"params": params[2:], "betas": (0.5, 0.9)}]


def oracle(params, steps, groups, states=None, **options):
    """Parameters and states, float64, after ``steps``, with the hyperparameters of a torch optimiser's ``groups``."""
    each = [
        {
            "lr": float(group["lr"]),
            "beta1": float(group["betas"][0]),
            "beta2": float(group["betas"][1]),
            **{name: group[name] for name in ("eps", "weight_decay", "amsgrad", "maximize")},
        }
        for group in groups
        for _ in group["params"]
    ]
    params = [p.detach().double().numpy() for p in params]
    states = states or [{} for _ in params]
    for grads in steps:
        grads = [None if g is None else g.double().numpy() for g in grads]
        stepped = [reference.step(params, grads, states, **options, **hyper) for hyper in each]
        params = [all_params[i] for i, (all_params, *_) in enumerate(stepped)]
        states = [all_states[i] for i, (_, all_states, *_) in enumerate(stepped)]
    return [torch.as_tensor(np.asarray(p)) for p in params], [
        {name: torch.as_tensor(np.asarray(x)) for name, x in state.items()} for state in states
    ]


def check_state(optimizer, states, eager):
    """The moments and the count of ``optimizer`` against the oracle's ``states``, beside an ``eager`` optimiser's."""
    ours, theirs = (
        [o.state.get(p, {}) for group in o.param_groups for p in group["params"]] for o in (optimizer, eager)
    )
    for name, symbol in (*MOMENTS.items(), ("step", "t")):
        found = [(a[name], ref[symbol], b[name]) for a, ref, b in zip(ours, states, theirs, strict=True) if name in b]
        for each in found:
            check(name, *each)
    for a, b in zip(ours, theirs, strict=True):
        assert {*a} - {"master", "remainder"} == {*b}


def check_step(optimizer, grads):
    """Let ``optimizer`` step, and hold what it wrote to the oracle from the state that was there.

    So no rounding of an earlier step hides an error. The plain code is torch's for-loop, or foreach where that
    is asked for: in the parameters' dtype, but for the mixed path in the dtype of its arithmetic, so that nothing is
    allowed but one rounding.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [dict(optimizer.state.get(p, {})) for p in params]
    before = [precise(optimizer, p).detach().clone() for p in params]
    known = [
        {"t": float(s["step"])} | {m: s[name].double().numpy() for name, m in MOMENTS.items() if name in s} if s else {}
        for s in states
    ]

    double = torch.float64 in (params[0].dtype, optimizer.state_dtype)
    ours = optimizer._mixed or optimizer._impl in KERNELS
    compute = (torch.float64 if double else torch.float32) if ours else params[0].dtype
    plain = twins(before, compute)
    left = iter(plain)
    names = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")
    eager = torch.optim.AdamW(
        [
            {"params": [next(left) for _ in group["params"]]} | {name: group[name] for name in names}
            for group in optimizer.param_groups
        ],
        foreach=bool(optimizer.param_groups[0]["foreach"]),
    )
    for p, state in zip(plain, states, strict=True):
        if state:
            eager.state[p] = {"step": state["step"].clone()} | {
                name: state[name].to(compute, copy=True) for name in MOMENTS if name in state
            }
    options = {"max_grad_norm": optimizer.max_grad_norm, "skip_nonfinite": optimizer.skip_nonfinite}
    ref, ref_states = oracle(before, [grads], eager.param_groups, known, **options)
    train(eager, plain, [grads], clipped(optimizer.max_grad_norm))
    train(optimizer, params, [grads])

    # The norm that clips is fp32 where the gradients are not fp64.
    clips = optimizer.max_grad_norm is not None and params[0].dtype != torch.float64
    judged = {"compute_dtype": torch.float32 if clips else compute_dtype_of(compute)}
    for p, q, r, ref_state in zip(params, plain, ref, ref_states, strict=True):
        state = optimizer.state.get(p, {})
        check("parameter", precise(optimizer, p), r, q, **judged)
        for name, m in MOMENTS.items():
            if name in eager.state.get(q, {}):
                # Stored, as anyone would have to: fp16 has no relative precision for a v below 6e-5.
                check(name, state[name], ref_state[m], eager.state[q][name].to(state[name].dtype), **judged)
        assert state.get("step") == eager.state.get(q, {}).get("step")
        if "master" in state:
            assert torch.equal(p, state["master"].to(p.dtype))
        if "remainder" in state:
            assert torch.equal(p, encode(precise(optimizer, p))[0])
