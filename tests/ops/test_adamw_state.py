"""Copies and checkpoints of ``AdamW``, from and into torch's."""

import copy
import io
import pickle

import pytest
import torch

from sft_kernels import AdamW

from .adamw import (
    HALF,
    HYPER,
    KERNELS,
    MIXED,
    MOMENTS,
    gradients,
    in_two_groups,
    parameters,
    precise,
    snapshot,
    train,
    twins,
)
from .helpers import same_bits

PLAIN = [
    (dtype, options)
    for dtype in (torch.float32, torch.bfloat16)
    for options in ({}, {"foreach": True}, {"foreach": False})
]
OF_KERNELS = [
    (dtype, {**options, "impl": impl})
    for impl in KERNELS
    for dtype, options in ((torch.float32, {}), (torch.bfloat16, {}), *MIXED)
    if torch.float64 not in (dtype, options.get("state_dtype"))
]
CONFIGURATIONS = pytest.mark.parametrize(("dtype", "options"), [*PLAIN, *MIXED, *OF_KERNELS], ids=str)


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def trained(make, dtype, options, steps=2, **more):
    params = parameters(dtype)
    optimizer = make(in_two_groups(params), **HYPER, **options, **more)
    train(optimizer, params, gradients(steps, dtype))
    return params, optimizer


# ---- copies


def _pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


def test_an_optimizer_that_an_earlier_version_saved_whole_is_complete():
    _, optimizer = trained(AdamW, torch.float32, {})
    state = optimizer.__getstate__()
    del state["_asked_impl"]
    loaded = AdamW.__new__(AdamW)
    loaded.__setstate__(state)
    for duplicate in (loaded, copy.deepcopy(loaded), _pickled(loaded)):
        duplicate.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
        duplicate.step()


def _saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@CONFIGURATIONS
@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _saved], ids=["deepcopy", "pickle", "torch.save"])
def test_a_copy_goes_on_like_the_original(dtype, options, duplicate):
    params, steps = parameters(dtype), gradients(6, dtype)
    optimizer = AdamW(params, **HYPER, max_grad_norm=0.5, skip_nonfinite=True, **options)
    steps[1][0][0, 0] = float("nan")
    train(optimizer, params, steps[:3])
    twin = duplicate(optimizer)
    assert (twin.skipped_steps, twin.last_grad_norm) == (1, optimizer.last_grad_norm)
    steps[4][0][0, 0] = float("inf")
    train(twin, twin.param_groups[0]["params"], steps[3:])
    train(optimizer, params, steps[3:])
    assert same_bits(snapshot(twin), snapshot(optimizer))
    assert twin.skipped_steps == optimizer.skipped_steps == 2


# ---- checkpoints


@CONFIGURATIONS
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("carry", [copy.deepcopy, through_a_file])
def test_a_checkpoint_goes_on_with_the_same_bits(dtype, options, amsgrad, carry):
    params, optimizer = trained(AdamW, dtype, options, amsgrad=amsgrad)
    resumed = twins(params)
    other = AdamW(in_two_groups(resumed), lr=7.0, **options)
    other.load_state_dict(carry(optimizer.state_dict()))
    assert same_bits(snapshot(other), snapshot(optimizer))
    steps = gradients(3, dtype)
    train(optimizer, params, steps)
    train(other, resumed, steps)
    assert same_bits(snapshot(other), snapshot(optimizer))


@pytest.mark.parametrize("impl", ["torch", *KERNELS])
@pytest.mark.parametrize("options", [{"master_weights": "split"}, {"stochastic_rounding": True}, {}], ids=str)
@pytest.mark.parametrize("after", range(7))
def test_a_run_resumes_after_any_step(after, options, impl):
    """One of which is skipped."""
    options = {**options, "state_dtype": torch.float32, "max_grad_norm": 0.5, "skip_nonfinite": True, "impl": impl}
    params, steps = parameters(torch.bfloat16), gradients(7, torch.bfloat16)
    steps[3][0][0, 0] = float("nan")
    first, second = twins(params), twins(params)
    through = AdamW(in_two_groups(first), **HYPER, **options)
    train(through, first, steps)

    stopped = AdamW(in_two_groups(second), **HYPER, **options)
    train(stopped, second, steps[:after])
    resumed = twins(second)
    other = AdamW(in_two_groups(resumed), **options)
    other.load_state_dict(through_a_file(stopped.state_dict()))
    train(other, resumed, steps[after:])
    assert same_bits(snapshot(other), snapshot(through))


