"""Moments of another dtype than the parameter's, and fp32 masters."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from sft_kernels import AdamW
from sft_kernels._budget import check
from sft_kernels.ops.adamw import reference
from sft_kernels.ops.adamw.torch_impl import adamw

from .adamw import (
    BAD,
    HALF,
    HYPER,
    IMPLS,
    KERNELS,
    MIXED,
    MOMENTS,
    check_state,
    check_step,
    clipped,
    flat,
    gradients,
    in_two_groups,
    only_what_triton_carries,
    oracle,
    parameters,
    precise,
    snapshot,
    train,
    twins,
)
from .helpers import same_bits

DTYPES_AND_OPTIONS = pytest.mark.parametrize(("dtype", "options"), MIXED, ids=str)


# ---- the formula


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("t", [1, 2, 1000, 10**6])
def test_the_formula(dtype, amsgrad, t):
    p, g, m, v, v_max = (torch.randn(301, dtype=torch.float64).to(dtype) for _ in range(5))
    v, v_max = v**2, v_max**2
    hyper = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}

    def plain():
        leaf = nn.Parameter(p.clone())
        leaf.grad = g.clone()
        options = {**hyper, "betas": (hyper["beta1"], hyper["beta2"]), "amsgrad": amsgrad, "foreach": False}
        optimizer = torch.optim.AdamW([leaf], **{k: x for k, x in options.items() if k not in ("beta1", "beta2")})
        moments = dict(zip(MOMENTS, (m.clone(), v.clone(), v_max.clone()), strict=True))
        optimizer.state[leaf] = {"step": torch.tensor(float(t - 1)), **moments}
        optimizer.step()
        return leaf, *moments.values()

    *found, update = adamw(p, g, m, v, v_max if amsgrad else None, step=torch.tensor(t, dtype=torch.float64), **hyper)
    before = {"t": t - 1, **{symbol: x.double().numpy() for symbol, x in zip(("m", "v", "v_max"), (m, v, v_max))}}  # noqa: B905
    ref, after = reference.adamw(p.double().numpy(), g.double().numpy(), before, amsgrad=amsgrad, **hyper)
    expected = (ref, after["m"], after["v"], *([after["v_max"]] if amsgrad else []))
    for name, x, r, e in zip(("p", *MOMENTS), found, expected, plain(), strict=False):
        check(name, x, torch.as_tensor(r), e)
        assert x.dtype == dtype
    assert same_bits(p - update, found[0])


@pytest.mark.parametrize("betas", [(0.9, 0.9999), (torch.tensor(0.9).double(), torch.tensor(0.9999).double())], ids=str)
@pytest.mark.parametrize("steps", [1, 3])
def test_bias_corrections_keep_their_digits(betas, steps):
    """1 − β2ᵗ in fp32 is off by 3e-4 here. From zero, without decay, nothing hides that in the parameter."""
    p = nn.Parameter(torch.zeros(7))
    optimizer = AdamW([p], lr=1.0, betas=betas, weight_decay=0.0, eps=1e-8, state_dtype=torch.float64)
    grads = [[torch.randn(7)] for _ in range(steps)]
    train(optimizer, [p], grads)
    (ref,), _ = oracle([torch.zeros(7)], grads, optimizer.param_groups)
    check("parameter", p, ref, ref)

    master = nn.Parameter(torch.zeros(7, dtype=torch.bfloat16))
    optimizer = AdamW(
        [master], lr=1.0, betas=betas, weight_decay=0.0, state_dtype=torch.float32, master_weights="float32"
    )
    grads = [[g.bfloat16()] for (g,) in grads]
    train(optimizer, [master], grads)
    (ref,), _ = oracle([torch.zeros(7)], grads, optimizer.param_groups)
    check("master", optimizer.state[master]["master"], ref, ref)


# ---- steps


@IMPLS
@DTYPES_AND_OPTIONS
@pytest.mark.parametrize("extra", [{}, {"amsgrad": True}, {"maximize": True}, {"lr": torch.tensor(1e-2)}], ids=str)
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_every_step_is_the_oracles_from_where_it_began(dtype, options, extra, max_grad_norm, impl):
    only_what_triton_carries(impl, dtype, options.get("state_dtype"))
    params = parameters(dtype)
    optimizer = AdamW(in_two_groups(params), **{**HYPER, **extra}, **options, max_grad_norm=max_grad_norm, impl=impl)
    for grads in gradients(4, dtype):
        check_step(optimizer, grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
def test_skipping_under_capture_outside_the_fused_kernel_is_the_oracles_too(dtype):
    params = parameters(dtype)
    options = {"capturable": True, "skip_nonfinite": True, "fused": False, "max_grad_norm": 1.0}
    optimizer = AdamW(in_two_groups(params), **HYPER, **options)
    for grads in gradients(4, dtype):
        check_step(optimizer, grads)
    assert optimizer._mixed
    assert all(state["exp_avg"].dtype == dtype for state in optimizer.state.values())


def test_a_0d_parameter_has_the_bits_of_its_only_element():
    """The scalars of the formula are fp64 and 0-d: beside a 0-d parameter they would decide the dtype."""
    values = torch.randn(50)
    params = [nn.Parameter(x) for x in values.clone()]
    together = nn.Parameter(values.clone())
    options = {**HYPER, "lr": torch.tensor(1e-2).double(), "state_dtype": torch.bfloat16}
    for grads in torch.randn(3, 50):
        train(AdamW(params, **options), params, [[*grads]])
        train(AdamW([together], **options), [together], [[grads]])
    assert same_bits(torch.stack([p.detach() for p in params]), together.detach())


@IMPLS
@DTYPES_AND_OPTIONS
def test_the_state_has_the_dtypes_asked_for(dtype, options, impl):
    only_what_triton_carries(impl, dtype, options.get("state_dtype"))
    params = parameters(dtype)
    optimizer = AdamW(params, **options, amsgrad=True, impl=impl)
    train(optimizer, params, gradients(2, dtype))
    for p in params:
        state = optimizer.state[p]
        assert p.dtype == dtype
        assert {state[name].dtype for name in MOMENTS} == {options.get("state_dtype", dtype)}
        assert all(state[name].shape == p.shape for name in MOMENTS)
        assert ("master" in state) == (options.get("master_weights") == "float32")
        assert ("remainder" in state) == (options.get("master_weights") == "split")
        if "master" in state:
            assert state["master"].dtype == torch.float32
            assert same_bits(p.detach(), state["master"].to(dtype))
        if "remainder" in state:
            assert state["remainder"].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_where_the_options_change_nothing_the_bits_are_the_fused_kernels(dtype):
    params, steps = parameters(dtype), gradients(3, dtype)
    mine, other = twins(params), twins(params)
    optimizer = AdamW(mine, **HYPER, master_weights="float32", state_dtype=dtype)
    train(optimizer, mine, steps)
    train(torch.optim.AdamW(other, **HYPER, fused=True), other, steps)
    assert same_bits(mine, other)
    assert not any("master" in state for state in optimizer.state.values())


MASTERS = pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.bfloat16, "float32"), (torch.float16, "float32"), (torch.bfloat16, "split")], ids=str
)


@IMPLS
@MASTERS
def test_masters_follow_the_oracle_as_fp32_parameters_would(dtype, kind, impl):
    params, steps = parameters(dtype), gradients(20, dtype)
    mine, plain = twins(params), twins(params, torch.float32)
    options = {"master_weights": kind, "state_dtype": torch.float32, "max_grad_norm": 1.0, "impl": impl}
    optimizer, eager = AdamW(in_two_groups(mine), **HYPER, **options), torch.optim.AdamW(in_two_groups(plain), **HYPER)
    train(optimizer, mine, steps)
    train(eager, plain, steps, clipped(1.0))
    ref, states = oracle(params, steps, eager.param_groups, max_grad_norm=1.0)
    check("masters", flat(precise(optimizer, p) for p in mine), flat(ref), flat(plain))
    check_state(optimizer, states, eager)


@IMPLS
@MASTERS
@pytest.mark.parametrize(("gradient", "weight_decay"), [(1.0, 0.0), (0.0, 1.0)], ids=["update", "decay"])
def test_small_updates_are_lost_without_a_master_and_kept_with_one(dtype, kind, gradient, weight_decay, impl):
    """Each is 1e-4 of the parameter, a fortieth of bf16's spacing below 1; a hundred are 1 %."""
    ends = {}
    for name, options in {
        "plain": {},
        "moments": {"state_dtype": torch.float32},
        "master": {"master_weights": kind},
    }.items():
        p = nn.Parameter(torch.ones(3, dtype=dtype))
        optimizer = AdamW([p], lr=1e-4, weight_decay=weight_decay, **options, impl=impl)
        train(optimizer, [p], [[torch.full((3,), gradient)]] * 100)
        ends[name] = p.detach().float()
    assert (ends["plain"] == 1).all()
    assert (ends["moments"] == 1).all()
    assert ((ends["master"] - 0.99).abs() <= torch.finfo(dtype).eps / 2).all()


