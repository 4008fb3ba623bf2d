"""``AdamW`` under ``torch.amp.GradScaler``."""

import pytest
import torch

from sft_kernels import AdamW
from sft_kernels._budget import check

from .adamw import (
    HALF,
    HYPER,
    IMPLS,
    KERNELS,
    MIXED,
    PATHS,
    check_state,
    clipped,
    flags,
    flat,
    gradients,
    only_what_triton_carries,
    oracle,
    parameters,
    snapshot,
    train,
    twins,
)
from .helpers import same_bits

OVERFLOWS = (0, 4, 5)


def train_scaled(optimizer, params, steps, *, before_step=None):
    """Gradients by backward through a scale that grows and falls; returns the scales. Overflows at OVERFLOWS."""
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_factor=4.0, backoff_factor=0.5, growth_interval=2)
    scales = []
    for i, grads in enumerate(steps):
        optimizer.zero_grad()
        factor = float("inf") if i in OVERFLOWS else 1.0
        scaler.scale(sum((p * (g * factor)).sum() for p, g in zip(params, grads, strict=True))).backward()
        if before_step is not None:
            scaler.unscale_(optimizer)
            before_step(params)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def finite(steps):
    return [grads for i, grads in enumerate(steps) if i not in OVERFLOWS]


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("skip_nonfinite", [False, True])
@pytest.mark.parametrize("unscale_first", [False, True])
def test_overflows_growth_and_backoff_as_torch(path, dtype, clip, skip_nonfinite, unscale_first):
    only_what_triton_carries(path, dtype)
    params, steps = parameters(dtype), gradients(9, dtype)
    mine, other = twins(params), twins(params)
    optimizer = AdamW(mine, **HYPER, max_grad_norm=clip, skip_nonfinite=skip_nonfinite, **path)
    eager = torch.optim.AdamW(other, **HYPER, **flags(path))
    scales = train_scaled(optimizer, mine, steps, before_step=(lambda _: None) if unscale_first else None)
    assert scales == train_scaled(eager, other, steps, before_step=clipped(clip))
    assert scales[:2] == [8, 8]
    assert scales[-1] > min(scales)
    if clip is None and "impl" not in path:
        assert same_bits(snapshot(optimizer), snapshot(eager))
    ref, states = oracle(params, finite(steps), eager.param_groups, max_grad_norm=clip)
    check("parameters", flat(mine), flat(ref), flat(other))
    check_state(optimizer, states, eager)


@pytest.mark.parametrize(("dtype", "options"), MIXED, ids=str)
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("skip_nonfinite", [False, True])
@pytest.mark.parametrize(
    "path", [{}, {"foreach": False}, {"impl": "triton"}, {"impl": "cuda"}], ids=["chosen", "for-loop", *KERNELS]
)
def test_overflows_growth_and_backoff_on_the_mixed_path(dtype, options, clip, skip_nonfinite, path):
    """A scale is a power of two: the bits are those without a scaler, over the steps that did not overflow."""
    only_what_triton_carries(path, dtype, options.get("state_dtype"))
    params, steps = parameters(dtype), gradients(9, dtype)
    mine, unscaled, other = twins(params), twins(params), twins(params)
    options = {**HYPER, **options, **path, "max_grad_norm": clip}
    optimizer, reference = AdamW(mine, skip_nonfinite=skip_nonfinite, **options), AdamW(unscaled, **options)
    eager = torch.optim.AdamW(other, **HYPER, fused=True)
    scales = train_scaled(optimizer, mine, steps)
    assert scales == train_scaled(eager, other, steps)
    train(reference, unscaled, finite(steps))
    assert same_bits(snapshot(optimizer), snapshot(reference))
    assert optimizer.skipped_steps == (len(OVERFLOWS) if skip_nonfinite else 0)
    assert "impl" in path or same_bits([p.grad for p in mine], [p.grad for p in unscaled])


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_fused_half_precision_under_a_scaler_is_torchs(dtype):
    params, steps = parameters(dtype), gradients(9, dtype)
    mine, other = twins(params), twins(params)
    optimizer, eager = AdamW(mine, **HYPER), torch.optim.AdamW(other, **HYPER, fused=True)
    assert train_scaled(optimizer, mine, steps) == train_scaled(eager, other, steps)
    assert same_bits(snapshot(optimizer), snapshot(eager))


