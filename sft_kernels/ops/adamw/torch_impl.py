"""The step over torch's own AdamW, fused where it can be; and an update of its own for what torch's kernels refuse."""

import torch


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
        return _torch_step(optimizer)
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not grads:
        return _torch_step(optimizer)

    # Set by torch.amp.GradScaler around the call, where the step takes them; the norm is of the unscaled gradients.
    outer = {name: getattr(optimizer, name) for name in ("grad_scale", "found_inf") if hasattr(optimizer, name)}
    scale, found_inf = outer.get("grad_scale"), outer.get("found_inf")
    fused = all(group["fused"] for group in optimizer.param_groups)
    with torch.no_grad():
        if measured:
            grads = [torch.view_as_real(g) if g.is_complex() else g for g in grads]
            norm = global_norm(grads)
            if scale is not None:
                norm = norm / scale.to(norm.device)
            optimizer.last_grad_norm = norm.float()
        if optimizer.skip_nonfinite:
            bad = ~norm.isfinite()
            if found_inf is not None:
                bad |= found_inf.to(bad.device) > 0
            found_inf = bad.float()
            optimizer.skipped_steps += bad.to(optimizer.skipped_steps)
            if not fused and not optimizer._mixed and bad:
                return None
        if optimizer.max_grad_norm not in (None, float("inf")):  # an infinite norm over infinity is NaN
            clip = ((norm + 1e-6) / optimizer.max_grad_norm).clamp(min=1)  # torch's clip_grad_norm_, inverted
            if optimizer._mixed or (fused and clip.dtype == torch.float32):
                scale = clip if scale is None else clip * scale.to(clip.device)
            else:  # also for fp64: torch's fused kernel reads its scale in fp32
                torch._foreach_mul_(grads, 1 / clip)
        if optimizer._mixed:
            return _mixed_step(optimizer, scale, found_inf)
    if not fused:
        return _torch_step(optimizer)

    try:
        optimizer.grad_scale, optimizer.found_inf = scale, found_inf
        _torch_step(optimizer)
    finally:
        del optimizer.grad_scale, optimizer.found_inf
        vars(optimizer).update(outer)


def global_norm(grads):
    """The 2-norm of all ``grads`` together, 0-d, on the first one's device, without a sync.

    fp32, or fp64 where any of them is.
    """
    by_device = {}
    for grad in grads:
        by_device.setdefault((grad.device, grad.dtype == torch.float64), []).append(grad)
    dtype = torch.float64 if any(double for _, double in by_device) else torch.float32
    norms = [
        norm.to(grads[0].device, dtype)
        for (_, double), g in by_device.items()
        for norm in torch._foreach_norm(g, 2, torch.float64 if double else torch.float32)
    ]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # a DTensor: reduced over the ranks


def adamw(p, g, m, v, v_max=None, *, step, lr, beta1, beta2, eps, weight_decay):
    """``p, m, v`` and, with amsgrad, ``v_max`` of one tensor after its ``step``-th gradient ``g``.

    All of one floating dtype, which is also the one of the arithmetic, and at least 1-d: so ``step``, an fp64 0-d
    tensor, and ``lr`` and betas that are 0-d tensors, promote nothing. The bias corrections are rounded once,
    from fp64.
    """
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g**2
    largest = v if v_max is None else torch.maximum(v_max, v)
    m_hat = m / (1 - beta1**step)
    v_hat = largest / (1 - beta2**step)
    p = p - lr * (m_hat / (v_hat.sqrt() + eps) + weight_decay * p)
    return (p, m, v) if v_max is None else (p, m, v, largest)


def _mixed_step(optimizer, scale, found_inf):
    """Update every parameter by :func:`adamw` in fp32 (fp64 for fp64); each tensor is rounded once, without a sync."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                skip = None if found_inf is None else found_inf.to(p.device) > 0
                _mixed_update(p, _mixed_state(optimizer, group, p), group, scale, skip)


def _mixed_state(optimizer, group, p):
    """The state of ``p``, with what it lacks. ``step`` stands on the device: whether it counts is known only there."""
    state = optimizer.state[p]
    state["step"] = state["step"].to(p.device) if state else torch.zeros((), dtype=torch.float32, device=p.device)
    for name in _moments(group):
        if name not in state:
            state[name] = torch.zeros_like(p, dtype=optimizer.state_dtype)
    if optimizer._wants_master(p) and "master" not in state:
        state["master"] = p.detach().float()
    return state


def _mixed_update(p, state, group, scale, skip):
    def write(tensor, value):
        tensor.copy_(value if skip is None else torch.where(skip, tensor, value))

    real = torch.view_as_real if p.is_complex() else torch.atleast_1d
    old = [real(t) for t in (state.get("master", p), *(state[name] for name in _moments(group)))]
    dtype = torch.promote_types(torch.float32, torch.promote_types(old[0].dtype, old[1].dtype))
    g = real(p.grad).to(dtype)
    if scale is not None:
        g = g / scale.to(p.device, dtype)
        write(real(p.grad), g)
    g = -g if group["maximize"] else g
    step = state["step"].double() + 1
    lr, beta1, beta2 = (_scalar(x, p.device) for x in (group["lr"], *group["betas"]))
    param, *moments = (t.to(dtype) for t in old)
    new = adamw(
        param,
        g,
        *moments,
        step=step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        weight_decay=group["weight_decay"],
    )
    for tensor, value in zip(old, new, strict=True):
        write(tensor, value)
    if "master" in state:
        p.copy_(state["master"])
    write(state["step"], step)


def _moments(group):
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]


def _scalar(x, device):
    # A number stays one: to copy it to the device would wait for it.
    return x.to(device, non_blocking=True).reshape(()) if isinstance(x, torch.Tensor) else x


def _prepare(optimizer):
    """Refuse sparse gradients before anything is updated, and follow what has changed since the path was chosen.

    A model may be cast or laid out anew between steps. torch's fused CPU kernel walks parameter, gradient and moments
    by address, so that one of another layout would update the wrong elements: it is laid out as its parameter.
    """
    if not optimizer._mixed and (optimizer.master_weights is not None or optimizer.state_dtype is not None):
        optimizer._choose_path()
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError("AdamW does not support sparse gradients")
            if optimizer._mixed or not group["fused"]:
                continue
            stride = p.stride()
            if p.grad.stride() != stride:
                p.grad = _laid_out_as(p, p.grad)
            state = optimizer.state.get(p)
            if state and state["exp_avg"].dtype != p.dtype:
                optimizer._choose_path()
            elif state and state["exp_avg"].stride() != stride:
                state.update({name: _laid_out_as(p, state[name]) for name in _moments(group)})


def _laid_out_as(p, tensor):
    return torch.empty_like(p, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


def _torch_step(optimizer):
    # torch wraps the class's step to run step hooks; ours is wrapped already, and hooks run once.
    method = torch.optim.AdamW.step
    if getattr(method, "hooked", False):
        method = method.__wrapped__
    method(optimizer)