def test_parameters_of_several_dtypes_share_one_optimiser():
    params = [nn.Parameter(torch.ones(3).to(dtype)) for dtype in (torch.bfloat16, torch.float32, torch.float64)]
    optimizer = AdamW(params, lr=1e-4, weight_decay=0.0, master_weights="float32", max_grad_norm=1.0)
    train(optimizer, params, [[torch.full((3,), 2.0)] * 3] * 3)
    assert optimizer.last_grad_norm == 6
    assert ["master" in optimizer.state[p] for p in params] == [True, False, False]
    for p in params:
        # Equal gradients: the update is lr, whatever their size.
        ref, _ = reference.adamw(
            np.ones(3), np.full(3, 1 / 3), {}, lr=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0
        )
        for _ in range(2):
            ref = ref - 1e-4
        written = optimizer.state[p].get("master", p)
        check("parameter", written, torch.as_tensor(ref), torch.as_tensor(ref).float())


def test_complex_parameters_are_pairs_of_real_ones():
    """Skipping under capture, outside the fused kernel, takes the mixed path whatever the dtype."""
    start, steps = torch.randn(4, 3, dtype=torch.complex64), torch.randn(4, 4, 3, dtype=torch.complex64)
    p, other = nn.Parameter(start.clone()), nn.Parameter(torch.view_as_real(start).clone())
    mine = AdamW([p], **HYPER, capturable=True, skip_nonfinite=True, max_grad_norm=1.0)
    reference = AdamW([other], **HYPER, fused=False, capturable=True, skip_nonfinite=True, max_grad_norm=1.0)
    train(mine, [p], [[g] for g in steps])
    train(reference, [other], [[torch.view_as_real(g)] for g in steps])
    assert same_bits(torch.view_as_real(p.detach()), other.detach())
    assert mine.last_grad_norm == reference.last_grad_norm


