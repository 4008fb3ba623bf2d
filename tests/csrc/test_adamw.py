"""The CUDA update and norm at what small steps do not show: every kind of number, tables of several launches, orders.

What small steps show is in ``tests/ops/test_adamw*.py``, which run over it too.
"""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from sft_kernels import AdamW
from sft_kernels.ops.adamw import cuda_impl, tables

from ..ops import adamw_twin as twin
from ..ops.helpers import same_bits
from .host import CSRC, _launches, library, needs_compiler, on_cpu

pytestmark = needs_compiler

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def _over_fibers():
    with on_cpu():
        yield


def numbers():
    """fp32 of every kind: zeros, denormals, the ends of the range, infinities, NaN, and between."""
    tiny, least, most = (torch.finfo(FP32).tiny, 1e-45, torch.finfo(FP32).max)
    edges = [0.0, least, 3 * least, tiny - least, tiny, 1e-20, 1e-8, 0.1, 1.0, 3.0, 1e8, 1e19, 2e19, most / 2, most]
    edges += [float("inf"), float("nan")]
    edges = torch.tensor(edges)
    return torch.cat([edges, -edges])


def stepped(theta, g, m, v, v_max=None, *, step=0, state_dtype=FP32, **options):
    """One step of the CUDA kernel from a state that is given; the parameter and its state."""
    p = nn.Parameter(theta.clone())
    optimizer = AdamW([p], amsgrad=v_max is not None, state_dtype=state_dtype, impl="cuda", **options)
    state = {"step": torch.tensor(float(step)), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    optimizer.state[p] = state if v_max is None else {**state, "max_exp_avg_sq": v_max.clone()}
    p.grad = g.clone()
    optimizer.step()
    return p.detach(), optimizer.state[p]


@pytest.mark.parametrize("step", [0, 3, 12345])
@pytest.mark.parametrize(
    ("amsgrad", "betas"), [(False, (0.9, 0.95)), (True, (0.9, 0.95)), (False, (0.0, 0.0)), (False, (0.3, 0.3))]
)
def test_every_kind_of_number_gives_the_bits_of_the_twin(amsgrad, betas, step):
    x = numbers()
    random = torch.randn(4, 1 << 14) * torch.exp2(torch.randint(-149, 128, (4, 1 << 14)).float())
    # Each kind in each place beside every other in one more, and at random.
    pairs = torch.cartesian_prod(x, x).T
    ones = torch.ones_like(pairs[0])
    places = [[*pairs, ones, ones], [ones, *pairs, ones], [ones, ones, *pairs], [pairs[0], ones, ones, pairs[1]]]
    theta, g, m, v = torch.cat([torch.stack(place) for place in places], 1), None, None, None
    theta, g, m, v = torch.cat([theta, random], 1)
    v_max = v.flip(0) if amsgrad else None
    hyper = {"lr": 3e-3, "eps": 1e-8, "weight_decay": 0.1}
    p, state = stepped(theta, g, m, v, v_max, step=step, betas=betas, **hyper)
    arrays = [None if t is None else t.numpy() for t in (theta, g, m, v, v_max)]
    expected = twin.update(*arrays, step=step, beta1=betas[0], beta2=betas[1], **hyper)
    found = (p, *(state.get(name) for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")))
    for name, x, y in zip(("theta", "m", "v", "v_max"), found, expected, strict=True):
        if y is not None:
            x, y = x.numpy().view(np.uint32), y.view(np.uint32)
            nan = np.isnan(x.view(np.float32)) & np.isnan(y.view(np.float32))
            assert ((x == y) | nan).all(), name


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_every_number_of_sixteen_bits_is_read_and_rounded_as_torch_does(dtype):
    every = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(dtype)
    p, state = stepped(every, torch.zeros_like(every), every, every.abs(), lr=0.0, betas=(0.0, 0.0), state_dtype=dtype)
    assert same_bits(p[every.isfinite()], every[every.isfinite()])
    assert not state["exp_avg"][every.isfinite()].any()
    # A master that stays as it is: the parameter is its rounding.
    near = every.float()[every.isfinite()]
    halves = [
        (torch.nextafter(near.to(dtype), torch.tensor(end, dtype=dtype)).float() + near) / 2 for end in (9e4, -9e4)
    ]
    master = torch.cat([*halves, *(torch.nextafter(h, torch.tensor(end)) for h in halves for end in (9e9, -9e9)), near])
    master = master[master.isfinite()]
    p = nn.Parameter(torch.zeros_like(master).to(dtype))
    optimizer = AdamW([p], lr=0.0, master_weights="float32", state_dtype=FP32, impl="cuda")
    zeros = torch.zeros_like(master)
    optimizer.state[p] = {"step": torch.zeros(()), "exp_avg": zeros, "exp_avg_sq": zeros.clone(), "master": master}
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert same_bits(p.detach(), master.to(dtype))


@pytest.mark.parametrize(
    ("offset", "maps"), [(0, []), (2**33 + 5, []), (7, [(10, 40)]), (2**32 - 9, [(6, 18), (30, 90)])]
)
def test_rounding_counts_elements_by_their_place_in_the_whole(offset, maps, monkeypatch):
    """As a shard of a larger tensor would: a place is (i ÷ L) · G + i mod L, for every map, and the offset."""
    monkeypatch.setattr(tables, "placement_in_whole", lambda p: (offset, maps))
    theta, g, m = (torch.randn(tables.CHUNK + 77).to(dtype) for dtype in (BF16, BF16, FP32))
    v, hyper = torch.rand(theta.shape), {"lr": 3e-3, "eps": 1e-8, "weight_decay": 0.1}
    p, _ = stepped(theta, g, m, v, step=4, betas=(0.9, 0.95), stochastic_rounding=True, **hyper)
    i = np.arange(theta.numel())
    for L, G in maps:
        i = i // L * G + i % L
    noise = twin.random_bits(i + offset, seed=0, t=5, index=0)
    arrays = [t.float().numpy() for t in (theta, g, m, v)]
    new, *_ = twin.update(*arrays, step=4, beta1=0.9, beta2=0.95, **hyper)
    expected = twin.round_stochastically(new, noise)
    assert (p.view(torch.int16).numpy().view(np.uint16) == expected).all()


def test_a_llama_of_1_b_parameters_takes_one_launch():
    assert library().adamw_max_rows() >= 291


def test_python_and_the_kernels_agree_on_what_they_share():
    header = (CSRC / "adamw.cuh").read_text()
    assert f"CHUNK = {tables.CHUNK};" in header
    assert f"NORM_BLOCKS = {cuda_impl.NORM_BLOCKS};" in header
    columns = header.split("enum Column {")[1].split("}")[0].replace(",", " ").split()
    assert [getattr(tables, name) for name in columns] == [*range(tables.COLUMNS), tables.COLUMNS]


def many(count, dtype=FP32, **options):
    random = torch.Generator().manual_seed(3)
    params = [nn.Parameter(torch.randn(1 + i % 5, generator=random).to(dtype)) for i in range(count)]
    optimizer = AdamW(params, **options)
    for p in params:
        p.grad = torch.randn(p.shape, generator=random).to(dtype)
    return params, optimizer


@pytest.mark.parametrize("count", [338, 339, 700])
def test_more_tensors_than_a_launch_takes(count):
    """Norm, statistics, steps and skips over several launches, as in one."""
    assert library().adamw_max_rows() == 338
    options = {"max_grad_norm": 0.5, "skip_nonfinite": True, "update_stats": True}
    ours, optimizer = many(count, impl="cuda", **options)
    plain, other = many(count, impl="torch", **{**options, "update_stats": False})
    start = torch.cat([p.detach() for p in ours])
    for each in (optimizer, other):
        each.step()
    assert optimizer.last_grad_norm == pytest.approx(float(other.last_grad_norm), rel=1e-6)
    for p, q in zip(ours, plain, strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-7)
        assert optimizer.state[p]["step"] == 1
    found, moved = optimizer.update_statistics(), torch.cat([p.detach() for p in ours]) - start
    assert float(found.update_to_weight) == pytest.approx(float(moved.norm() / start.norm()), rel=1e-3)
    assert float(found.rounded_away) == 0
    ours[-1].grad[0] = float("nan")
    before = [p.detach().clone() for p in ours]
    optimizer.step()
    assert same_bits(before, [p.detach() for p in ours])
    assert optimizer.skipped_steps == 1
    assert {float(optimizer.state[p]["step"]) for p in ours} == {1.0}


def test_norm_and_statistics_are_the_same_in_every_order():
    numel = tables.CHUNK * 2 + 5
    grads = [torch.randn(numel), torch.randn(7), torch.randn(0), torch.randn(tables.CHUNK)]
    norms = []
    for seed in range(6):
        params = [nn.Parameter(torch.ones(g.shape)) for g in grads]
        optimizer = AdamW(params, max_grad_norm=1.0, update_stats=True, impl="cuda")
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        for _ in range(seed):
            next(_launches)
        optimizer.step()
        steps, moved = [optimizer.state[p]["step"] for p in params], optimizer.update_statistics().update_to_weight
        norms.append((optimizer.last_grad_norm, [p.detach() for p in params], steps, moved))
    assert all(same_bits(each, norms[0]) for each in norms)
    moved = torch.cat(norms[0][1]).double() - 1
    assert float(norms[0][3]) == pytest.approx(float(moved.square().mean().sqrt()), rel=1e-4)
    exact = torch.cat(grads).double().square().sum().sqrt()
    assert float(norms[0][0]) == pytest.approx(float(exact), rel=1e-6)


def test_a_block_of_the_norm_takes_several_chunks():
    """1,024 blocks at most: 1,500 tensors are more."""
    params, optimizer = many(1500, impl="cuda", max_grad_norm=float("inf"))
    optimizer.step()
    exact = torch.cat([p.grad for p in params]).double().square().sum().sqrt()
    assert float(optimizer.last_grad_norm) == pytest.approx(float(exact), rel=1e-6)


@pytest.mark.parametrize("dtypes", [*itertools.product((FP32, BF16, FP16), repeat=2)], ids=str)
def test_a_combination_is_carried_or_named_before_anything_is_written(dtypes):
    dtype, state_dtype = dtypes
    params, optimizer = many(3, dtype=dtype, state_dtype=state_dtype, impl="cuda")
    carried = state_dtype in (FP32, BF16 if dtype == FP32 else dtype)
    before = [p.detach().clone() for p in params]
    if carried:
        optimizer.step()
        assert not same_bits(before, [p.detach() for p in params])
    else:
        with pytest.raises(RuntimeError, match=f"impl='cuda': .*{state_dtype} moments of {dtype} parameters"):
            optimizer.step()
        assert same_bits(before, [p.detach() for p in params])
