"""``AdamW`` against the oracle and torch's own: clipping, skipping, odd gradients and layouts, bad options."""

import copy

import pytest
import torch
from torch import nn

from sft_kernels import AdamW
from sft_kernels._backend import Unavailable
from sft_kernels._budget import check
from sft_kernels.ops.adamw.state import is_dense

from .adamw import (
    BAD,
    HYPER,
    PATHS,
    check_state,
    clipped,
    flags,
    flat,
    gradients,
    in_two_groups,
    only_what_triton_carries,
    oracle,
    parameters,
    snapshot,
    train,
    twins,
)
from .helpers import same_bits

# ---- the same as torch


@PATHS
@pytest.mark.parametrize("max_grad_norm", [None, 1.0, 1e6, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("grouped", [False, True])
def test_twenty_steps_follow_the_oracle(path, max_grad_norm, dtype, grouped):
    only_what_triton_carries(path, dtype)
    params, steps = parameters(dtype), gradients(20, dtype)

    def trained(make, params, before_step=lambda params: None, **options):
        optimizer = make(in_two_groups(params) if grouped else params, **HYPER, **options)
        train(optimizer, params, steps, before_step)
        return optimizer

    mine, other = twins(params), twins(params)
    optimizer = trained(AdamW, mine, max_grad_norm=max_grad_norm, **path)
    eager = trained(torch.optim.AdamW, other, clipped(max_grad_norm), **flags(path))
    ref, states = oracle(params, steps, eager.param_groups, max_grad_norm=max_grad_norm)
    check("parameters", flat(mine), flat(ref), flat(other))
    check_state(optimizer, states, eager)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}], ids=str)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {"fused": True}),
        ({"fused": True}, {"fused": True}),
        ({"foreach": True}, {"foreach": True}),
        ({"foreach": False}, {"foreach": False}),
        ({"max_grad_norm": float("inf")}, {"fused": True}),
        ({"max_grad_norm": 1e9}, {"fused": True}),
        ({"skip_nonfinite": True}, {"fused": True}),
        ({"skip_nonfinite": True, "foreach": True}, {"foreach": True}),
        ({"max_grad_norm": 1e9, "skip_nonfinite": True}, {"fused": True}),
    ],
    ids=str,
)
def test_where_nothing_is_clipped_the_bits_are_torchs(ours, theirs, options):
    params, steps = parameters(), gradients(5)
    mine, other = twins(params), twins(params)
    train(AdamW(mine, **HYPER, **ours, **options), mine, steps)
    train(torch.optim.AdamW(other, **HYPER, **theirs, **options), other, steps)
    assert same_bits(mine, other)


def test_defaults_are_those_of_the_docstring():
    ours, theirs = AdamW(parameters()).defaults, torch.optim.AdamW(parameters()).defaults
    assert {key: ours[key] for key in ours if ours[key] != theirs[key]} == {"betas": (0.9, 0.95), "weight_decay": 0.1}


# ---- clipping


@PATHS
@pytest.mark.parametrize("max_grad_norm", [1e-3, 1e6])  # clipped, and as it was
def test_the_norm_is_reported_and_the_gradients_are_left_clipped_or_alone(path, max_grad_norm):
    params, (grads,) = parameters(), gradients(1)
    optimizer = AdamW(params, max_grad_norm=max_grad_norm, **path)
    assert optimizer.last_grad_norm is None
    train(optimizer, params, [grads])
    clipped = twins(params)
    for p, grad in zip(clipped, grads, strict=True):
        p.grad = grad.clone()
    eager = nn.utils.clip_grad_norm_(clipped, max_grad_norm)
    ref = torch.cat([grad.double().flatten() for grad in grads]).norm()
    check("last_grad_norm", optimizer.last_grad_norm, ref, eager)
    for p, c, grad in zip(params, clipped, grads, strict=True):
        if "impl" in path:
            assert same_bits(p.grad, grad)
        else:
            check("gradient", p.grad, grad.double() * min(1, max_grad_norm / (float(ref) + 1e-6)), c.grad)


@PATHS
def test_one_norm_over_parameters_of_different_dtypes(path):
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4, dtype=torch.bfloat16))]
    optimizer = AdamW(params, max_grad_norm=1.0, **path)
    train(optimizer, params, [[torch.full((3,), 2.0), torch.full((4,), 1.0)]])
    assert optimizer.last_grad_norm == 4.0
    for p, value in zip(params, (0.5, 0.25), strict=True):
        for name, power, beta in (("exp_avg", 1, 0.9), ("exp_avg_sq", 2, 0.95)):
            ref = torch.full_like(p, (1 - beta) * value**power, dtype=torch.float64)
            check(name, optimizer.state[p][name], ref, ref.to(p.dtype))


