"""The step over torch's own AdamW: fused where it can be, with clip and skip folded into its one pass."""

import torch


def step(optimizer):
    """One update of ``optimizer`` (an :class:`sft_kernels.AdamW`), its gradients ready.

    torch's fused kernel divides each gradient by ``grad_scale`` as it reads it and leaves everything alone where
    ``found_inf`` is 1, both read on the device. So clipping is a division that costs no pass, and a skipped step costs
    no sync. On the foreach path clipping is a pass of its own, and skipping reads one flag back.
    """
    _check_gradients(optimizer)
    if optimizer.max_grad_norm is None and not optimizer.skip_nonfinite:
        return _torch_step(optimizer)
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not grads:
        return _torch_step(optimizer)

    # Set by torch.amp.GradScaler around the call, on the fused path only; the norm is that of the unscaled gradients.
    outer = {name: getattr(optimizer, name) for name in ("grad_scale", "found_inf") if hasattr(optimizer, name)}
    outer_scale, outer_inf = outer.get("grad_scale"), outer.get("found_inf")
    with torch.no_grad():
        norm = global_norm(grads)
        if outer_scale is not None:
            norm = norm / outer_scale.to(norm.device)
        optimizer.last_grad_norm = norm
        scale = None
        if optimizer.max_grad_norm is not None:
            scale = ((norm + 1e-6) / optimizer.max_grad_norm).clamp(min=1)  # torch's clip_grad_norm_, inverted
        bad = None
        if optimizer.skip_nonfinite:
            bad = (~norm.isfinite()).float()
            if outer_inf is not None:
                bad = torch.maximum(bad, outer_inf.to(bad.device))
            optimizer.skipped_steps += bad.to(optimizer.skipped_steps)

        if not all(group["fused"] for group in optimizer.param_groups):
            if bad is not None and bool(bad):
                return None
            if scale is not None:
                torch._foreach_mul_(grads, 1 / scale)
            return _torch_step(optimizer)

    try:
        if scale is not None:
            optimizer.grad_scale = scale if outer_scale is None else scale * outer_scale.to(scale.device)
        if bad is not None:
            optimizer.found_inf = bad
        _torch_step(optimizer)
    finally:
        for name in ("grad_scale", "found_inf"):
            vars(optimizer).pop(name, None)
        vars(optimizer).update(outer)


def global_norm(grads):
    """The 2-norm of all ``grads`` together, fp32, 0-d, on the first one's device, without a sync."""
    by_device = {}
    for grad in grads:
        by_device.setdefault((grad.device, grad.dtype == torch.float64), []).append(grad)
    norms = [
        norm.to(grads[0].device, torch.float32)
        for g in by_device.values()
        for norm in torch._foreach_norm(g, 2, torch.float64 if g[0].dtype == torch.float64 else torch.float32)
    ]
    return torch.linalg.vector_norm(torch.stack(norms))


def _check_gradients(optimizer):
    """Before anything is written: no sparse gradient, and for the fused kernel each gradient laid out as its parameter.

    torch's fused CPU kernel walks both by address, so that a gradient of another layout would update the wrong
    elements.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError("AdamW does not support sparse gradients")
            if group["fused"] and p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p, requires_grad=False).copy_(p.grad)


def _torch_step(optimizer):
    # torch wraps the class's step to run step hooks; ours is wrapped already, and hooks run once.
    method = torch.optim.AdamW.step
    if getattr(method, "hooked", False):
        method = method.__wrapped__
    method(optimizer)
