"""``AdamW`` built before its model is moved to a GPU: every step goes by where the parameters are then.

The ``meta`` device stands in for a GPU; what looks at its arguments stands in for the kernels.
"""

import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sft_kernels import AdamW, _backend
from sft_kernels._backend import Unavailable
from sft_kernels.ops.adamw import triton_impl

CPU, GPU = torch.device("cpu"), torch.device("meta")
OPTIONS = [
    {},
    {"max_grad_norm": 1.0},
    {"skip_nonfinite": True},
    {"update_stats": True, "skip_nonfinite": True},
    {"master_weights": "float32", "amsgrad": True},
    {"master_weights": "split"},
]


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels and operators that were launched, and where the tensors are that each was given."""
    seen = []

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return self

        def __call__(self, *args, **kwargs):
            seen.append((self.name, {t.device for t in args if isinstance(t, torch.Tensor)}))

    for name in ("_sum_of_squares_kernel", "_update_kernel"):
        monkeypatch.setattr(triton_impl, name, Kernel(name))
    return seen


@pytest.fixture
def _gpu_is_there(monkeypatch):
    def why(device, interpreted=None):
        return "needs a GPU" if device == CPU else None

    monkeypatch.setattr(_backend, "_why_no_triton", why)
    monkeypatch.setattr(_backend, "_why_no_cuda", why)


def parameters():
    return [nn.Parameter(torch.randn(shape).bfloat16()) for shape in ((7, 5), (3,))]


def moved(params, device):
    """As ``model.to(device)`` does: the parameters are the same objects, elsewhere. And new gradients."""
    for p in params:
        p.grad = None
        torch.utils.swap_tensors(p, nn.Parameter(p.detach().to(device)))
        p.grad = torch.ones_like(p)


def check_all_on(device, optimizer):
    assert optimizer.state
    for state in optimizer.state.values():
        assert {t.device for t in state.values()} == {device}
    assert optimizer.skipped_steps.device == device
    if optimizer.last_grad_norm is not None:
        assert optimizer.last_grad_norm.device == device


def with_a_state(params, options, **more):
    """An optimiser that has stepped and loaded on the CPU."""
    moved(params, CPU)
    before = AdamW(params, impl="torch", **options)
    before.step()
    optimizer = AdamW(params, **options, **more)
    optimizer.load_state_dict(before.state_dict())
    return optimizer


@pytest.mark.usefixtures("_gpu_is_there")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("state_first", [False, True])
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_triton_steps_where_the_parameters_are(options, state_first, impl, launches):
    params = parameters()
    optimizer = with_a_state(params, options, impl=impl) if state_first else AdamW(params, impl=impl, **options)
    moved(params, GPU)
    optimizer.step()
    norm = bool({"max_grad_norm", "skip_nonfinite"} & {*options})
    expected = [("_sum_of_squares_kernel", {GPU})] * norm + [("_update_kernel", {GPU})]
    assert launches == expected
    check_all_on(GPU, optimizer)
    later = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16, device=GPU))
    optimizer.add_param_group({"params": [later]})
    later.grad = torch.ones_like(later)
    optimizer.step()
    assert launches == expected * 2


@pytest.mark.usefixtures("_gpu_is_there")
@pytest.mark.parametrize("state_first", [False, True])
def test_the_cuda_operators_are_given_what_lies_where_the_parameters_are(state_first, monkeypatch):
    seen = []

    class Operators:
        def __getattr__(self, name):
            return lambda table, *args: seen.append((name, {t.device for t in args if isinstance(t, torch.Tensor)}))

    monkeypatch.setattr(torch.ops, "sft_kernels_cuda", Operators())
    params, options = parameters(), {"max_grad_norm": 1.0, "skip_nonfinite": True}
    try:
        optimizer = with_a_state(params, options, impl="cuda") if state_first else AdamW(params, impl="cuda", **options)
    except Unavailable as reason:
        pytest.fail(str(reason))  # or it would be skipped, as where there is no compiler
    moved(params, GPU)
    optimizer.step()
    assert seen == [("adamw_sum_of_squares", {GPU}), ("adamw_update", {GPU})]
    check_all_on(GPU, optimizer)


@pytest.mark.parametrize(
    ("path", "options"),
    [({"impl": "torch"}, options) for options in OPTIONS]
    + [({"foreach": foreach}, options) for foreach in (False, True) for options in OPTIONS[:3]],
    ids=str,
)
@pytest.mark.parametrize("state_first", [False, True])
def test_torch_steps_where_the_parameters_are(path, options, state_first, monkeypatch):
    options = {"capturable": "skip_nonfinite" not in options, **options}
    monkeypatch.setattr(AdamW, "_torch_step", lambda optimizer: None)  # torch's fused kernel refuses the meta device
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda t: False)  # the flag that foreach reads back
    params = parameters()
    optimizer = AdamW(params, **path, **options)
    if state_first:
        moved(params, CPU)
        for p in params:
            names = ("step", "exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if options.get("amsgrad") else []))
            optimizer.state[p] = {name: torch.zeros_like(p) for name in names} | {"step": torch.ones(())}
    moved(params, GPU)
    optimizer.step()
    assert optimizer.skipped_steps.device == GPU
    if state_first and (optimizer._mixed or "impl" in path or options["capturable"]):
        check_all_on(GPU, optimizer)
    for state in optimizer.state.values():
        assert {t.device for name, t in state.items() if name != "step"} == {GPU}


@pytest.mark.usefixtures("_gpu_is_there")
def test_a_frozen_parameter_that_stays_behind_decides_nothing(launches):
    behind, params = nn.Parameter(torch.zeros(3), requires_grad=False), parameters()
    optimizer = AdamW([behind, *params], max_grad_norm=1.0, skip_nonfinite=True)
    moved(params, GPU)
    optimizer.step()
    assert launches == [("_sum_of_squares_kernel", {GPU}), ("_update_kernel", {GPU})]
    check_all_on(GPU, optimizer)


def test_both_kernels_are_launched_while_their_device_is_current(monkeypatch):
    """Only the tables' device, and what a step allocates, are of a second GPU."""
    there, current, seen = torch.device("cuda:1"), [None], []

    @contextlib.contextmanager
    def device(wanted):
        before, current[0] = current[0], wanted
        yield
        current[0] = before

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: seen.append(current[0])

    params = parameters()
    optimizer = AdamW(params, max_grad_norm=1.0, skip_nonfinite=True, impl="triton")
    moved(params, CPU)
    optimizer.step()
    optimizer._tables.device = there
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("_sum_of_squares_kernel", "_update_kernel"):
        monkeypatch.setattr(triton_impl, name, Kernel())
    with FakeTensorMode(allow_non_fake_inputs=True):
        triton_impl.step(optimizer)
    assert seen == [there, there]