# ---- skipping


@PATHS
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("bad_step", [0, 2])
def test_a_step_with_a_non_finite_gradient_never_happened(path, clip, bad, bad_step):
    params, steps = parameters(), gradients(5)
    options = {**HYPER, **path, "max_grad_norm": clip}
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
    assert not optimizer.last_grad_norm.isfinite()
    assert optimizer.skipped_steps == 1
    train(optimizer, skipping, steps[bad_step:])
    other = AdamW(never, **options)
    train(other, never, steps)
    assert same_bits(snapshot(optimizer), snapshot(other))
    assert optimizer.skipped_steps == 1


@PATHS
def test_without_skip_nonfinite_a_nan_arrives_as_in_torch(path):
    params = parameters()
    other = twins(params)
    grads = [grad.clone() for grad in gradients(1)[0]]
    grads[0][0, 0] = float("nan")
    train(AdamW(params, **HYPER, max_grad_norm=1.0, **path), params, [grads])
    train(torch.optim.AdamW(other, **HYPER), other, [grads], lambda p: nn.utils.clip_grad_norm_(p, 1.0))
    assert same_bits(params, other)
    assert all(p.isnan().all() for p in params)


# ---- gradients that are missing, late, sparse, or laid out differently


@PATHS
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "skip_nonfinite": True}], ids=["plain", "clip"])
def test_missing_and_late_gradients(path, options):
    params, steps = parameters(), gradients(6)
    for i, grads in enumerate(steps):
        grads[1] = None  # never
        grads[2] = grads[2] if i > 2 else None  # late
    steps[4] = [None] * len(params)  # nobody
    mine, other = twins(params), twins(params)
    optimizer = AdamW(mine, **HYPER, **path, **options)
    train(optimizer, mine, steps)
    clip = (lambda p: nn.utils.clip_grad_norm_(p, 1.0)) if options else (lambda p: None)
    reference = torch.optim.AdamW(other, **HYPER, **flags(path))
    train(reference, other, steps, clip)
    for p, o in zip(mine, other, strict=True):
        check("parameter", p, o.double(), o)
        assert optimizer.state.get(p, {}).get("step") == reference.state.get(o, {}).get("step")
    assert torch.equal(mine[1], params[1])


@PATHS
def test_parameters_of_size_zero(path):
    params = [nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.ones(2))]
    optimizer = AdamW(params, max_grad_norm=1.0, skip_nonfinite=True, **path)
    train(optimizer, params, [[torch.empty(0, 3), torch.ones(2)]] * 2)
    assert optimizer.skipped_steps == 0
    assert (params[1] < 1).all()


@pytest.mark.parametrize("empty_first", [False, True])
def test_a_group_may_be_empty(empty_first):
    p = nn.Parameter(torch.ones(2))
    groups = [{"params": [p]}, {"params": []}]
    optimizer = AdamW(groups[::-1] if empty_first else groups, max_grad_norm=1.0, skip_nonfinite=True)
    train(optimizer, [p], [[torch.ones(2)]])
    assert (p < 1).all()


def test_no_parameters_at_all_raise_as_in_torch():
    with pytest.raises(ValueError, match="empty parameter list"):
        AdamW([])


@PATHS
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"skip_nonfinite": True}], ids=str)
def test_a_sparse_gradient_raises_before_anything_is_written(path, options):
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4, 2))]
    optimizer = AdamW(params, **path, **options)
    params[0].grad = torch.full((3,), 5.0)
    params[1].grad = torch.ones(4, 2).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert all((p == 1).all() for p in params)
    assert (params[0].grad == 5).all()
    assert not optimizer.state
    assert optimizer.skipped_steps == 0


@PATHS
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1e6, "skip_nonfinite": True}], ids=["plain", "clip"])
def test_a_gradient_laid_out_unlike_its_parameter_updates_the_right_elements(path, options):
    """torch's fused kernel walks both by address, so torch itself is wrong here."""
    start = torch.randn(4, 6)
    p, other = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine, reference = AdamW([p], **HYPER, **path, **options), AdamW([other], **HYPER, **path, **options)
    for grad in torch.randn(3, 4, 6):
        p.grad, other.grad = grad.t().contiguous().t(), grad.clone()
        mine.step()
        reference.step()
        assert torch.equal(p.grad, other.grad)
    assert same_bits(snapshot(mine), snapshot(reference))