# ---- clipping and skipping


@DTYPES_AND_OPTIONS
def test_the_gradients_are_left_clipped(dtype, options):
    params, (grads,) = parameters(dtype), gradients(1, dtype)
    optimizer = AdamW(params, max_grad_norm=1e-3, **options)
    train(optimizer, params, [grads])
    norm = torch.cat([g.double().flatten() for g in grads]).norm()
    check("last_grad_norm", optimizer.last_grad_norm, norm, norm)
    for p, g in zip(params, grads, strict=True):
        ref = g.double() * 1e-3 / (norm + 1e-6)
        check("gradient", p.grad, ref, ref.to(dtype))


@IMPLS
@DTYPES_AND_OPTIONS
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("bad_step", [0, 2])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_with_a_non_finite_gradient_never_happened(dtype, options, bad, bad_step, clip, impl):
    only_what_triton_carries(impl, dtype, options.get("state_dtype"))
    if impl in KERNELS and (bad == BAD[1] or clip is None):
        pytest.skip("what is bad is seen in the norm alone, whose tests vary it")
    params, steps = parameters(dtype), gradients(4, dtype)
    options = {**HYPER, **options, "max_grad_norm": clip, "impl": impl}
    skipping, never = twins(params), twins(params)
    optimizer = AdamW(skipping, skip_nonfinite=True, **options)
    train(optimizer, skipping, steps[:bad_step])
    before = snapshot(optimizer)
    poisoned = [grad.clone() for grad in steps[0]]
    poisoned[1][3] = bad
    train(optimizer, skipping, [poisoned])
    after = snapshot(optimizer)
    assert same_bits(after[0], before[0])
    if bad_step:
        assert same_bits(after[1], before[1])
    assert same_bits([p.grad for p in skipping], poisoned)
    assert optimizer.skipped_steps == 1
    train(optimizer, skipping, steps[bad_step:])
    other = AdamW(never, **options)
    train(other, never, steps)
    assert same_bits(snapshot(optimizer), snapshot(other))


