"""What the tests of packed attention share: the oracle, the plain code beside it, and the budget between them."""

import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from sft_kernels import AttentionTiles, packed_attention
from sft_kernels._budget import check
from sft_kernels.ops.packed_attention import reference
from sft_kernels.verify import plain_packed_attention

from .helpers import run

SMALL_TILES = 32
DEFAULTS = {"causal": True, "scale": None, "window_size": (-1, -1), "softcap": None}
NAMES = ("out", "lse", "dquery", "dkey", "dvalue")


@pytest.fixture(params=["torch", "triton"])
def impl(request, monkeypatch):
    """What ``impl="auto"`` means in a test. Triton is interpreted, over tiles that short segments fill."""
    monkeypatch.setenv("SFT_KERNELS_IMPL", request.param)
    if request.param == "triton":
        from sft_kernels.ops.packed_attention import triton_impl

        if torch.cuda.is_available():
            pytest.skip("Triton is interpreted only where there is no GPU")
        small = SimpleNamespace(from_cu_seqlens=partial(AttentionTiles.from_cu_seqlens, block=SMALL_TILES))
        monkeypatch.setattr(triton_impl, "AttentionTiles", small)
    return request.param


torch_only = pytest.mark.parametrize("impl", ["torch"], indirect=True)


def skip_what_triton_leaves_to_torch(dtype):
    if dtype == torch.float64 and os.environ.get("SFT_KERNELS_IMPL") == "triton":
        pytest.skip("float64 is torch's own code")


def differentiate(function, given, upstream):
    """Of a ``function`` that returns ``(out, lse)``: out, lse and the three gradients."""
    lse = []

    def out_alone(*tensors):
        out, second = function(*tensors)
        lse.append(second)
        return out

    out, *gradients = run(out_alone, given, upstream)
    return [out, lse[0], *gradients]


def oracle(given, cu_seqlens, upstream, **options):
    """The same five from the NumPy oracle, as float64 tensors."""
    *arrays, dout = (t.detach().double().cpu().numpy() for t in (*given, upstream))
    return [*map(torch.from_numpy, reference.packed_attention(*arrays, cu_seqlens, dout, **options))]


def check_case(given, cu_seqlens, max_seqlen=None, *, impl="auto", tiles=None, **options):
    """Hold output, lse and gradients to the budget against the oracle, and what they are to what is promised."""
    query, bounds = given[0], cu_seqlens.tolist()
    upstream = torch.randn(query.shape).to(query.device, query.dtype)
    results = differentiate(
        lambda *t: packed_attention(*t, cu_seqlens, max_seqlen, return_lse=True, impl=impl, tiles=tiles, **options),
        given,
        upstream,
    )
    options = {**DEFAULTS, **options}
    eager = differentiate(lambda *t: plain_packed_attention(*t, bounds, **options), given, upstream)
    # Statistics are promised in fp32 whatever the inputs' dtype.
    wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in given]
    eager[1] = plain_packed_attention(*wide, bounds, **options)[1]
    for name, x, ref, e in zip(NAMES, results, oracle(given, bounds, upstream, **options), eager, strict=True):
        check(name, x, ref, e)
    out, lse, *gradients = results
    assert [t.dtype for t in (out, *gradients)] == [query.dtype] * 4
    assert lse.dtype == (torch.float64 if query.dtype == torch.float64 else torch.float32)
    assert not lse.requires_grad
    assert (lse[:, bounds[-1] :] == -torch.inf).all()
    assert all((t[bounds[-1] :] == 0).all() for t in (out, *gradients))
    return results