@PATHS
@pytest.mark.parametrize(
    "view",
    [lambda b: b.t(), lambda b: b[:6, :4].t(), lambda b: b[:4, :6], lambda b: b[:4, ::2]],
    ids=["transposed", "transposed columns", "columns", "every other"],
)
def test_parameters_that_are_views_of_a_buffer(path, view):
    buffer = torch.randn(8, 12)
    rest = torch.ones_like(buffer, dtype=torch.bool)
    view(rest)[:] = False
    p, other = nn.Parameter(view(buffer)), nn.Parameter(view(buffer).clone(memory_format=torch.contiguous_format))
    if "impl" in path and not is_dense(p):
        p.grad = torch.ones_like(p)
        with pytest.raises(Unavailable, match="gaps"):
            AdamW([p], **path).step()
        path = {}  # what "auto" does then
    untouched = buffer[rest].clone()
    mine, reference = AdamW([p], **HYPER, max_grad_norm=1.0, **path), AdamW([other], **HYPER, max_grad_norm=1.0, **path)
    for grad in torch.randn(3, *other.shape):
        p.grad, other.grad = grad.clone(), grad.clone()
        mine.step()
        reference.step()
    assert torch.equal(buffer[rest], untouched)
    check("parameter", p, other.double(), other)


# ---- bad options


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm"),
        ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm"),
        ({"max_grad_norm": float("nan")}, ValueError, "max_grad_norm"),
        ({"max_grad_norm": True}, ValueError, "max_grad_norm"),
        ({"impl": "triton", "foreach": True}, ValueError, "foreach"),
        ({"impl": "cuda", "fused": False}, ValueError, "fused"),
        ({"impl": "fast"}, ValueError, "impl"),
        ({"differentiable": True, "max_grad_norm": 1.0}, ValueError, "differentiable"),
        ({"differentiable": True, "skip_nonfinite": True}, ValueError, "differentiable"),
        ({"differentiable": True, "state_dtype": torch.float32}, ValueError, "differentiable.*state_dtype"),
        ({"differentiable": True, "master_weights": "float32"}, ValueError, "differentiable.*master_weights"),
        ({"capturable": True, "skip_nonfinite": True, "foreach": True}, ValueError, "skip_nonfinite"),
        ({"master_weights": torch.float32}, ValueError, "master_weights"),
        ({"state_dtype": torch.int8}, ValueError, "state_dtype"),
        ({"state_dtype": "float32"}, ValueError, "state_dtype"),
        ({"state_dtype": torch.bfloat16, "foreach": True}, ValueError, "foreach.*state_dtype"),
        ({"state_dtype": torch.bfloat16, "fused": True}, ValueError, "fused.*state_dtype"),
        ({"fused": True, "foreach": True}, RuntimeError, "foreach"),
        ({"lr": -1.0}, ValueError, "learning rate"),
        ({"betas": (1.0, 0.9)}, ValueError, "beta"),
        ({"eps": -1.0}, ValueError, "epsilon"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay"),
    ],
    ids=str,
)
def test_a_bad_option_is_named(options, error, match):
    with pytest.raises(error, match=match):
        AdamW(parameters(), **options)


@pytest.mark.parametrize("flag", ["fused", "foreach"])
def test_kernels_of_one_dtype_are_refused_for_masters(flag):
    with pytest.raises(ValueError, match=f"{flag}=True.*bfloat16.*master_weights"):
        AdamW(parameters(torch.bfloat16), master_weights="float32", **{flag: True})
    AdamW(parameters(), master_weights="float32", state_dtype=torch.float32, **{flag: True})  # which fp32 needs not


def test_moments_of_complex_parameters_have_no_other_dtype():
    with pytest.raises(ValueError, match=r"state_dtype.*complex64"):
        AdamW([torch.ones(2, dtype=torch.complex64)], state_dtype=torch.float32)


@pytest.mark.parametrize("name", ["max_grad_norm", "skip_nonfinite", "master_weights", "state_dtype", "impl"])
def test_an_option_of_the_whole_is_refused_in_a_group(name):
    optimizer = AdamW(parameters())
    with pytest.raises(ValueError, match=name):
        optimizer.add_param_group({"params": parameters(), name: None})
    assert len(optimizer.param_groups) == 1


