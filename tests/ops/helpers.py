"""What the tests of several ops share: the plain code they are held against, and a watch on work and memory."""

import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sft_kernels import TokenStats, cross_entropy, linear_cross_entropy
from sft_kernels._budget import check
from sft_kernels.verify import loss_oracle, plain_cross_entropy, plain_linear_cross_entropy

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
N, D, V = 67, 24, 101  # primes, so that chunks are ragged


def labels(n=N, v=V, masked=0.6):
    """Class indices, ``masked`` of them -100, scattered; the first is kept."""
    y = torch.randint(0, v, (n,))
    y[torch.rand(n) < masked] = -100
    y[0] = 0
    return y


class Loss:
    """One of the losses in one implementation: what it differentiates, how it is called, and the plain code that means
    the same.

    ``ours`` and ``plain`` take the tensors of ``shapes`` and the target; the linear ones with or without a bias.
    """

    def __init__(self, name, impl, ours, plain, shapes):
        self.name = name if impl == "torch" else f"{impl}-{name}"
        self.impl, self.ours, self.plain, self.shapes = impl, partial(ours, impl=impl), plain, shapes

    def tensors(self, dtype=torch.float32, n=N, v=V):
        """Logits that spread over about ±6: neither uniform nor one-hot."""
        if dtype == torch.float64 and self.impl != "torch":
            pytest.skip("float64 is torch's own code")
        return tuple(t.to(dtype) for t in self.shapes(n, v))

    def check(self, tensors, y, upstream=1.0, of_stats=None, **options):
        """Hold value and gradients to the budget against the oracle; returns them.

        Given ``of_stats``, the upstream gradients of the tokens' values, also these, between value and gradients.
        """
        asked = {} if of_stats is None else {"return_stats": "tokens"}
        results, eager = (
            run(lambda *t: function(*t, y, **options, **asked), tensors, upstream, of_stats)  # noqa: B023
            for function in (self.ours, self.plain)
        )
        ref = loss_oracle(tensors, y, upstream=upstream, of_stats=of_stats, **options)
        names = ["value", *(TokenStats._fields if asked else ()), *(f"gradient {i + 1}" for i in range(len(tensors)))]
        for name, x, r, e in zip(names, results, ref, eager, strict=True):
            if name == "prediction":
                assert x.tolist() == r.tolist()
            else:
                check(name, x, r, e)
        return results


def _linear(name, bias=False, impl="torch", **fixed):
    def ours(hidden, head, *rest, **options):
        *b, target = rest
        return linear_cross_entropy(hidden, head, target, linear_bias=b[0] if b else None, **{**fixed, **options})

    def plain(hidden, head, *rest, **options):
        *b, target = rest
        return plain_linear_cross_entropy(hidden, head, b[0] if b else None, target, **options)

    def shapes(n, v):
        return torch.randn(n, D), torch.randn(v, D) * 2 / D**0.5, *([torch.randn(v)] if bias else [])

    return Loss(name, impl, ours, plain, shapes)


def _over_logits(impl="torch"):
    return Loss("cross_entropy", impl, cross_entropy, plain_cross_entropy, lambda n, v: (2 * torch.randn(n, v),))


CROSS_ENTROPY = _over_logits()
LINEAR = [
    _linear("linear-auto"),
    _linear("linear-tokens", chunking="tokens"),
    _linear("linear-tokens-chunked", bias=True, chunking="tokens", max_logits_bytes=5 * V * 8),
    _linear("linear-vocab", bias=True, chunking="vocab"),
    _linear("linear-vocab-chunked", bias=True, chunking="vocab", max_logits_bytes=7 * N * 8),
]
TRITON = [
    _over_logits("triton"),
    _linear("linear-auto", bias=True, impl="triton"),
    _linear("linear-tokens-chunked", bias=True, impl="triton", chunking="tokens", max_logits_bytes=9 * V * 8),
    _linear("linear-vocab-chunked", bias=True, impl="triton", chunking="vocab", max_logits_bytes=48 * N * 4),
]
CUDA = [
    _over_logits("cuda"),
    _linear("linear-tokens-chunked", bias=True, impl="cuda", chunking="tokens", max_logits_bytes=9 * V * 8),
    _linear("linear-vocab-chunked", bias=True, impl="cuda", chunking="vocab", max_logits_bytes=48 * N * 4),
]
LINEAR += TRITON[1:] + CUDA[1:]
LOSSES = [CROSS_ENTROPY, TRITON[0], CUDA[0], *LINEAR]


def run(function, tensors, upstream=1.0, of_stats=None):
    """``function`` of ``tensors`` and its gradients. The tensors must come out as they went in.

    Given ``of_stats``, ``function`` returns ``(loss, values)`` of each token, and gradients flow through both.
    """
    leaves = [t.detach().requires_grad_() for t in tensors]  # the caller's storage and strides
    before = [t.clone() for t in tensors]
    out, values = (function(*leaves), ()) if of_stats is None else function(*leaves)
    outputs = out, *values[:3]
    upstream = torch.as_tensor(upstream).expand_as(out), *(of_stats or ())
    grads = torch.autograd.grad(outputs, leaves, [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)])
    for i, (tensor, old, grad) in enumerate(zip(tensors, before, grads, strict=True)):
        assert torch.equal(tensor.nan_to_num(), old.nan_to_num()), f"input {i} was overwritten"
        assert grad.dtype == tensor.dtype
    return out.detach(), *(value.detach() for value in values), *grads


def check_against_plain(ours, plain, tensors, upstream=1.0):
    """Hold value and gradients to the budget: the oracle is ``plain`` in float64, eager is ``plain`` itself."""
    results = run(ours, tensors, upstream)
    reference = run(plain, [t.double() for t in tensors], upstream)
    if tensors[0].dtype == torch.float64:
        eager = as_in_float64(run(plain, [t.float() for t in tensors], upstream), reference)
    else:
        eager = run(plain, tensors, upstream)
    for i, (x, ref, e) in enumerate(zip(results, reference, eager, strict=True)):
        check(f"gradient {i}" if i else "value", x, ref, e)
    return results


def as_in_float64(single, reference):
    """The errors of fp64 code that is itself the reference: those of its fp32 run, in the ratio of the epsilons."""
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return [ref + (x - ref) * ratio for x, ref in zip(single, reference, strict=True)]


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
