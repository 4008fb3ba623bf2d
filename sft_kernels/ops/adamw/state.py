"""The state of one parameter: what torch keeps, in the dtypes asked for, and a master or its remainder."""

import torch

from ..._checks import unlike_dense

HALF = (torch.float16, torch.bfloat16)
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
MASTERS = ("master", "remainder")  # at most one of them
_UPDATED = {torch.float32, torch.float64, *HALF, torch.complex64, torch.complex128}


def moments(group):
    return MOMENTS[: 3 if group["amsgrad"] else 2]


def refuse_unfit(optimizer):
    """Refuse what no implementation updates, before anything is written; a parameter without a gradient may be so."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                check_fit(p, "params")
                check_fit(p.grad, "gradients", RuntimeError)  # as torch's optimisers do


def check_fit(t, name, error=ValueError):
    """Raise ``error`` if no implementation takes ``t``, a tensor of the argument ``name``."""
    if kind := unlike_dense(t):
        raise error(f"{name}: expected dense tensors, got {kind}")
    if t.dtype not in _UPDATED:
        raise error(f"{name}: AdamW does not support {t.dtype}; use float16, bfloat16, float32 or float64")


def state_of(optimizer, group, p):
    """The state of ``p``, with what it lacks. ``step`` stands on the device: whether it counts is known only there."""
    check_half(optimizer, p)
    state = optimizer.state[p]
    state["step"] = state["step"].to(p.device) if state else torch.zeros((), dtype=torch.float32, device=p.device)
    for name in moments(group):
        if name not in state:
            state[name] = torch.zeros_like(p, dtype=optimizer.state_dtype, requires_grad=False)
    if optimizer._wants_master(p) and not any(name in state for name in MASTERS):
        if optimizer.master_weights == "split":
            state["remainder"] = torch.zeros_like(p, requires_grad=False)  # of bits: ``rounding.encode``
        else:
            state["master"] = p.detach().float()
    follow(p, state)
    return state


def follow(p, state):
    """Move moments and master of ``p`` to where it is: a model may be moved when its optimiser has a state already."""
    for name in (*MOMENTS, *MASTERS):
        if name in state and state[name].device != p.device:
            state[name] = laid_out_as(p, state[name])


def check_half(optimizer, p):
    """``ValueError`` where an option that knows bf16 alone meets fp16."""
    if p.dtype == torch.float16:
        if optimizer.master_weights == "split":
            raise ValueError("master_weights: 'split' is for bf16 parameters, got one of torch.float16; use 'float32'")
        if optimizer.stochastic_rounding:
            raise ValueError("stochastic_rounding: rounds to bf16, got a parameter of torch.float16")


def laid_out_as(p, tensor):
    """``tensor`` with the strides of ``p``."""
    return torch.empty_like(p, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


def is_dense(p):
    """Whether the elements of ``p`` fill their stretch of memory, so that moments can lie the same way."""
    return p.is_contiguous() or torch.empty_like(p, device="meta").stride() == p.stride()