def test_statistics_follow_the_parameters_too():
    """A step after the move is counted beside one before it, which is where a skipped step's statistics come from."""
    params = parameters()
    optimizer = AdamW(params, impl="torch", update_stats=True, skip_nonfinite=True)
    for device in (CPU, GPU):
        moved(params, device)
        optimizer.step()
    assert optimizer.update_statistics().rounded_away.device == GPU


def test_statistics_are_those_of_the_implementation_that_stepped_last(monkeypatch):
    """As of a model that is moved back from a GPU."""
    params = [nn.Parameter(torch.ones(8))]
    optimizer = AdamW(params, lr=0.1, update_stats=True)
    ratios = []
    for impl in ("triton", "torch"):
        monkeypatch.setenv("SFT_KERNELS_IMPL", impl)
        params[0].grad = torch.ones(8)
        optimizer.step()
        ratios.append(optimizer.update_statistics().update_to_weight.item())
        params[0].data.fill_(100.0)
    assert ratios[1] < ratios[0] / 5


def test_a_rate_that_was_a_tensor_and_becomes_zero_is_zero():
    params = [nn.Parameter(torch.ones(8))]
    optimizer = AdamW(params, lr=torch.tensor(0.1), impl="triton", weight_decay=0.0)
    for lr in (torch.tensor(0.1), 0.0):
        optimizer.param_groups[0]["lr"] = lr
        before = params[0].detach().clone()
        params[0].grad = torch.ones(8)
        optimizer.step()
    assert torch.equal(params[0], before)


def test_a_count_of_skipped_steps_that_began_on_the_meta_device_is_none(launches):
    """A model may be built without memory."""
    params = [nn.Parameter(torch.randn(3))]
    optimizer = AdamW(params, impl="triton", skip_nonfinite=True)
    optimizer.skipped_steps = optimizer.skipped_steps.to("meta")
    params[0].grad = torch.ones(3)
    optimizer.step()
    assert optimizer.skipped_steps.item() == 0
    assert all(devices == {CPU} for _, devices in launches)


def test_an_implementation_that_cannot_be_is_refused_when_it_is_named(monkeypatch):
    monkeypatch.setattr(_backend, "_why_no_cuda", lambda device: "not built")
    with pytest.raises(ValueError, match=r"impl: expected one of .*'cuda'.*got 'fast'"):
        AdamW(parameters(), impl="fast")
    with pytest.raises(Unavailable, match=r"impl='flash': adamw has no such implementation; it has .*cuda"):
        AdamW(parameters(), impl="flash")
    with FakeTensorMode(), pytest.raises(Unavailable, match="impl='cuda': not built"):
        AdamW([torch.zeros(3, device="cuda:1")], impl="cuda")


@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_a_step_where_the_implementation_cannot_run_raises_before_anything_is_written(impl, monkeypatch):
    monkeypatch.setattr(_backend, "_why_no_triton", lambda device, interpreted: "needs a GPU")
    monkeypatch.setattr(_backend, "_why_no_cuda", lambda device: "needs a GPU")
    params = [nn.Parameter(torch.zeros(3))]
    optimizer = AdamW(params, impl=impl)
    moved(params, CPU)
    with pytest.raises(Unavailable, match=f"impl='{impl}': needs a GPU"):
        optimizer.step()
    assert not optimizer.state
    assert not params[0].any()
