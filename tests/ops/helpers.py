"""What the tests of several ops share: the plain code they are held against, and a watch on work and memory."""

import math

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sft_kernels import cross_entropy, linear_cross_entropy
from sft_kernels._budget import check

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
N, D, V = 67, 24, 101  # primes, so that chunks are ragged


def labels(n=N, v=V, masked=0.6):
    """Class indices, ``masked`` of them -100, scattered; the first is kept."""
    y = torch.randint(0, v, (n,))
    y[torch.rand(n) < masked] = -100
    y[0] = 0
    return y


def plain_cross_entropy(logits, target, *, reduction="mean", num_items=None, token_weight=None):
    """The PyTorch code that a user would write, in the dtype of its inputs."""
    if num_items is None and token_weight is None:
        return F.cross_entropy(logits, target.long(), reduction=reduction)
    losses = F.cross_entropy(logits, target.long(), reduction="none")
    if token_weight is not None:
        losses = losses * token_weight.to(losses.dtype)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / ((target != -100).sum() if num_items is None else num_items)


class Loss:
    """One of the losses: what it differentiates, how it is called, and the plain code that means the same."""

    def __init__(self, name, ours, plain, shapes):
        self.name, self.ours, self.plain, self.shapes = name, ours, plain, shapes

    def tensors(self, dtype=torch.float32, n=N, v=V):
        """Logits that spread over about ±6: neither uniform nor one-hot."""
        return tuple(t.to(dtype) for t in self.shapes(n, v))


def _linear(name, **fixed):
    def ours(hidden, weight, target, **options):
        return linear_cross_entropy(hidden, weight, target, **{**fixed, **options})

    def plain(hidden, weight, target, **options):
        return plain_cross_entropy(F.linear(hidden, weight), target, **options)

    return Loss(name, ours, plain, lambda n, v: (torch.randn(n, D), torch.randn(v, D) * 2 / D**0.5))


CROSS_ENTROPY = Loss("cross_entropy", cross_entropy, plain_cross_entropy, lambda n, v: (2 * torch.randn(n, v),))
LINEAR = [
    _linear("linear-auto"),
    _linear("linear-tokens", chunking="tokens"),
    _linear("linear-tokens-chunked", chunking="tokens", max_logits_bytes=5 * V * 8),
    _linear("linear-vocab", chunking="vocab"),
    _linear("linear-vocab-chunked", chunking="vocab", max_logits_bytes=7 * N * 8),
]
LOSSES = [CROSS_ENTROPY, *LINEAR]


def run(function, tensors, upstream=1.0):
    """``function`` of ``tensors`` and its gradients. The tensors must come out as they went in."""
    leaves = [t.detach().requires_grad_() for t in tensors]  # the caller's storage and strides
    before = [t.clone() for t in tensors]
    out = function(*leaves)
    grads = torch.autograd.grad(out, leaves, torch.as_tensor(upstream, dtype=out.dtype).expand_as(out))
    for i, (tensor, old, grad) in enumerate(zip(tensors, before, grads, strict=True)):
        assert torch.equal(tensor.nan_to_num(), old.nan_to_num()), f"input {i} was overwritten"
        assert grad.dtype == tensor.dtype
    return out.detach(), *grads


def check_against_plain(ours, plain, tensors, upstream=1.0):
    """Hold value and gradients to the budget: the oracle is ``plain`` in float64, eager is ``plain`` itself."""
    results = run(ours, tensors, upstream)
    reference = run(plain, [t.double() for t in tensors], upstream)
    if tensors[0].dtype == torch.float64:
        # Here the oracle is the plain code itself; its error is that of fp32, in the ratio of the epsilons.
        ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        single = run(plain, [t.float() for t in tensors], upstream)
        eager = [ref + (x - ref) * ratio for x, ref in zip(single, reference, strict=True)]
    else:
        eager = run(plain, tensors, upstream)
    for i, (x, ref, e) in enumerate(zip(results, reference, eager, strict=True)):
        check(f"gradient {i}" if i else "value", x, ref, e)
    return results


def same_bits(a, b):
    """Whether both are equal to the bit; NaN equals NaN, None equals None."""
    a, b = tree_leaves(a), tree_leaves(b)
    return len(a) == len(b) and all(map(_same, a, b))


def _same(x, y):
    if x is None or y is None:
        return x is y
    return x.shape == y.shape and bool(((x == y) | (x.isnan() & y.isnan())).all())


class Watch(TorchDispatchMode):
    """Counts the FLOPs of matrix products and the largest storage, in bytes, that an operation returns."""

    def __init__(self):
        super().__init__()
        self.flops = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        name = function.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self.flops += 2 * math.prod(args[0].shape) * args[1].shape[-1]
        elif name in ("addmm", "addmm_", "baddbmm"):
            self.flops += 2 * math.prod(args[1].shape) * args[2].shape[-1]
        return out
