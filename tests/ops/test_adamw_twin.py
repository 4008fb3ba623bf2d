"""The bits of the kernels are the NumPy twin's, over whole tiles, tails and chunks, for every combination of dtypes.

And how 16 bits keep more than 16 bits.
"""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from sft_kernels import AdamW
from sft_kernels.ops.adamw import rounding
from sft_kernels.ops.adamw.tables import CHUNK
from sft_kernels.ops.adamw.triton_impl import _BLOCK

from . import adamw_twin as twin
from .adamw import HALF, IMPLS, KERNELS, train
from .helpers import same_bits

# A tile and its neighbours, the tail of a second chunk, a few elements, one, none.
SIZES = [_BLOCK - 1, _BLOCK, CHUNK + _BLOCK + 5, 7, 1, 0]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
COMBINATIONS = [
    (dtype, {"state_dtype": state, **more})
    for dtype in (FP32, BF16, FP16)
    for state in (FP32, BF16, FP16)
    for more in (
        {},
        *([{"master_weights": "float32"}] if dtype != FP32 and state == FP32 else []),
        *([{"master_weights": "split"}, {"stochastic_rounding": True}] if dtype == BF16 and state != FP16 else []),
    )
]


def hyper_of(group):
    names = ("lr", "eps", "weight_decay")
    return {"beta1": group["betas"][0], "beta2": group["betas"][1]} | {name: group[name] for name in names}


def widened(t):
    return t.detach().float().flatten().numpy().copy()


def expected(optimizer, p, index, grad, c):
    """What the twin makes of ``p`` and its state as they stand: ``{name: tensor}``."""
    group = optimizer.param_groups[0]
    state = optimizer.state.get(p, {})
    m, v, v_max = (
        widened(state[name]) if name in state else np.zeros(p.numel(), np.float32)
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    )
    split = optimizer.master_weights == "split" and p.dtype == BF16
    theta = widened(state.get("master", p))
    if split:
        remainder = state["remainder"].view(torch.int16).numpy() if state else np.zeros(p.numel(), np.int16)
        theta = twin.decode(bits_of(p), remainder)
    step = float(state.get("step", 0))
    v_max = v_max if group["amsgrad"] else None
    new, m, v, v_max = twin.update(theta, widened(grad), m, v, v_max, step=step, c=c, **hyper_of(group))
    out = {"exp_avg": m, "exp_avg_sq": v, "max_exp_avg_sq": v_max, "step": np.float32(step + 1)}
    out = {name: x for name, x in out.items() if x is not None}
    if split:
        weight, out["remainder"] = twin.encode(new)
    elif optimizer.stochastic_rounding and p.dtype == BF16:
        noise = twin.random_bits(np.arange(p.numel()), seed=group["seed"], t=int(step) + 1, index=index)
        weight = twin.round_stochastically(new, noise)
    else:
        if optimizer.master_weights and p.dtype in HALF:
            out["master"] = new
        weight = new
    bits = weight.dtype == np.uint16
    out["p"] = torch.from_numpy(weight.view(np.int16)).view(BF16) if bits else torch.from_numpy(weight)
    return {name: torch.as_tensor(x) for name, x in out.items()}


def bits_of(p):
    return p.detach().view(torch.int16).numpy().view(np.uint16)


def check_bits(optimizer, params, grads, *, c=np.float32(1), **options):  # noqa: B008
    ref = [expected(optimizer, p, i, g, c) for i, (p, g) in enumerate(zip(params, grads, strict=True))]
    train(optimizer, params, [grads], **options)
    for p, each in zip(params, ref, strict=True):
        found = {"p": p.detach(), **optimizer.state[p]}
        if "remainder" in found:
            found["remainder"] = found["remainder"].view(torch.int16)
        assert {*found} == {*each}
        # The mixed path's root is torch's, which on a CPU is not always rounded to nearest.
        names = each if optimizer._impl in KERNELS else {*each} - {"p", "master", "remainder"}
        for name in names:
            x = each[name].flatten().to(found[name].dtype)
            assert same_bits(found[name].flatten(), x), (name, p.numel())


@IMPLS
@pytest.mark.parametrize(("dtype", "options"), COMBINATIONS, ids=str)
def test_every_bit_is_the_twins(dtype, options, impl):
    """Without a clip, so that the order in which a norm is summed decides nothing."""
    params = [nn.Parameter(torch.randn(n).to(dtype)) for n in SIZES]
    optimizer = AdamW(params, lr=1e-2, betas=(0.8, 0.95), weight_decay=0.3, max_grad_norm=1e9, impl=impl, **options)
    if impl == "torch" and not optimizer._mixed:
        pytest.skip("torch's own kernel")
    for _ in range(2):
        check_bits(optimizer, params, [torch.randn(n).to(dtype) for n in SIZES])