@pytest.mark.parametrize("first", [True, False])
def test_a_group_outside_the_fused_path_leaves_unscaling_to_the_scaler(first):
    """torch itself goes by the default alone, and then its for-loop meets a scale that it refuses."""
    params, steps = parameters(), gradients(9)
    mine, other = twins(params), twins(params)
    groups = [{"params": mine[:2], "fused": first}, {"params": mine[2:], "fused": not first}]
    optimizer, eager = AdamW(groups, **HYPER, fused=True), torch.optim.AdamW(other, **HYPER)
    train_scaled(optimizer, mine, steps)
    train_scaled(eager, other, steps)
    ref, _ = oracle(params, finite(steps), eager.param_groups)
    check("parameters", flat(mine), flat(ref), flat(other))


@PATHS
@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("clip", [None, 0.5, 1e6])
def test_grad_scaler_changes_no_bit(path, clip, unscale_first):
    """A scale is a power of two; clipping is by the norm of the unscaled gradients."""

    def trained(scaler):
        torch.manual_seed(0)
        params = parameters()
        optimizer = AdamW(params, **HYPER, max_grad_norm=clip, **path)
        for grads in gradients(4):
            optimizer.zero_grad()
            scaler.scale(sum((p * grad).sum() for p, grad in zip(params, grads, strict=True))).backward()
            if unscale_first:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        grads = [] if "impl" in path else [p.grad for p in params]  # the kernels leave them as they were
        return snapshot(optimizer), grads, optimizer.last_grad_norm

    scaled, unscaled = (trained(torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=on)) for on in (True, False))
    assert same_bits(scaled[:2], unscaled[:2])
    assert scaled[2] == unscaled[2]


@IMPLS
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"skip_nonfinite": True}], ids=str)
def test_a_scale_and_a_flag_set_from_outside_are_honoured_as_by_torchs_fused_step(options, impl):
    """What GradScaler does; also an engine that saw an overflow on another rank, where these gradients are finite."""
    params, (grads,) = parameters(), gradients(1)
    mine, other = twins(params), twins(params)
    optimizer = AdamW(mine, **HYPER, **options, impl=impl)
    reference = torch.optim.AdamW(other, **HYPER, fused=True)
    for found_inf in (1.0, 0.0):
        for each in (optimizer, reference):
            each.grad_scale, each.found_inf = torch.tensor(64.0), torch.tensor(found_inf)
        train(optimizer, mine, [grads])
        train(reference, other, [grads])
        check("parameters", flat(mine), flat(other).double(), flat(other))
        assert impl in KERNELS or same_bits(mine, other)
        assert same_bits(mine, params) == bool(found_inf)
        assert optimizer.skipped_steps == ("skip_nonfinite" in options)
        assert (optimizer.grad_scale, optimizer.found_inf) == (64, found_inf)  # left to who set them


@PATHS
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"skip_nonfinite": True}], ids=str)
def test_grad_scaler_skips_an_overflow_and_halves_its_scale(path, options):
    params, steps = parameters(), gradients(2)
    optimizer = AdamW(params, **HYPER, **path, **options)
    train(optimizer, params, steps)
    before = snapshot(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer.zero_grad()
    scaler.scale(sum((p * float("inf")).sum() for p in params)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert same_bits(snapshot(optimizer), before)
    assert scaler.get_scale() == 2
    train(optimizer, params, steps)  # the scaler's flag is not left behind
    assert not torch.equal(params[0], before[0][0])