@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.float64}, {"impl": "triton"}, {"impl": "cuda"}], ids=str)
def test_no_value_is_read_back_where_a_graph_may_be_captured(options, monkeypatch):
    """On a CPU a sync cannot be seen; reading a tensor's value can."""
    base = torch.randn(6, 8)
    # Not dense: not torch's fused kernel.
    params = [nn.Parameter(base if "impl" in options else base[:, ::2]), nn.Parameter(torch.randn(3))]
    optimizer = AdamW(params, capturable=True, skip_nonfinite=True, max_grad_norm=1.0, **options)

    def read(*_):
        raise AssertionError("a value was read")

    grads = [torch.randn_like(p.detach()) for p in params]
    for name in ("item", "__bool__", "__float__", "__int__", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, read)
    train(optimizer, params, [grads] * 2)
    monkeypatch.undo()
    assert optimizer.skipped_steps == 0
    assert optimizer.state[params[0]]["step"] == 2


# ---- groups that come later


@IMPLS
def test_a_group_that_needs_the_mixed_path_may_join(impl):
    torch.manual_seed(1)
    first, second = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3).bfloat16())
    optimizer = AdamW([first], **HYPER, master_weights="float32", impl=impl)
    train(optimizer, [first], [[torch.randn(3)]])
    optimizer.add_param_group({"params": [second]})
    train(optimizer, [first, second], [[torch.randn(3), torch.randn(3)]])
    assert (optimizer.state[first]["step"], optimizer.state[second]["step"]) == (2, 1)
    assert "master" in optimizer.state[second]


# ---- a model that changes between steps


def trained(make, change=None):
    """A convolution's weight after four steps, ``change`` of the model in the middle."""
    torch.manual_seed(0)
    model, x = torch.nn.Conv2d(3, 4, 2), torch.randn(2, 3, 5, 5)
    optimizer = make(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(4):
        if step == 2 and change is not None:
            change(model)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return model.weight.detach().clone()


@IMPLS
def test_a_model_laid_out_anew_between_steps_is_updated_rightly(impl):
    def change(model):
        model.to(memory_format=torch.channels_last)

    torch.testing.assert_close(trained(partial(AdamW, impl=impl), change), trained(torch.optim.AdamW))


@IMPLS
def test_moments_of_another_layout_than_the_parameter_are_loaded_into_its_own(impl):
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    start, grads = torch.randn(5, 3), torch.randn(4, 5, 3)
    results = []
    for make, layout in ((partial(AdamW, impl=impl), lambda t: t.mT.contiguous().mT), (torch.optim.AdamW, lambda t: t)):
        p = start.clone().requires_grad_()
        optimizer = make([p], **options)
        for step, g in enumerate(grads):
            if step == 2:
                saved = optimizer.state_dict()
                p = layout(p.detach().clone()).requires_grad_()
                optimizer = make([p], **options)
                optimizer.load_state_dict(saved)
            p.grad = g.clone()
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results)


@IMPLS
def test_options_hold_for_a_model_that_is_cast_after_the_optimiser_was_made(impl):
    model = torch.nn.Linear(3, 3)
    optimizer = AdamW(model.parameters(), lr=1e-6, master_weights="float32", state_dtype=torch.float32, impl=impl)
    model.bfloat16()
    model(torch.randn(2, 3).bfloat16()).sum().backward()
    optimizer.step()
    state = optimizer.state[model.weight]
    assert {name: state[name].dtype for name in ("exp_avg", "exp_avg_sq", "master")} == dict.fromkeys(
        ("exp_avg", "exp_avg_sq", "master"), torch.float32
    )


@IMPLS
def test_a_model_cast_between_steps_goes_on(impl):
    model = torch.nn.Linear(3, 3)
    optimizer = AdamW(model.parameters(), lr=1e-2, impl=impl)
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    model.bfloat16()
    optimizer.zero_grad()
    model(torch.randn(2, 3).bfloat16()).sum().backward()
    before = model.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.weight, before)
    assert optimizer.state[model.weight]["exp_avg"].dtype == torch.float32


@IMPLS
def test_an_infinite_bound_on_the_norm_clips_nothing_even_where_the_norm_overflows(impl):
    params = [torch.ones(3, requires_grad=True) for _ in range(2)]
    optimizer = AdamW(params, lr=0.1, max_grad_norm=float("inf"), impl=impl)
    params[0].grad, params[1].grad = torch.full((3,), 1e25), torch.ones(3)
    optimizer.step()
    assert optimizer.last_grad_norm == float("inf")
    assert all(p.isfinite().all() for p in params)