@IMPLS
@pytest.mark.parametrize("more", [{"amsgrad": True}, {"maximize": True}], ids=str)
def test_options_keep_the_bits(more, impl):
    params = [nn.Parameter(torch.randn(n)) for n in (_BLOCK + 3, 5)]
    optimizer = AdamW(params, lr=1e-2, state_dtype=BF16, impl=impl, **more)
    c = twin.gradient_factor(maximize=more.get("maximize", False))
    for scale in (1.0, 0.1, 3.0):
        check_bits(optimizer, params, [scale * torch.randn(p.shape) for p in params], c=c)


SHORT = pytest.mark.parametrize("betas", [(0.0, 0.0), (0.0, 0.95), (1e-9, 1e-9), (0.3, 0.0), (0.5, 0.5)], ids=str)


@IMPLS
@SHORT
@pytest.mark.parametrize("on_device", [False, True])
def test_short_memories_keep_the_bits(betas, on_device, impl):
    params = [nn.Parameter(torch.randn(n)) for n in (_BLOCK + 3, 5)]
    if on_device:
        betas = tuple(torch.tensor(beta, dtype=torch.float64) for beta in betas)
    optimizer = AdamW(params, lr=1e-2, betas=betas, update_stats=True, impl=impl)
    for size in (1e4, 1e-4, 1.0):
        check_bits(optimizer, params, [size * torch.randn(p.shape) for p in params])


@IMPLS
@SHORT
@pytest.mark.parametrize("scale", [None, 3.0])
def test_a_moment_forgets_what_its_beta_does_not_keep(betas, scale, impl):
    """Whatever lay in it: with β = 0 it is the gradient, or its square, to the bit."""
    inf, nan = float("inf"), float("nan")
    old = torch.tensor([1e4, -1e38, inf, -inf, nan, 1e-45, 0.0])
    grads = torch.tensor([1e-4, -1e-4, 1e38, -0.0, 1e-45, 0.1])
    old, grads = torch.cartesian_prod(old, grads).T.contiguous()
    p = nn.Parameter(torch.ones_like(grads))
    optimizer = AdamW([p], betas=betas, update_stats=True, impl=impl)
    optimizer.state[p] = {"step": torch.tensor(1.0), "exp_avg": old.clone(), "exp_avg_sq": old.abs()}
    if scale is not None:
        optimizer.grad_scale = torch.tensor(scale)
    train(optimizer, [p], [[grads]])
    g = grads * torch.from_numpy(np.asarray(twin.gradient_factor(grad_scale=scale or 1.0)))
    state = optimizer.state[p]
    for name, beta, new in (("exp_avg", betas[0], g), ("exp_avg_sq", betas[1], g * g)):
        if beta == 0:
            assert same_bits(state[name], new)
        elif beta == 1e-9:
            kept = old.double() if name == "exp_avg" else old.double().abs()
            finite = old.isfinite() & new.isfinite()
            ref = beta * kept + (1 - beta) * new.double()
            error = (state[name].double() - ref).abs()
            assert (error <= 2**-22 * ref.abs().maximum(beta * kept.abs()) + 1e-44)[finite].all()


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("t", [1, 2, 1000, 2**20 + 1])
def test_a_late_step_keeps_its_bits(t, impl):
    """βᵗ by squaring, in fp64."""
    params = [nn.Parameter(torch.randn(33))]
    optimizer = AdamW(params, betas=(0.9, 0.9999), impl=impl)
    optimizer.state[params[0]] = {
        "step": torch.tensor(float(t - 1)), "exp_avg": torch.randn(33), "exp_avg_sq": torch.rand(33)
    }  # fmt: skip
    check_bits(optimizer, params, [torch.randn(33)])


@pytest.mark.parametrize("impl", KERNELS)
def test_whoever_changes_a_count_or_a_beta_between_steps_gets_the_right_corrections(impl):
    """Triton's step finds those of the next step ready, if nothing was changed."""
    params = [nn.Parameter(torch.randn(n)) for n in (CHUNK + 3, 5)]
    optimizer = AdamW(params, lr=1e-2, betas=(0.8, 0.95), impl=impl)

    def two_steps():
        for _ in range(2):
            check_bits(optimizer, params, [torch.randn(p.shape) for p in params])

    two_steps()
    for betas in ((0.8, 0.99), (0.7, 0.99), (0.8, 0.95)):
        optimizer.param_groups[0]["betas"] = betas
        two_steps()
    for step in (1000.0, 3.0):
        optimizer.state[params[0]]["step"].fill_(step)
        two_steps()


