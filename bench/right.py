"""Does an adapter compute what plain PyTorch does? Asked once, on small inputs, before anybody is timed.

Each ``…_error`` returns the worst error of a value or gradient over what the project's error budget allows; over 1 is
off. The reference is the plain code in fp64, and the plain code in the same dtype sets the budget.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F

from sft_kernels import _backend
from sft_kernels._budget import compare
from sft_kernels.ops.softmax_grad.options import LossOptions

from .peers import ADAMW, LR, Absent
from .timing import reason


def _worst(results, reference, eager):
    found = [compare(*each) for each in zip(results, reference, eager, strict=True)]
    return max(0.0 if c.error == 0 else c.error / c.allowed if c.allowed else float("inf") for c in found)


def value_and_gradients(function, *tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def _against_plain(function, plain, tensors):
    double = value_and_gradients(plain, *(t.double() for t in tensors))
    return _worst(value_and_gradients(function, *tensors), double, value_and_gradients(plain, *tensors))


def linear_loss_error(loss, device, dtype, N=256, D=128, V=1024):
    """Of ``loss(hidden, weight, labels)``: half of the labels masked."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(N, D, generator=generator, device=device).to(dtype)
    w = (torch.randn(V, D, generator=generator, device=device) * 2 / D**0.5).to(dtype)
    y = torch.randint(V, (N,), generator=generator, device=device)
    y[: N // 2] = -100
    return _against_plain(lambda x, w: loss(x, w, y), lambda x, w: F.cross_entropy(F.linear(x, w), y), (x, w))


def loss_error(loss, device, dtype, N=256, V=1024):
    """Of a :class:`Loss`: half of the labels masked."""
    generator = torch.Generator(device).manual_seed(0)
    x = (2 * torch.randn(N, V, generator=generator, device=device)).to(dtype)
    y = torch.randint(V, (N,), generator=generator, device=device)
    y[: N // 2] = -100

    def of_copy(x):  # not a leaf, which Liger refuses to overwrite
        return loss.loss(x.clone(), y)

    return _against_plain(of_copy, lambda x: F.cross_entropy(x, y), (x,))


def core_error(softmax_grad, logits, target):
    """The same of the core's gradients and losses of ``logits``, each row with a scale of its own."""
    scale = torch.linspace(0.5, 2.0, len(target), device=logits.device) / len(target)

    def plain(x):
        x = x.detach().requires_grad_()
        losses = F.cross_entropy(x, target, reduction="none")
        return [losses.detach(), torch.autograd.grad(losses, x, scale.to(x.dtype))[0]]

    gradient = logits.clone()
    rows = softmax_grad(gradient, target, LossOptions(logits.shape[1]), scale)
    return _worst([rows.nll, gradient], plain(logits.double()), plain(logits))


def optimizer_error(make, device, dtype, state_dtype, max_grad_norm):
    """Of the parameters after some steps, against ``torch.optim.AdamW``, a tensor at a time.

    The gradients' scale changes from step to step: Adam does not see a constant one, nor, then, a missing clip.
    """

    def stepped(build, dtype):
        generator = torch.Generator(device).manual_seed(0)
        shapes = [(64, 33), (7,), (128, 16)]
        params = [torch.randn(s, generator=generator, device=device).to(dtype).requires_grad_() for s in shapes]
        step = build(params)
        for scale in (1.0, 30.0, 0.01):
            for p in params:
                p.grad = scale * torch.randn(p.shape, generator=generator, device=device).to(dtype)
            step()
        return [p.detach() for p in params]

    def plain(params):
        optimizer = torch.optim.AdamW(params, LR, **ADAMW, foreach=False)

        def step():
            if max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(params, max_grad_norm)
            optimizer.step()

        return step

    results = stepped(lambda params: make(params, state_dtype, max_grad_norm), dtype)
    return _worst(results, stepped(plain, torch.float64), stepped(plain, dtype))


def plain_attention(q, k, v, cu_seqlens):
    """Causal attention of [T, H, D] tensors, an example at a time, with all its scores."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    out = []
    for start, end in pairwise(cu_seqlens.tolist()):
        query, key, value = (t[start:end].transpose(0, 1) for t in (q, k, v))
        hidden = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
        scores = (query @ key.transpose(1, 2) * q.shape[2] ** -0.5).masked_fill(hidden, float("-inf"))
        out.append((scores.softmax(-1) @ value).transpose(0, 1))
    return torch.cat(out)


def _of_heads(gradient, heads):
    """The gradient [T, H, D] of ``heads`` heads that were repeated next to each other to be H."""
    return gradient.unflatten(1, (heads, -1)).sum(2, dtype=torch.float64).to(gradient.dtype)


def attention_error(make, device, dtype, Hq=4, Hkv=2, D=64, lengths=(16, 70, 1, 41)):
    """Of the output and, where there is a backward, the gradients of ``Σ out · dout``."""
    generator = torch.Generator(device).manual_seed(0)
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    T = sum(lengths)
    qkv = [torch.randn(T, H, D, generator=generator, device=device).to(dtype) for H in (Hq, Hkv, Hkv)]
    dout = torch.randn(T, Hq, D, generator=generator, device=device).to(dtype)
    attention = make(bounds, max(lengths))

    def plain(q, k, v):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = plain_attention(*leaves, bounds)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]

    leaves = attention.pack(*(t.requires_grad_() for t in qkv))
    out = attention.attend(*leaves)
    results = [attention.unpack(out).detach()]
    if attention.backward:
        padded_dout = attention.pack(dout, dout, dout)[0]
        gradients = map(attention.unpack, torch.autograd.grad(out, leaves, padded_dout))
        results += [_of_heads(g, t.shape[1]) for g, t in zip(gradients, qkv, strict=True)]
    n = len(results)
    return _worst(results, plain(*(t.double() for t in qkv))[:n], plain(*qkv)[:n])


def checked(error_of, adapter, *arguments):
    """``{"error": …}``, or ``{"absent": why}``, or ``{"raised": what}``: nobody is timed who has not been compared."""
    try:
        return {"error": error_of(adapter, *arguments)}
    except (Absent, _backend.Unavailable) as error:
        return {"absent": str(error)}
    except Exception as error:
        return {"raised": reason(error)}
