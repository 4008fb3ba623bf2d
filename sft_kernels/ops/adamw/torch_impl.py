"""The step over torch's own AdamW, fused where it can be; and an update of its own for what torch's kernels refuse."""

import torch

from ..._plain import is_without_values
from .rounding import decode, encode, round_stochastically
from .sharding import Ranks, aligned_gradient, is_sharded, local, placement_in_whole
from .state import follow, laid_out_as, moments, state_of


def step(optimizer):
    """One update of ``optimizer`` (an :class:`sft_kernels.AdamW`), its gradients ready.

    torch's fused kernel divides each gradient by ``grad_scale`` as it reads it and leaves everything alone where
    ``found_inf`` is 1, both read on the device. So clipping is a division that costs no pass, and a skipped step costs
    no sync. On the foreach path clipping is a pass of its own, and skipping reads one flag back. The mixed path,
    :func:`adamw` a tensor at a time, takes scale and flag as the fused kernel does.
    """
    _prepare(optimizer)
    measured = optimizer.max_grad_norm is not None or optimizer.skip_nonfinite
    if not measured and not optimizer._mixed:
        return optimizer._torch_step()
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not grads:
        return optimizer._torch_step()

    # Set by torch.amp.GradScaler around the call, where the step takes them; the norm is of the unscaled gradients.
    outer = {name: getattr(optimizer, name) for name in ("grad_scale", "found_inf") if hasattr(optimizer, name)}
    scale, found_inf = outer.get("grad_scale"), outer.get("found_inf")
    fused = all(group["fused"] for group in optimizer.param_groups)
    with torch.no_grad():
        if measured:
            grads = [torch.view_as_real(g) if g.is_complex() else g for g in grads]
            ranks = Ranks(grads)
            norm = global_norm(grads, ranks)
            if scale is not None:
                norm = norm / scale.to(norm.device)
            optimizer.last_grad_norm = norm.float()
        if optimizer.skip_nonfinite:
            bad = ~norm.isfinite()
            if found_inf is not None:
                bad |= ranks.sum_((found_inf > 0).float()).to(bad.device) > 0
            found_inf = bad.float()
            optimizer.skipped_steps += bad.to(optimizer.skipped_steps)
            if not fused and not optimizer._mixed and not is_without_values(bad) and bad:
                return None
        if optimizer.max_grad_norm not in (None, float("inf")):  # an infinite norm over infinity is NaN
            clip = ((norm + 1e-6) / optimizer.max_grad_norm).clamp(min=1)  # torch's clip_grad_norm_, inverted
            if optimizer._mixed or (fused and clip.dtype == torch.float32):
                scale = clip if scale is None else clip * scale.to(clip.device)
            else:  # also for fp64: torch's fused kernel reads its scale in fp32
                torch._foreach_mul_(list(map(local, grads)), 1 / clip)
        if optimizer._mixed:
            return _mixed_step(optimizer, scale, found_inf)
    if not fused:
        return optimizer._torch_step()

    try:
        optimizer.grad_scale, optimizer.found_inf = scale, found_inf
        optimizer._torch_step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf
        vars(optimizer).update(outer)


def global_norm(grads, ranks):
    """The 2-norm of all ``grads`` together, 0-d, on the first one's device, without a sync.

    fp32, or fp64 where any of them is. DTensors count as whole tensors: ``ranks`` (:class:`sharding.Ranks`) share it.
    """
    by_device = {}
    for grad in grads:
        by_device.setdefault((grad.device, grad.dtype == torch.float64), []).append(grad)
    dtype = torch.float64 if any(double for _, double in by_device) else torch.float32
    norms, copies = [], []
    for (_, double), g in by_device.items():
        found = torch._foreach_norm(list(map(local, g)), 2, torch.float64 if double else torch.float32)
        norms += [norm.to(grads[0].device, dtype) for norm in found]
        copies += map(ranks.copies, g)
    if not ranks.groups:
        return torch.linalg.vector_norm(torch.stack(norms))
    squares = sum(norm.double() ** 2 / n for norm, n in zip(norms, copies, strict=True))
    return ranks.sum_(squares).sqrt().to(dtype)


def adamw(p, g, m, v, v_max=None, *, step, lr, beta1, beta2, eps, weight_decay):
    """``p, m, v`` and, with amsgrad, ``v_max`` of one tensor after its ``step``-th gradient ``g``; and last the update.

    All of one floating dtype, which is also the one of the arithmetic, and at least 1-d: so ``step``, an fp64 0-d
    tensor, and ``lr`` and betas that are fp64 0-d tensors, promote nothing. What is made of scalars alone is fp64 and
    rounded once. The order of operations is the README's.
    """
    # From the nearer end: with a small β1 the rounding of a large old m would else stay in the new one.
    near = beta1 <= 0.5
    mean = _where(near, g, m) + _where(near, -beta1, 1 - beta1) * (g - m)
    m = _where(beta1 == 0, g, mean)  # 0 · ∞ is NaN, but what has no memory forgets also that
    v = _where(beta2 == 0, g * g, beta2 * v + (1 - beta2) * (g * g))
    largest = v if v_max is None else torch.maximum(v_max, v)
    denominator = largest.sqrt() * (1 / (1 - beta2**step).sqrt()) + eps
    update = lr / (1 - beta1**step) * (m / denominator) + lr * weight_decay * p
    p = p - update
    return (p, m, v, update) if v_max is None else (p, m, v, largest, update)


