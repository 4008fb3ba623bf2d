"""``AdamW`` says once if its gradients come clipped already, and never otherwise."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils import clip_grad_norm_

from sft_kernels import AdamW
from sft_kernels.ops.adamw import double_clip, tables
from sft_kernels.ops.adamw.double_clip import ENOUGH, ENOUGH_IN_HALF, STEPS, DoubleClip

from .adamw import BAD, HALF, KERNELS, PATHS

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)).to(dtype)


def backward(model, norm=None, seed=None):
    """Gradients of a random batch, if asked for of this norm: accumulated, as in a loop that clips or scales."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    x = torch.randn(8, 16, generator=generator).to(next(model.parameters()).dtype)
    (model(x) - 1).square().mean().backward()
    if norm is not None:
        grads = [p.grad for p in model.parameters()]
        factor = norm / torch.cat([g.double().flatten() for g in grads]).norm()
        for g in grads:
            g.mul_(factor)


def warned(steps, call):
    """How often a second clip is spoken of in ``steps`` calls of ``call(i)``, and the steps after which it is."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        at = []
        for i in range(steps):
            call(i)
            if len(found := [w for w in caught if "clipped to" in str(w.message)]) > len(at):
                at.append(i)
        assert len(found) == len(at)
    return at


def loop(optimizer, model, clip=None, norms=None):
    """A step that clips to ``clip`` first, on gradients of these ``norms`` in turn (1.1 to 9.1 times the clip)."""

    def step(i):
        backward(model, norms[i % len(norms)] if norms else clip * (1.1 + i % 9))
        if clip is not None:
            clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


# ---- told


@PATHS
def test_a_clip_beside_ours_is_named_once(path):
    model = network()
    optimizer = AdamW(model.parameters(), max_grad_norm=1.0, **path)
    assert warned(3 * ENOUGH, loop(optimizer, model, 1.0)) == [ENOUGH - 1]


@pytest.mark.parametrize("bound", [0.03, 0.55, 7.5, 100.0])
def test_every_bound_is_recognised(bound):
    """A large one leaves less than a last place between the norms, so that some are the same."""
    model = network()
    optimizer = AdamW(model.parameters(), max_grad_norm=bound)
    (at,) = warned(4 * ENOUGH, loop(optimizer, model, bound))
    assert at >= ENOUGH - 1


@FLOATS
def test_with_gradients_in_half_precision_it_takes_more_steps(dtype):
    model = network(dtype)
    optimizer = AdamW(model.parameters(), max_grad_norm=1.0, state_dtype=torch.float32)
    enough = ENOUGH_IN_HALF if dtype in HALF else ENOUGH
    assert warned(3 * enough, loop(optimizer, model, 1.0)) == [enough - 1]


def spoken(optimizer, model, clip):
    """The warning that the steps of a loop give, which is one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(3 * ENOUGH):
            loop(optimizer, model, clip)(i)
    (warning,) = caught
    assert warning.category is UserWarning
    assert warning.filename == __file__
    return str(warning.message)


@pytest.mark.parametrize(("ours", "theirs"), [(0.5, 1.0), (1.0, 0.5), (0.7, 5.0)])
def test_another_bound_of_one_digit_is_seen_in_fp32(ours, theirs):
    model = network()
    message = spoken(AdamW(model.parameters(), max_grad_norm=ours), model, theirs)
    assert f"max_grad_norm={ours}" in message
    assert f"clipped to {theirs} already" in message


def test_the_message_says_what_to_switch_off():
    model = network()
    message = spoken(AdamW(model.parameters(), max_grad_norm=1.0), model, 1.0)
    for name in ("TrainingArguments(max_grad_norm=0)", "gradient_clip_val", "clip_grad_norm_", "max_grad_norm=1.0"):
        assert name in message


def test_steps_that_are_not_clipped_between_do_not_matter():
    model = network()
    optimizer = AdamW(model.parameters(), max_grad_norm=1.0)
    assert warned(20, loop(optimizer, model, 1.0, norms=[0.31, 2.1, 0.93, 0.52, 1.7])) == [6]


