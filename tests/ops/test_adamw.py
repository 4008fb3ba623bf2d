"""``AdamW`` against torch's, with ``clip_grad_norm_`` before each step where it clips."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from sft_kernels import AdamW, decay_groups
from sft_kernels._budget import check

from .helpers import same_bits

PATHS = pytest.mark.parametrize("path", [{}, {"foreach": True}, {"foreach": False}], ids=["fused", "foreach", "single"])
HYPER = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.05}
SHAPES = [(7, 5), (5,), (3, 2, 4), ()]
BAD = [float("nan"), float("inf"), -float("inf")]


def parameters(dtype=torch.float32):
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def twins(params, dtype=None):
    return [nn.Parameter(p.detach().clone().to(dtype or p.dtype)) for p in params]


def gradients(steps, dtype=torch.float32):
    """Of very different sizes from step to step, so that a clip at 1 sometimes bites."""
    return [[(torch.randn(shape) * 10.0 ** (i % 4 - 2)).to(dtype) for shape in SHAPES] for i in range(steps)]


def train(optimizer, params, steps, before_step=lambda params: None):
    for grads in steps:
        for p, grad in zip(params, grads, strict=True):
            p.grad = None if grad is None else grad.clone().to(p.dtype)
        before_step(params)
        optimizer.step()
    return params


def snapshot(optimizer):
    """Parameters, and state where there is any."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return copy.deepcopy(
        [[p.detach() for p in params], [dict(optimizer.state[p]) for p in params if p in optimizer.state]]
    )


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def in_two_groups(params):
    return [{"params": params[:2], "lr": 3e-2, "weight_decay": 0.3}, {"params": params[2:], "betas": (0.5, 0.9)}]


# ---- the same as torch


@PATHS
@pytest.mark.parametrize("max_grad_norm", [None, 1.0, 1e6, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grouped", [False, True])
def test_twenty_steps_follow_torch_with_clip_grad_norm(path, max_grad_norm, dtype, grouped):
    params, steps = parameters(dtype), gradients(20, dtype)

    def clip(params):
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(params, max_grad_norm)

    def trained(make, params, before_step=lambda params: None, **options):
        optimizer = make(in_two_groups(params) if grouped else params, **HYPER, **options)
        train(optimizer, params, steps, before_step)
        return params, [optimizer.state[p] for p in params]

    ref, ref_state = trained(torch.optim.AdamW, twins(params, torch.float64), clip)
    eager, eager_state = trained(torch.optim.AdamW, twins(params), clip, **(path or {"fused": True}))
    ours, state = trained(AdamW, twins(params), max_grad_norm=max_grad_norm, **path)
    check("parameters", flat(ours), flat(ref), flat(eager))
    for key in ("step", "exp_avg", "exp_avg_sq"):
        check(key, *(flat(s[key] for s in states) for states in (state, ref_state, eager_state)))


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
def test_the_norm_is_reported_and_the_gradients_are_left_clipped(path, max_grad_norm):
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
        check("gradient", p.grad, grad.double() * min(1, max_grad_norm / (float(ref) + 1e-6)), c.grad)


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}], ids=str)
@PATHS
def test_float64_parameters_are_clipped_and_checked_too(path, options):
    params, steps = parameters(torch.float64), gradients(3, torch.float64)
    other = twins(params)
    train(AdamW(params, **HYPER, **options, **path), params, steps)
    clip = (lambda p: nn.utils.clip_grad_norm_(p, 1.0)) if "max_grad_norm" in options else (lambda p: None)
    train(torch.optim.AdamW(other, **HYPER), other, steps, clip)
    for p, o in zip(params, other, strict=True):
        check("parameter", p.float(), o, o.float())


@PATHS
def test_one_norm_over_parameters_of_different_dtypes(path):
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4, dtype=torch.bfloat16))]
    optimizer = AdamW(params, max_grad_norm=1.0, **path)
    train(optimizer, params, [[torch.full((3,), 2.0), torch.full((4,), 1.0)]])
    assert optimizer.last_grad_norm == 4.0
    for p, value in zip(params, (0.5, 0.25), strict=True):
        check("gradient", p.grad, torch.full_like(p, value).double(), torch.full_like(p, value))


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
    reference = torch.optim.AdamW(other, **HYPER, **(path or {"fused": True}))
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
    untouched = buffer[rest].clone()
    mine, reference = AdamW([p], **HYPER, max_grad_norm=1.0, **path), AdamW([other], **HYPER, max_grad_norm=1.0, **path)
    for grad in torch.randn(3, *other.shape):
        p.grad, other.grad = grad.clone(), grad.clone()
        mine.step()
        reference.step()
    assert torch.equal(buffer[rest], untouched)
    check("parameter", p, other.double(), other)