def test_corrections_are_worked_out_once_for_all_programs_of_the_next_step():
    params = [nn.Parameter(torch.randn(n)) for n in (CHUNK + 3, 5)]
    optimizer = AdamW(params, betas=(0.8, 0.95), impl="triton")
    for t in (2, 3):
        check_bits(optimizer, params, [torch.randn(p.shape) for p in params])
        kept = optimizer._tables.corrections
        values = [0.8, 0.95, 1 - twin.power(0.8, t), 1 / np.sqrt(1 - twin.power(0.95, t))]
        assert kept[:, 0].tolist() == [t] * 2
        assert kept[:, 1:].contiguous().view(torch.float64).tolist() == [values] * 2
    before = optimizer.state[params[0]]["exp_avg"].clone(), params[0].detach().clone()
    kept[0, 3] = torch.tensor(0.25, dtype=torch.float64).view(torch.int64)  # so that a = 4 lr, if they are taken
    kept[0, 4] = torch.tensor(1e-30, dtype=torch.float64).view(torch.int64)  # and ε alone is the divisor
    train(optimizer, params, [[torch.zeros(p.shape) for p in params]])
    m = before[0] * 0.8
    expected = before[1] - (4e-3 * m / 1e-8 + 1e-4 * before[1])
    assert torch.allclose(params[0].detach(), expected, rtol=1e-4)


@pytest.mark.parametrize("impl", KERNELS)
def test_what_is_clipped_is_multiplied_once(impl):
    """A norm that any order of summation finds: 3 and 4 make 5, and 1e-6 is lost beside it in nothing."""
    params = [nn.Parameter(torch.randn(n)) for n in (_BLOCK + 3, 5)]
    grads = [torch.zeros(p.shape) for p in params]
    grads[0][-1], grads[1][2] = 3.0, 4.0
    optimizer = AdamW(params, max_grad_norm=0.3, weight_decay=0.0, impl=impl)
    check_bits(optimizer, params, grads, c=twin.gradient_factor(5.0, max_grad_norm=0.3))
    assert optimizer.last_grad_norm == 5.0


# ---- split masters


def every_kind_of_number():
    edges = [0, 0x7FFF, 0x8000, 0x8001, 0x18000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FFFFFFF]
    bits = torch.tensor([*edges, *(e - 2**31 for e in edges)], dtype=torch.int64)
    return torch.cat([bits, torch.randint(-(2**31), 2**31, (20000,))]).int().view(FP32)


def test_a_split_master_loses_nothing():
    x = every_kind_of_number()
    weight, remainder = rounding.encode(x)
    again = rounding.decode(weight, remainder)
    assert same_bits(again.view(torch.int32)[~x.isnan()], x.view(torch.int32)[~x.isnan()])
    assert again[x.isnan()].isnan().all()
    upper, lower = twin.encode(x.numpy())
    assert same_bits(weight.view(torch.int16), torch.from_numpy(upper.view(np.int16)))
    assert same_bits(remainder.view(torch.int16), torch.from_numpy(lower))
    assert np.array_equal(twin.decode(upper, lower), x.numpy(), equal_nan=True)
    error, nearest = (weight.float() - x).abs(), (x.bfloat16().float() - x).abs()
    finite = weight.isfinite() & x.isfinite()
    assert same_bits(error[finite], nearest[finite])


@pytest.mark.parametrize("impl", KERNELS)
def test_the_kernel_encodes_every_kind_of_number(impl):
    """A step with lr 0 writes the master it has read."""
    x = every_kind_of_number()
    weight, remainder = rounding.encode(x)
    p = nn.Parameter(weight.clone())
    optimizer = AdamW([p], lr=0.0, master_weights="split", impl=impl)
    optimizer.state[p] = {"step": torch.tensor(0.0), "remainder": remainder.clone()}
    train(optimizer, [p], [[torch.zeros_like(weight)]])
    kept = x.isfinite()  # 0 · ∞ is NaN
    assert same_bits(p.detach()[kept], weight[kept])
    found, given = (t.view(torch.int16) for t in (optimizer.state[p]["remainder"], remainder))
    assert same_bits(found[kept], given[kept])
    assert p[~kept].isnan().all()
    assert not found[~kept].any()