def test_gradients_that_are_zeroed_in_place():
    model = network()
    optimizer = AdamW(model.parameters(), max_grad_norm=1.0)

    def step(i):
        optimizer.zero_grad(set_to_none=False)
        backward(model, 2.5 + i)
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    assert warned(10, step) == [ENOUGH - 1]


def test_a_closure_that_clips():
    model = network()
    optimizer = AdamW(model.parameters(), max_grad_norm=1.0)

    def step(i):
        def closure():
            optimizer.zero_grad()
            backward(model, 2.5 + i)
            clip_grad_norm_(model.parameters(), 1.0)

        optimizer.step(closure)

    assert warned(10, step) == [ENOUGH - 1]


def test_unscaled_by_a_gradient_scaler():
    model = network()
    optimizer = AdamW(model.parameters(), max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(i):
        optimizer.zero_grad()
        scaler.scale((model(torch.randn(8, 16)) - 1).square().sum() * (1 + i)).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    assert warned(10, step) == [ENOUGH - 1]


def test_shards(one_rank):
    model = network()
    for layer in (model[0], model[2]):
        for name, p in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(distribute_tensor(p.detach(), one_rank, [Shard(0)])))
    optimizer = AdamW(model.parameters(), max_grad_norm=1.0)

    def step(i):
        for p in model.parameters():
            p.grad = distribute_tensor(torch.randn(p.shape), one_rank, [Shard(0)])
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    assert warned(10, step) == [ENOUGH - 1]


# ---- not told


@PATHS
@pytest.mark.parametrize("clips", [False, True], ids=["ours alone", "theirs alone"])
def test_one_clip_alone(path, clips):
    model = network()
    optimizer = AdamW(model.parameters(), max_grad_norm=None if clips else 1.0, **path)
    assert not warned(12, loop(optimizer, model, 1.0 if clips else None, norms=[2.1, 3.7, 0.53, 1.4]))


@PATHS
def test_the_same_gradients_again_and_again(path):
    """torch's paths leave them clipped to the bound by the step before."""
    model = network()
    optimizer = AdamW(model.parameters(), max_grad_norm=1.0, **path)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    assert not warned(12, lambda i: optimizer.step())


@pytest.mark.parametrize("norm", [1.0, 0.5])
def test_new_gradients_that_are_all_the_same(norm):
    """A loss that is linear has one gradient, whose norm may be the bound itself."""
    p = nn.Parameter(torch.zeros(4))
    optimizer = AdamW([p], max_grad_norm=1.0)

    def step(_):
        optimizer.zero_grad()
        for _ in range(2):
            (p.sum() * norm / 4).backward()
        optimizer.step()

    assert not warned(30, step)


@FLOATS
def test_norms_under_the_bound(dtype):
    model = network(dtype)
    optimizer = AdamW(model.parameters(), max_grad_norm=1.0, state_dtype=torch.float32)
    assert not warned(STEPS, loop(optimizer, model, 1.0, norms=[0.95 - 0.003 * i for i in range(50)]))


@pytest.mark.parametrize("clip", [None, 10.0])
def test_norms_that_are_at_the_bound_a_few_times_and_then_exceed_it(clip):
    """A clip at a larger bound never acts here."""
    model = network()
    optimizer = AdamW(model.parameters(), max_grad_norm=1.0)
    norms = [1 - 1e-7, 1 - 3e-7, 1.01] + [1 - 1e-7 * i for i in range(10)]
    assert not warned(len(norms), loop(optimizer, model, clip, norms=norms))


def test_training_on_one_batch_with_a_tiny_rate():
    """Norms then agree to six digits, but nothing writes to a gradient between backward and step."""
    model = network(torch.float32)
    optimizer = AdamW(model.parameters(), lr=1e-9, max_grad_norm=1.0)
    backward(model, seed=0)
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    optimizer.zero_grad()

    def step(_):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
        ((model(x) - 1).square().mean() / norm).backward()
        optimizer.step()
        optimizer.zero_grad()

    assert not warned(30, step)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("mean", [0.93, 0.96, 0.98, 1.0])