def _where(condition, x, y):
    """``torch.where``; a condition on the host computes nothing."""
    if isinstance(condition, torch.Tensor):
        return torch.where(condition, x, y)
    return x if condition else y


def _mixed_step(optimizer, scale, found_inf):
    """Update every parameter by :func:`adamw` in fp32 (fp64 for fp64); each tensor is rounded once, without a sync."""
    index, stats = 0, [] if optimizer.update_stats else None
    for group in optimizer.param_groups:
        counted = []
        for p in group["params"]:
            if p.grad is not None:
                skip = None if found_inf is None else found_inf.to(p.device) > 0
                counted.append(_mixed_update(optimizer, p, index, state_of(optimizer, group, p), group, scale, skip))
            index += 1
        if stats is not None:
            stats.append(counted)
    if stats is not None:
        optimizer._torch_stats = _summed(optimizer, stats)


def _mixed_update(optimizer, p, index, state, group, scale, skip):
    """Update ``p``; with ``update_stats`` returns Σ δ², Σ θ² and how many updates were rounded away, and ``skip``."""

    def write(tensor, value):
        tensor.copy_(value if skip is None else torch.where(skip, tensor, value))

    real = torch.view_as_real if p.is_complex() else torch.atleast_1d
    weight = real(local(p.detach()))
    old = [real(local(state[name])) for name in moments(group)]
    master, remainder = (real(local(state[name])) if name in state else None for name in ("master", "remainder"))
    theta = weight if master is None else master
    if remainder is not None:
        theta = decode(weight, remainder)
    dtype = torch.promote_types(torch.float32, torch.promote_types(theta.dtype, old[0].dtype))
    g = real(local(p.grad)).to(dtype)
    if scale is not None:
        g = g * (1 / scale.to(p.device, torch.float64)).to(dtype)
        write(real(local(p.grad)), g)
    g = -g if group["maximize"] else g
    step = state["step"].double() + 1
    lr, beta1, beta2 = (_scalar(x, p.device) for x in (group["lr"], *group["betas"]))
    theta = theta.to(dtype)
    new, *new_moments, update = adamw(
        theta,
        g,
        *(t.to(dtype) for t in old),
        step=step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        weight_decay=group["weight_decay"],
    )
    kept = weight_new = new
    if remainder is not None:
        weight_new, remainder_new = encode(new)
    elif optimizer._rounds(p):
        weight_new = round_stochastically(new, seed=group.get("seed", 0), t=step, p=p, index=index)
    counted = None
    if optimizer.update_stats:  # before anything is written: θ may be what is updated
        if master is None and remainder is None:
            kept = weight_new.to(weight.dtype).to(dtype)
        lost = (update != 0) & (kept == theta)
        sums = torch.stack([x.sum(dtype=torch.float64) for x in (update * update, theta * theta, lost)])
        counted = sums, lost.numel(), skip
    for tensor, value in zip(old, new_moments, strict=True):
        write(tensor, value)
    write(weight, weight_new)
    if remainder is not None:
        write(remainder.view(torch.int16), remainder_new.view(torch.int16))
    elif master is not None:
        write(master, new)
    write(state["step"], step)
    return counted


def _summed(optimizer, stats):
    """Sums and counts by group; of the step before where this one is skipped."""
    device = optimizer.skipped_steps.device
    before = optimizer._torch_stats and optimizer._torch_stats[0]
    sums, counts = torch.zeros(len(stats), 3, dtype=torch.float64, device=device), []
    for i, counted in enumerate(stats):
        for each, _, skip in counted:
            old = torch.zeros_like(each) if before is None else before[i].to(each.device) / len(counted)
            sums[i] += (each if skip is None else torch.where(skip, old, each)).to(device)
        counts.append(sum(count for _, count, _ in counted))
    return sums, counts


def _scalar(x, device):
    # A number stays one: to copy it to the device would wait for it.
    return x.to(device, torch.float64, non_blocking=True).reshape(()) if isinstance(x, torch.Tensor) else x


def _prepare(optimizer):
    """Refuse what cannot be updated before anything is, and follow what has changed since the path was chosen.

    A model may be moved, cast or laid out anew between steps. torch's fused CPU kernel walks parameter, gradient and
    moments by address, so that one of another layout would update the wrong elements: it is laid out as its parameter.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if optimizer._rounds(p) and p.grad is not None:
                placement_in_whole(p)  # raises where it cannot say
    if not optimizer._mixed and any(
        (optimizer.master_weights is not None, optimizer.state_dtype is not None, optimizer.stochastic_rounding)
    ):
        optimizer._choose_path()
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is None:
                continue
            if is_sharded(p):
                aligned_gradient(p)
            if optimizer._mixed:
                continue  # ``state_of`` sees to it
            state = optimizer.state.get(p)
            if state:
                follow(p, state)
                if group["fused"] or group["capturable"]:
                    state["step"] = state["step"].to(p.device)
            if not group["fused"]:
                continue
            stride = p.stride()
            if p.grad.stride() != stride:
                p.grad = laid_out_as(p, p.grad)
            if state and state["exp_avg"].dtype != p.dtype:
                optimizer._choose_path()
            elif state and state["exp_avg"].stride() != stride:
                state.update({name: laid_out_as(p, state[name]) for name in moments(group)})