@IMPLS
def test_a_split_master_is_the_fp32_one(impl):
    start = torch.randn(_BLOCK + 17).bfloat16()
    params = [nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [
        AdamW([p], lr=1e-5, master_weights=kind, state_dtype=FP32, impl=impl)
        for p, kind in zip(params, ("split", "float32"), strict=True)
    ]
    for grad in torch.randn(5, *start.shape).bfloat16():
        for p, optimizer in zip(params, optimizers, strict=True):
            train(optimizer, [p], [[grad]])
    master = rounding.decode(params[0].detach(), optimizers[0].state[params[0]]["remainder"])
    assert same_bits(master, optimizers[1].state[params[1]]["master"])
    assert not same_bits(master, start.float())
    assert params[0].dtype == torch.bfloat16


# ---- stochastic rounding


def test_random_bits_are_the_twins():
    i = torch.cat([torch.arange(5), torch.randint(0, 2**40, (1000,))])
    for seed, t, index in ((0, 1, 0), (2**32 - 1, 2**24, 12345)):
        found = rounding.random_bits(i, seed=seed, t=torch.tensor(float(t)), index=index)
        assert np.array_equal(found.numpy(), twin.random_bits(i.numpy(), seed=seed, t=t, index=index).astype(np.int64))


def test_random_bits_are_uniform_and_unlike_from_step_to_step():
    n = 1 << 16
    draws = [
        twin.random_bits(np.arange(n), seed=seed, t=t, index=index).astype(float) / 2**32
        for seed, t, index in ((0, 1, 0), (0, 2, 0), (0, 1, 1), (1, 1, 0))
    ]
    for x in draws:
        counts = np.histogram(x, 64, (0, 1))[0]
        assert ((counts - n / 64) ** 2 / (n / 64)).sum() < 120  # χ² of 63 degrees: one in 2e4 is beyond
    correlated = np.corrcoef([*draws, np.roll(draws[0], 1)])
    assert np.abs(correlated - np.eye(len(correlated))).max() < 5 / n**0.5


@IMPLS
def test_what_is_rounded_stochastically_is_right_on_average(impl):
    """Steps of 1e-4 from 1, where the spacing is 4e-3: nearest never moves, and the walk ends where fp32 does."""
    n, steps = 4 * _BLOCK, 20
    p = nn.Parameter(torch.ones(n, dtype=BF16))
    optimizer = AdamW([p], lr=1e-4, weight_decay=0.0, state_dtype=FP32, stochastic_rounding=True, impl=impl)
    train(optimizer, [p], [[torch.ones(n)]] * steps)
    moved = 1 - p.detach().double().mean()
    # Each element is a sum of 20 draws of 2⁻⁸ with a chance of 0.0256 (2⁻⁹ below 1).
    deviation = 2**-8 * (steps * 0.0256 / n) ** 0.5
    assert abs(moved - steps * 1e-4) < 5 * deviation
    assert p.unique().numel() > 2


@IMPLS
def test_overflow_and_nan_are_not_rounded_at_random(impl):
    p = nn.Parameter(torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0]).bfloat16())
    optimizer = AdamW([p], lr=0.0, weight_decay=0.0, stochastic_rounding=True, impl=impl)
    train(optimizer, [p], [[torch.zeros(4)]])
    assert p[:3].isnan().all()  # 0 · ∞, as in torch's fused kernel
    assert p[3] == 1


def without_seed(state_dict):
    groups = [{name: x for name, x in group.items() if name != "seed"} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


@IMPLS
def test_the_seed_is_the_groups_and_travels_with_the_state(impl):
    def trained(seed, state_dict=None):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(200).bfloat16())
        group = {"params": [p]} | ({} if seed is None else {"seed": seed})
        optimizer = AdamW([group], lr=1e-3, stochastic_rounding=True, impl=impl)
        if state_dict is not None:
            optimizer.load_state_dict(copy.deepcopy(state_dict))
        train(optimizer, [p], [[g] for g in torch.randn(3, 200).bfloat16()])
        return p.detach(), optimizer

    (plain, optimizer), (zero, _), (other, with_seed) = trained(None), trained(0), trained(9)
    assert optimizer.param_groups[0]["seed"] == 0
    assert same_bits(plain, zero)
    assert not same_bits(plain, other)
    loaded, optimizer = trained(None, with_seed.state_dict())
    assert optimizer.param_groups[0]["seed"] == 9
    assert same_bits(loaded, trained(9, with_seed.state_dict())[0])
    assert not same_bits(loaded, trained(8, without_seed(with_seed.state_dict()))[0])
    assert trained(4, without_seed(with_seed.state_dict()))[1].param_groups[0]["seed"] == 4
    assert optimizer.stochastic_rounding


def test_two_parameters_and_two_implementations_are_rounded_alike_only_where_they_should():
    start, grad = torch.randn(300).bfloat16(), torch.randn(300).bfloat16()
    ends = {}
    for impl in ("torch", *KERNELS):
        params = [nn.Parameter(start.clone()) for _ in range(2)]
        train(AdamW(params, lr=1e-3, stochastic_rounding=True, impl=impl), params, [[grad, grad]])
        ends[impl] = [p.detach() for p in params]
    assert all(same_bits(ends["torch"], ends[impl]) for impl in KERNELS)
    assert not same_bits(ends["torch"][0], ends["torch"][1])