@pytest.mark.parametrize(("dtype", "options"), PLAIN, ids=str)
@pytest.mark.parametrize("theirs", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_torchs_checkpoint_is_ours_to_the_bit(dtype, options, theirs, amsgrad):
    params, optimizer = trained(torch.optim.AdamW, dtype, theirs, amsgrad=amsgrad)
    resumed = twins(params)
    ours = AdamW(in_two_groups(resumed), **options)
    ours.load_state_dict(through_a_file(optimizer.state_dict()))
    assert same_bits(snapshot(ours), snapshot(optimizer))
    for mine, other in zip(ours.param_groups, optimizer.param_groups, strict=True):
        for name in ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"):
            assert mine[name] == other[name]
    others = twins(params)
    follow = torch.optim.AdamW(in_two_groups(others))
    follow.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group, mine in zip(follow.param_groups, ours.param_groups, strict=True):
        group.update(fused=mine["fused"], foreach=mine["foreach"])
    steps = gradients(2, dtype)
    train(ours, resumed, steps)
    train(follow, others, steps)
    assert same_bits(snapshot(ours), snapshot(follow))


@pytest.mark.parametrize(("dtype", "options"), MIXED, ids=str)
def test_torchs_checkpoint_takes_the_dtypes_that_are_asked_for(dtype, options):
    params, optimizer = trained(torch.optim.AdamW, dtype, {})
    resumed = twins(params)
    ours = AdamW(in_two_groups(resumed), **options)
    ours.load_state_dict(through_a_file(optimizer.state_dict()))
    for p, q in zip(resumed, params, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            wanted = optimizer.state[q][name].to(options.get("state_dtype", dtype))
            assert ours.state[p][name].dtype == wanted.dtype
            assert torch.equal(ours.state[p][name], wanted)
    for group in ours.param_groups:
        group["lr"] = 0.0
    train(ours, resumed, gradients(1, dtype))
    for p, q in zip(resumed, params, strict=True):
        assert same_bits(p.detach(), q.detach())
        if "master_weights" in options:
            assert same_bits(precise(ours, p), q.detach().float())  # there was none to load


@CONFIGURATIONS
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("theirs", [{}, {"fused": True}, {"foreach": False}], ids=str)
def test_our_checkpoint_becomes_torchs_own_cast(dtype, options, amsgrad, theirs):
    params, optimizer = trained(AdamW, dtype, options, amsgrad=amsgrad)
    resumed = twins(params)
    other = torch.optim.AdamW(in_two_groups(resumed), **theirs)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for p, q in zip(resumed, params, strict=True):
        assert {*other.state[p]} == {*optimizer.state[q]}
        assert other.state[p]["step"] == 2
        for name in [*MOMENTS][: 3 if amsgrad else 2]:
            assert same_bits(other.state[p][name], optimizer.state[q][name].to(dtype))
    train(other, resumed, gradients(2, dtype))
    assert all(state["step"] == 4 for state in other.state.values())
    assert not any(torch.equal(p, q) for p, q in zip(resumed, params, strict=True))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("target", [{}, {"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("options", [{"state_dtype": torch.float32}, {"master_weights": "float32"}], ids=str)
def test_fp32_moments_and_masters_stay_whatever_the_optimiser_was_made_for(dtype, target, options):
    params, optimizer = trained(AdamW, dtype, options)
    resumed = twins(params)
    other = AdamW(in_two_groups(resumed), **target)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert same_bits(snapshot(other), snapshot(optimizer))
    steps = gradients(3, dtype)
    train(optimizer, params, steps)
    train(other, resumed, steps)
    assert same_bits(snapshot(other), snapshot(optimizer))


def test_a_master_that_torch_left_behind_does_not_come_back():
    params, optimizer = trained(AdamW, torch.bfloat16, {"master_weights": "float32"})
    between = twins(params)
    theirs = torch.optim.AdamW(in_two_groups(between))
    theirs.load_state_dict(through_a_file(optimizer.state_dict()))
    train(theirs, between, gradients(5, torch.bfloat16))
    resumed = twins(between)
    ours = AdamW(in_two_groups(resumed), master_weights="float32")
    ours.load_state_dict(theirs.state_dict())
    for group in ours.param_groups:
        group["lr"] = 0.0
    train(ours, resumed, gradients(1, torch.bfloat16))
    for p, q in zip(resumed, between, strict=True):
        assert same_bits(p.detach(), q.detach())
        assert same_bits(ours.state[p]["master"], q.detach().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_wider_parameter_needs_no_master_that_comes(dtype):
    params, optimizer = trained(AdamW, torch.bfloat16, {"master_weights": "float32", "state_dtype": torch.float32})
    other = AdamW(in_two_groups(twins(params, dtype)), state_dtype=dtype)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert not any("master" in state for state in other.state.values())
    assert other._mixed is False


def test_how_a_group_is_computed_is_not_state():
    _, optimizer = trained(torch.optim.AdamW, torch.float32, {"foreach": False})
    other = AdamW(in_two_groups(parameters()), capturable=True)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in other.param_groups:
        assert (group["fused"], group["foreach"], group["capturable"]) == (True, None, True)
        assert group["eps"] == HYPER["eps"]


def test_hooks_see_whole_dicts_and_whole_states():
    params, optimizer = trained(AdamW, torch.bfloat16, {"master_weights": "float32", "state_dtype": torch.float32})
    other, seen = AdamW(in_two_groups(twins(params))), []

    def before(_, state_dict):
        seen.append({*state_dict["state"][0]})
        state_dict["state"] = {
            i: {**entry, "exp_avg": entry["exp_avg"] + 1} for i, entry in state_dict["state"].items()
        }
        return state_dict

    def after(optimizer):
        seen.append({*optimizer.state[optimizer.param_groups[0]["params"][0]]})

    other.register_load_state_dict_pre_hook(before)
    other.register_load_state_dict_post_hook(after)
    for _ in range(2):
        other.load_state_dict(optimizer.state_dict())
    assert len(other._optimizer_load_state_dict_pre_hooks) == len(other._optimizer_load_state_dict_post_hooks) == 1
    assert seen == [{"step", "exp_avg", "exp_avg_sq", "master"}] * 4
    for p, q in zip(params, snapshot(other)[1], strict=True):
        assert torch.equal(q["exp_avg"], optimizer.state[p]["exp_avg"] + 1)
    assert other._mixed


def test_moments_of_another_shape_are_refused_before_anything_is_written():
    _, optimizer = trained(AdamW, torch.float32, {})
    before = snapshot(optimizer)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"][2]["exp_avg_sq"] = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"exp_avg_sq.*\(3, 2, 4\).*\(3, 2\)"):
        optimizer.load_state_dict(state_dict)
    assert same_bits(snapshot(optimizer), before)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same_bits(snapshot(optimizer), before)


def test_moments_of_another_dtype_are_refused_by_a_differentiable_optimiser():
    params, optimizer = trained(AdamW, torch.bfloat16, {"state_dtype": torch.float32})
    other = AdamW(in_two_groups(twins(params)), differentiable=True)
    with pytest.raises(ValueError, match="differentiable"):
        other.load_state_dict(optimizer.state_dict())


def test_a_parameter_without_state_has_none_after_loading():
    params = parameters()
    optimizer = AdamW(params)
    train(optimizer, params, [[torch.ones_like(params[0]), None, None, None]])
    other = AdamW(twins(params))
    other.load_state_dict(optimizer.state_dict())
    assert len(other.state) == 1


def test_a_checkpoint_of_other_groups_raises():
    with pytest.raises(ValueError, match="group"):
        AdamW(in_two_groups(parameters())).load_state_dict(AdamW(parameters()).state_dict())
