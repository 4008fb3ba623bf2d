"""Tensors at addresses that are no multiples of 16: the bits stay, and only what lies odd is moved narrowly."""

import collections

import pytest
import torch
from torch import nn
from triton.runtime import interpreter

from sft_kernels import AdamW
from sft_kernels.ops.adamw import triton_impl
from sft_kernels.ops.adamw.tables import CHUNK
from sft_kernels.ops.adamw.triton_impl import _BLOCK

from .adamw import KERNELS
from .helpers import same_bits
from .test_adamw_twin import COMBINATIONS, check_bits


@pytest.mark.parametrize("impl", KERNELS)
def test_addresses_that_are_no_multiples_of_sixteen_are_updated_too(impl):
    """Gradients that are views into a bucket, parameters into one buffer."""
    n = 2 * _BLOCK + 9
    for where in (1, 3):
        buffers = torch.randn(n + 8), torch.randn(n + 8)
        views = [buffer[where : where + n] for buffer in buffers]
        assert all(view.data_ptr() % 16 for view in views)
        before = [buffer.clone() for buffer in buffers]
        p, q = nn.Parameter(views[0]), nn.Parameter(views[0].clone())
        p.grad, q.grad = views[1], views[1].clone()
        for each in (p, q):
            AdamW([each], impl=impl, max_grad_norm=1.0).step()
        assert same_bits(p.detach(), q.detach())
        rest = torch.ones(n + 8, dtype=torch.bool)
        rest[where : where + n] = False
        assert same_bits([b[rest] for b in buffers], [b[rest] for b in before])


def into_a_bucket(params):
    """Move gradients into one buffer behind one odd element, as DDP with ``gradient_as_bucket_view=True`` may."""
    bucket = torch.cat([params[0].grad.new_zeros(1), *(p.grad for p in params)])
    for p, view in zip(params, bucket[1:].split([p.numel() for p in params]), strict=True):
        assert not view.numel() or view.data_ptr() % 16
        p.grad = view


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize(("dtype", "options"), COMBINATIONS, ids=str)
def test_odd_gradients_alone_keep_every_bit(dtype, options, impl):
    sizes = [_BLOCK, CHUNK + _BLOCK + 8, 8]  # whole vectors, so that every gradient starts one element late
    params = [nn.Parameter(torch.randn(n).to(dtype)) for n in sizes]
    optimizer = AdamW(params, lr=1e-2, betas=(0.8, 0.95), max_grad_norm=1e9, impl=impl, **options)
    norm = []
    for where in (into_a_bucket, lambda params: None):  # the second time as they are
        grads = [torch.randn(n).to(dtype) for n in sizes]
        check_bits(optimizer, params, grads, before_step=where)
        norm.append(float(torch.cat(grads).double().norm()))
        assert float(optimizer.last_grad_norm) == pytest.approx(norm[-1], rel=1e-5)


def at(t, offset):
    """``t``, moved ``offset`` elements behind an address that is a multiple of 16."""
    buffer = t.new_zeros(t.numel() + 16)
    first = -buffer.data_ptr() % 16 // t.element_size() + offset
    view = buffer[first : first + t.numel()]
    return view.copy_(t)


@pytest.mark.parametrize(
    ("odd", "wide", "narrow", "of_norm"),
    [("nothing", 2 * 4, 4, 2), ("grad", 2 * 3, 4 + 2, 0), ("param", 0, 4 + 2 * 4, 2), ("exp_avg", 0, 4 + 2 * 4, 2)],
)
def test_an_odd_gradient_alone_is_loaded_narrow(odd, wide, narrow, of_norm, monkeypatch):
    """Counts those of two whole tiles and a tail; ``wide`` and ``narrow``: pointers of a tile, of four arrays each."""
    counts, unmasked = collections.Counter(), []
    pointer, load = triton_impl._pointer, interpreter.InterpreterBuilder.create_load

    def declared(address, DTYPE, ALIGNED):
        counts[bool(ALIGNED)] += 1
        assert not ALIGNED or address.handle.data.item() % 16 == 0
        return pointer(address, DTYPE, ALIGNED)

    def loaded(self, ptr, *rest):
        if ptr.data.size == _BLOCK:
            unmasked.append(ptr)
        return load(self, ptr, *rest)

    n = 2 * _BLOCK + 9
    tensors = {name: at(torch.randn(n).bfloat16(), odd == name) for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
    p = nn.Parameter(tensors.pop("param"))
    p.grad = tensors.pop("grad")
    optimizer = AdamW([p], impl="triton")
    optimizer.state[p] = {"step": torch.zeros(()), **tensors, "exp_avg_sq": tensors["exp_avg_sq"].abs_()}
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_load", loaded)
    with monkeypatch.context() as patch:
        patch.setattr(triton_impl, "_pointer", declared)
        optimizer.step()
    assert (counts[True], counts[False]) == (wide, narrow + 2)  # two are of the step
    of_update = len(unmasked)
    assert of_update == (2 * 4 if wide else 0)
    optimizer.max_grad_norm = 1.0
    optimizer.step()
    assert len(unmasked) == 2 * of_update + of_norm