# ---- an optimiser among others: closures, hooks, schedulers, scalers


@PATHS
def test_a_closure_is_run_once_with_gradients_and_its_loss_returned(path):
    p = nn.Parameter(torch.ones(2))
    optimizer = AdamW([p], max_grad_norm=1.0, **path)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) == 2
    assert calls == [True]
    assert (p < 1).all()


def test_a_closure_that_raises_changes_nothing():
    params, steps = parameters(), gradients(2)
    optimizer = AdamW(params, max_grad_norm=1.0, skip_nonfinite=True)
    train(optimizer, params, steps)
    before = snapshot(optimizer)

    def closure():
        raise ArithmeticError("from the closure")

    with pytest.raises(ArithmeticError, match="from the closure"):
        optimizer.step(closure)
    assert same_bits(snapshot(optimizer), before)


@PATHS
@pytest.mark.parametrize("torch_first", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
def test_step_hooks_run_once(path, options, torch_first, monkeypatch):
    """torch wraps a class's step when its first instance is made; ours inherits from a class that may be wrapped."""
    for cls in (torch.optim.Adam, torch.optim.AdamW, AdamW):
        step = cls.__dict__.get("step")
        while getattr(step, "hooked", False):
            step = step.__wrapped__
        if step is not None:
            monkeypatch.setattr(cls, "step", step)
    if torch_first:
        torch.optim.Adam(parameters())
        torch.optim.AdamW(parameters())
    params, seen = parameters(), []
    optimizer = AdamW(params, **path, **options)
    if not torch_first:
        torch.optim.AdamW(parameters())
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    everywhere = register_optimizer_step_post_hook(lambda *_: seen.append("everywhere"))
    try:
        train(optimizer, params, gradients(2))
    finally:
        everywhere.remove()
    assert seen.count("before") == seen.count("after") == seen.count("everywhere") == 2


@pytest.mark.filterwarnings("error")
def test_a_scheduler_sets_the_rate_of_the_next_step():
    p = nn.Parameter(torch.zeros(1))
    optimizer = AdamW([p], lr=1.0, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step == 1 else 1.0)
    values = []
    for _ in range(3):
        train(optimizer, [p], [[torch.ones(1)]])
        scheduler.step()
        values.append(p.item())
    assert values[0] == pytest.approx(-1)
    assert values[1] == values[0]
    assert values[2] == pytest.approx(-2)


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
        return snapshot(optimizer), [p.grad for p in params], optimizer.last_grad_norm

    scaled, unscaled = (trained(torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=on)) for on in (True, False))
    assert same_bits(scaled[:2], unscaled[:2])
    assert scaled[2] == unscaled[2]


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"skip_nonfinite": True}], ids=str)
def test_a_scale_and_a_flag_set_from_outside_are_honoured_as_by_torchs_fused_step(options):
    """What GradScaler does; also an engine that saw an overflow on another rank, where these gradients are finite."""
    params, (grads,) = parameters(), gradients(1)
    mine, other = twins(params), twins(params)
    optimizer, reference = AdamW(mine, **HYPER, **options), torch.optim.AdamW(other, **HYPER, fused=True)
    for found_inf in (1.0, 0.0):
        for each in (optimizer, reference):
            each.grad_scale, each.found_inf = torch.tensor(64.0), torch.tensor(found_inf)
        train(optimizer, mine, [grads])
        train(reference, other, [grads])
        assert same_bits(mine, other)
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


# ---- copies and checkpoints


def _pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