def test_random_norms_around_the_bound_in_half_precision(dtype, mean):
    """In 200 runs whose norms are spread around the bound by 2 % no one is told anything."""
    for seed in range(200):
        torch.manual_seed(seed)
        watch = DoubleClip()
        watch._tolerance, watch._enough = 1.5 * torch.finfo(dtype).eps, ENOUGH_IN_HALF
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for norm in (mean + 0.02 * torch.randn(STEPS)).tolist():
                watch._pile_up(norm, 1.0)


@PATHS
@pytest.mark.parametrize("bad", BAD)
def test_steps_that_are_skipped_count_nothing(path, bad):
    model = network()
    optimizer = AdamW(model.parameters(), max_grad_norm=1.0, skip_nonfinite=True, **path)

    def step(i):
        backward(model, 2.1 + i)
        clip_grad_norm_(model.parameters(), 1.0)
        if i in (1, 3):
            model[2].bias.grad[3] = bad
        optimizer.step()
        optimizer.zero_grad()

    assert warned(8, step) == [ENOUGH + 1]
    assert optimizer.skipped_steps == 2


@pytest.mark.parametrize("norm", [0.53, None], ids=["scaled", "as autograd made them"])
def test_after_some_steps_nothing_is_looked_at(norm, monkeypatch):
    monkeypatch.setattr(double_clip, "STEPS", 5)
    model = network()
    optimizer = AdamW(model.parameters(), max_grad_norm=1.0)

    def quiet(_):
        backward(model, norm)
        optimizer.step()
        optimizer.zero_grad()

    assert not warned(5, quiet)
    assert optimizer._double_clip is None
    assert not warned(5, loop(optimizer, model, 1.0))


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": float("inf")}, {"skip_nonfinite": True}], ids=str)
def test_nothing_is_watched_without_a_bound(options):
    model = network()
    optimizer = AdamW(model.parameters(), **options)
    assert optimizer._double_clip is None
    assert not warned(10, loop(optimizer, model, 1.0))


def test_nothing_is_read_from_steps_that_may_be_captured():
    model = network()
    optimizer = AdamW(model.parameters(), max_grad_norm=1.0, capturable=True, impl="triton")
    assert not warned(10, loop(optimizer, model, 1.0))


# ---- copies


def pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_copy_watches_anew(duplicate):
    model = network()
    optimizer = AdamW(model.parameters(), max_grad_norm=1.0)
    loop(optimizer, model, 1.0)(0)
    model, optimizer = duplicate((model, optimizer))
    assert warned(10, loop(optimizer, model, 1.0)) == [ENOUGH - 1]


def test_loading_a_state_goes_on_watching():
    model = network()
    optimizer = AdamW(model.parameters(), max_grad_norm=1.0)
    step = loop(optimizer, model, 1.0)

    def resumed(i):
        step(i)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    assert warned(10, resumed) == [ENOUGH - 1]
    assert "double" not in "".join(optimizer.state_dict())


# ---- on a GPU


class Event:
    """Stands in for an event of torch.cuda; it has happened when it is asked for the second time."""

    def __init__(self):
        self.asked = None

    def record(self, stream):
        self.asked = 0

    def query(self):
        assert self.asked is not None, "asked before it was recorded"
        self.asked += 1
        return self.asked > 1


@pytest.fixture
def device(monkeypatch):
    """Stands in for a GPU: copies arrive late, and asking during a capture fails."""
    state = {"capturing": False}
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(tables, "is_capturing", lambda device: state["capturing"])
    monkeypatch.setattr(DoubleClip, "_read", lambda self, norm: self._arrived(norm))
    return state


@pytest.mark.parametrize("impl", ["torch", *KERNELS])
def test_on_a_gpu_norms_arrive_later(impl, device):
    """Every second step finds the last norm still on its way: the third arrives in the step after the fifth."""
    model = network()
    optimizer = AdamW(model.parameters(), max_grad_norm=1.0, impl=impl)
    assert warned(20, loop(optimizer, model, 1.0)) == [2 * ENOUGH]


def test_a_capture_reads_nothing(device, monkeypatch):
    model = network()
    optimizer = AdamW(model.parameters(), max_grad_norm=1.0, impl="torch")
    step = loop(optimizer, model, 1.0)
    step(0)
    device["capturing"] = True
    monkeypatch.setattr(Event, "query", lambda self: pytest.fail("asked during a capture"))
    for i in range(5):
        step(i)