# ---- tensors that no implementation takes


def _cast(p, dtype):
    p.grad.data = p.grad.data.to(dtype)  # no autograd gives such a gradient, but other code may


UNFIT_GRADIENTS = {
    "float8": (lambda p: _cast(p, torch.float8_e4m3fn), "gradients: .*float8_e4m3fn"),
    "float8_e5m2": (lambda p: _cast(p, torch.float8_e5m2), "gradients: .*float8_e5m2"),
    "int": (lambda p: _cast(p, torch.int32), "gradients: .*int32"),
    "sparse": (lambda p: setattr(p, "grad", p.grad.to_sparse()), "gradients: .*sparse"),
}
NESTED = [torch.ones(2, 3), torch.ones(4, 3)]
UNFIT_PARAMETERS = {
    "float8": (lambda: torch.ones(4, 2).to(torch.float8_e4m3fn), "params: .*float8_e4m3fn"),
    "int": (lambda: torch.ones(4, 2, dtype=torch.int32), "params: .*int32"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "params: .*sparse"),
    "sparse rows": (lambda: torch.eye(3).to_sparse_csr(), "params: .*sparse"),
    "jagged": (lambda: torch.nested.nested_tensor(NESTED, layout=torch.jagged), "params: .*nested"),
    "nested": (lambda: torch.nested.nested_tensor(NESTED, layout=torch.strided), "params: .*nested"),
}
MEASURED = {"max_grad_norm": 1.0, "skip_nonfinite": True}
UNFIT_OPTIONS = pytest.mark.parametrize(
    "options",
    [{}, MEASURED, {"state_dtype": torch.float32, "update_stats": True}, {"stochastic_rounding": True}],
    ids=["plain", "clip", "mixed", "rounded"],
)


def only_with_torchs_options(path, options):
    if "foreach" in path and {"update_stats", "stochastic_rounding"} & {*options}:
        pytest.skip("not of torch's kernels")


def check_nothing_written(optimizer, p, grad):
    assert (p == 1).all()
    assert (grad == 5).all()
    assert not any(optimizer.state.values())
    assert optimizer.skipped_steps == 0


@PATHS
@UNFIT_OPTIONS
@pytest.mark.parametrize("kind", UNFIT_GRADIENTS)
def test_an_unfit_gradient_raises_before_anything_is_written(kind, path, options):
    only_with_torchs_options(path, options)
    spoil, match = UNFIT_GRADIENTS[kind]
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4, 2))]
    optimizer = AdamW(params, **path, **options)
    for p in params:
        p.grad = torch.full_like(p, 5.0)
    spoil(params[1])
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    check_nothing_written(optimizer, params[0], params[0].grad)


@PATHS
@UNFIT_OPTIONS
@pytest.mark.parametrize("kind", UNFIT_PARAMETERS)
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
def test_an_unfit_parameter_raises_before_anything_is_written(kind, path, options):
    """One to be trained is refused when it is given; a frozen one once it has a gradient."""
    only_with_torchs_options(path, options)
    make, match = UNFIT_PARAMETERS[kind]
    p, q = nn.Parameter(torch.ones(3)), make()
    if q.is_floating_point():
        with pytest.raises(ValueError, match=match):
            AdamW([p, nn.Parameter(q.detach())], **path, **options)
    optimizer = AdamW([p, q], **path, **options)
    p.grad = torch.full((3,), 5.0)
    if kind != "nested":  # which torch gives no gradient
        q.grad = q.detach()
        with pytest.raises(ValueError, match=match):
            optimizer.step()
        check_nothing_written(optimizer, p, p.grad)
        q.grad = None
    optimizer.step()
    assert (p < 1).all()


def test_moments_of_float8_are_refused_unless_another_dtype_is_asked_for():
    params = parameters()
    optimizer = AdamW(params)
    train(optimizer, params, gradients(1))
    before = snapshot(optimizer)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        state["exp_avg"] = state["exp_avg"].to(torch.float8_e5m2)
    with pytest.raises(ValueError, match=r"state_dict: exp_avg: .*float8_e5m2"):
        optimizer.load_state_dict(state_dict)
    assert same_bits(snapshot(optimizer), before)
    AdamW(twins(params), state_dtype=torch.float32).load_state_dict(state_dict)