def _saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@PATHS
@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _saved], ids=["deepcopy", "pickle", "torch.save"])
def test_a_copy_goes_on_like_the_original(path, duplicate):
    params, steps = parameters(), gradients(6)
    optimizer = AdamW(params, **HYPER, max_grad_norm=0.5, skip_nonfinite=True, **path)
    steps[1][0][0, 0] = float("nan")
    train(optimizer, params, steps[:3])
    twin = duplicate(optimizer)
    assert (twin.skipped_steps, twin.last_grad_norm) == (1, optimizer.last_grad_norm)
    steps[4][0][0, 0] = float("inf")
    train(twin, twin.param_groups[0]["params"], steps[3:])
    train(optimizer, params, steps[3:])
    assert same_bits(snapshot(twin), snapshot(optimizer))
    assert twin.skipped_steps == optimizer.skipped_steps == 2


@pytest.mark.parametrize("target", [{}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("source", [{}, {"foreach": True}], ids=str)
@pytest.mark.parametrize(("make", "remake"), [(AdamW, AdamW), (torch.optim.AdamW, AdamW), (AdamW, torch.optim.AdamW)])
def test_a_checkpoint_goes_on_in_either_class_by_its_own_path(make, remake, source, target):
    params, steps = parameters(), gradients(4)
    first = make(params, **HYPER, **source)
    train(first, params, steps[:2])
    resumed = twins(params)
    second = remake(resumed, **{"lr": 7.0, **target})
    choice = second.param_groups[0]["fused"], second.param_groups[0]["foreach"]
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.param_groups[0]["lr"] == HYPER["lr"]
    if remake is AdamW:
        assert (second.param_groups[0]["fused"], second.param_groups[0]["foreach"]) == choice
    train(first, params, steps[2:])
    train(second, resumed, steps[2:])
    for p, r in zip(params, resumed, strict=True):
        check("parameter", r, p.double(), p)


def test_a_checkpoint_of_other_groups_raises():
    with pytest.raises(ValueError, match="group"):
        AdamW(in_two_groups(parameters())).load_state_dict(AdamW(parameters()).state_dict())


# ---- bad options


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm"),
        ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm"),
        ({"max_grad_norm": float("nan")}, ValueError, "max_grad_norm"),
        ({"impl": "triton", "foreach": True}, ValueError, "foreach"),
        ({"impl": "cuda", "fused": False}, ValueError, "fused"),
        ({"impl": "fast"}, ValueError, "impl"),
        ({"differentiable": True, "max_grad_norm": 1.0}, ValueError, "differentiable"),
        ({"differentiable": True, "skip_nonfinite": True}, ValueError, "differentiable"),
        ({"capturable": True, "skip_nonfinite": True, "foreach": True}, ValueError, "skip_nonfinite"),
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


# ---- decay_groups


class RootMeanSquareNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))  # two dimensions, and still a norm's


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.norm, self.custom = nn.LayerNorm(4), RootMeanSquareNorm()
        self.convolution = nn.Conv1d(4, 4, 3)
        self.scalar = nn.Parameter(torch.ones(()))
        self.untied, self.head = nn.Linear(4, 6, bias=False), nn.Linear(4, 6)
        self.head.weight = self.embedding.weight


def test_decay_groups_decays_matrices_that_are_neither_norms_nor_embeddings():
    model = Model()
    decayed, exempt = decay_groups(model, 0.3)
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = ["layers.0.weight", "layers.1.weight", "convolution.weight", "untied.weight"]
    assert [names[id(p)] for p in decayed["params"]] == matrices
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.3, 0.0)
    everything = [names[id(p)] for p in decayed["params"] + exempt["params"]]
    assert sorted(everything) == sorted(name for name, p in model.named_parameters() if p.requires_grad)


def test_decay_groups_makes_an_optimiser_even_where_nothing_is_decayed():
    for model in (Model(), nn.LayerNorm(4), nn.Linear(4, 4, bias=False)):
        optimizer = AdamW(decay_groups(model))
        assert sum(len(group["params"]) for group in optimizer.param_groups) == sum(
            p.requires_grad for p in model.parameters()
        )


@pytest.mark.parametrize(
    ("model", "weight_decay", "match"),
    [
        (nn.Linear(2, 2), -0.1, "weight_decay"),
        (nn.Linear(2, 2).requires_grad_(False), 0.1, "model"),
        (nn.ReLU(), 0.1, "model"),
    ],
    ids=["negative", "frozen", "nothing"],
)
def test_decay_groups_names_what_is_wrong(model, weight_decay, match):
    with pytest.raises(ValueError, match=match):
        decay_groups(model, weight_decay)
