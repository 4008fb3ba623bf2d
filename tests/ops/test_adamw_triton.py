"""What is Triton's own about ``AdamW``: how often it launches, what it moves, when its tables hold, what it leaves to
torch."""

import collections
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from triton.runtime import interpreter

from sft_kernels import AdamW, _backend
from sft_kernels._backend import Unavailable
from sft_kernels._budget import check
from sft_kernels.ops.adamw import tables, triton_impl
from sft_kernels.ops.adamw.tables import CHUNK

from . import adamw_twin as twin
from .adamw import HYPER, IMPLS, MOMENTS, gradients, in_two_groups, oracle, parameters, snapshot, train, twins
from .helpers import same_bits
from .test_adamw_twin import check_bits

BF16, FP32 = torch.bfloat16, torch.float32


# ---- launches


@pytest.fixture
def launches(monkeypatch):
    """Counts launches by kernel."""
    counts = collections.Counter()

    class Counting:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(triton_impl, name)

        def __getitem__(self, grid):
            counts[self.name] += 1
            return self.kernel[grid]

    for name in ("_sum_of_squares_kernel", "_update_kernel"):
        monkeypatch.setattr(triton_impl, name, Counting(name))
    return counts


@pytest.mark.parametrize(
    ("options", "norm"),
    [({}, 0), ({"max_grad_norm": 1.0}, 1), ({"skip_nonfinite": True}, 1), ({"max_grad_norm": float("inf")}, 1)],
    ids=str,
)
def test_two_launches_for_any_number_of_tensors_groups_and_rates(launches, options, norm):
    params = [p for _ in range(5) for p in parameters()]
    groups = [{"params": [p], "lr": 1e-3 * i, "weight_decay": 0.1 * i} for i, p in enumerate(params)]
    train(AdamW(groups, impl="triton", **options), params, [[torch.randn(p.shape) for p in params]])
    assert launches == {"_update_kernel": 1} | ({"_sum_of_squares_kernel": 1} if norm else {})


def test_two_launches_a_combination_of_dtypes(launches):
    params = [*parameters(), *parameters(BF16), *parameters()]
    optimizer = AdamW(params, impl="triton", max_grad_norm=1.0)
    grads = [torch.randn(p.shape) for p in params]
    train(optimizer, params, [grads])
    assert launches == {"_update_kernel": 2, "_sum_of_squares_kernel": 2}
    ref = torch.cat([g.to(p.dtype).double().flatten() for p, g in zip(params, grads, strict=True)]).norm()
    check("norm", optimizer.last_grad_norm, ref, ref)


# ---- bytes


@pytest.fixture
def moved(monkeypatch):
    """Bytes that programs load and store as blocks, by kernel; scalars are left out."""
    counts, builder = collections.Counter(), interpreter.InterpreterBuilder

    def counting(name, mask_at):  # what is not masked comes here too
        original = getattr(builder, name)

        def wrapper(self, ptrs, *rest):
            if ptrs.data.size > 1:
                inside = np.count_nonzero(rest[mask_at].data)
                counts[current[0]] += inside * ptrs.get_element_ty().primitive_bitwidth // 8
            return original(self, ptrs, *rest)

        monkeypatch.setattr(builder, name, wrapper)

    counting("create_masked_load", 0)
    counting("create_masked_store", 1)
    current = [None]
    for name in ("_sum_of_squares_kernel", "_update_kernel"):

        class Named:
            def __init__(self, name, kernel):
                self.name, self.kernel = name, kernel

            def __getitem__(self, grid):
                current[0] = self.name
                return self.kernel[grid]

        monkeypatch.setattr(triton_impl, name, Named(name, getattr(triton_impl, name)))
    return counts


@pytest.mark.parametrize(
    ("dtype", "options", "update", "clip"),
    [
        (BF16, {"state_dtype": FP32}, 22, 2),
        (BF16, {"state_dtype": FP32, "master_weights": "float32"}, 28, 2),
        (BF16, {"state_dtype": FP32, "master_weights": "split"}, 26, 2),
        (BF16, {}, 14, 2),
        (BF16, {"state_dtype": FP32, "stochastic_rounding": True}, 22, 2),
        (FP32, {}, 28, 4),
        (FP32, {"amsgrad": True}, 36, 4),
    ],
    ids=str,
)
def test_bytes_a_parameter(moved, dtype, options, update, clip):
    """Each tensor is read once, and what changes is written once; a clip reads the gradients once more."""
    n = CHUNK + 77
    p = nn.Parameter(torch.randn(n).to(dtype))
    train(AdamW([p], max_grad_norm=1.0, impl="triton", **options), [p], [[torch.randn(n)]])
    last = moved["_sum_of_squares_kernel"] - clip * n  # the programs' sums, added up by the last
    assert moved["_update_kernel"] == update * n
    assert 0 < last <= 8 * triton_impl._NORM_PROGRAMS


# ---- tables


@pytest.fixture
def sends(monkeypatch):
    """Counts how often addresses are sent."""
    counts, send = [], tables.Tables._send

    def counting(self, *rest):
        counts.append(self)
        send(self, *rest)

    monkeypatch.setattr(tables.Tables, "_send", counting)
    return counts


def test_addresses_are_sent_again_only_where_one_has_changed(sends):
    params = parameters()
    optimizer = AdamW(params, max_grad_norm=1.0, impl="triton")
    for p in params:
        p.grad = torch.randn_like(p)
    for _ in range(3):
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.9
    assert len(sends) == 1
    kept = params[1].grad
    params[1].grad = torch.randn_like(params[1])
    for _ in range(2):
        optimizer.step()
    assert len(sends) == 2
    assert sends[0] is sends[1]
    del kept


def _late_gradient(optimizer, params):
    params[2].grad = None


def _state_replaced(optimizer, params):
    state = optimizer.state[params[0]]
    state["exp_avg"] = state["exp_avg"].clone()


def _state_moved(optimizer, params):
    """As those do who park an optimiser on the host."""
    for state in optimizer.state.values():
        for name in MOMENTS:
            if name in state:
                state[name].data = state[name].data.clone()


def _state_emptied(optimizer, params):
    optimizer.state.clear()


def _parameters_moved(optimizer, params):
    for p in params:
        p.data = p.data.clone()


def _transposed(optimizer, params):
    params[0].data = params[0].data.t().contiguous().t()


def _same_memory_transposed(optimizer, params):
    params[0].data = params[0].data.t().contiguous().t()
    optimizer.step()
    data = params[0].data
    params[0].data = torch.as_strided(data, (5, 7), (7, 1)).t()  # one stretch of memory, then another order
    params[0].data = torch.as_strided(data, (7, 5), (5, 1))


def _amsgrad(optimizer, params):
    optimizer.param_groups[0]["amsgrad"] = True


def _nothing(optimizer, params):
    pass


EVENTS = [
    _nothing,
    _late_gradient,
    _state_replaced,
    _state_moved,
    _state_emptied,
    _parameters_moved,
    _transposed,
    _same_memory_transposed,
    _amsgrad,
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda f: f.__name__.strip("_").replace("_", " "))
def test_whatever_happens_between_steps_the_next_one_is_right(event):
    """The twin takes parameters and state as they stand before the step."""
    params = [nn.Parameter(torch.randn(shape)) for shape in ((7, 5), (5,), (3, 2, 4))]
    optimizer = AdamW(params, lr=1e-2, impl="triton")
    for _ in range(2):
        train(optimizer, params, [[torch.randn(p.shape) for p in params]])
    event(optimizer, params)
    for _ in range(2):
        live = [p for i, p in enumerate(params) if event is not _late_gradient or i != 2]
        others = [p for p in params if all(p is not q for q in live)]
        for p in others:
            p.grad = None
        check_bits(optimizer, live, [torch.randn(p.shape) for p in live])


def test_parameters_and_groups_may_come_later():
    first, second = (nn.Parameter(torch.randn(9)) for _ in range(2))
    optimizer = AdamW([first], impl="triton")
    check_bits(optimizer, [first], [torch.randn(9)])
    optimizer.add_param_group({"params": [second]})
    check_bits(optimizer, [first, second], [torch.randn(9), torch.randn(9)])


def test_the_tables_keep_no_tensor_of_the_state_alive():
    p = nn.Parameter(torch.randn(4))
    optimizer = AdamW([p], impl="triton")
    train(optimizer, [p], [[torch.randn(4)]])
    gone = []
    weakref.finalize(optimizer.state[p]["exp_avg"], gone.append, True)
    optimizer.state[p]["exp_avg"] = None
    assert gone == [True]


def test_rates_that_are_tensors_are_read_at_each_step():
    params = parameters()
    lr, betas = torch.tensor(1e-2), (torch.tensor(0.8), torch.tensor(0.95, dtype=torch.float64))
    optimizer = AdamW(params, lr=lr, betas=betas, capturable=True, impl="triton")
    for rate in (1e-2, 3e-3, 0.0):
        lr.fill_(rate)
        before, known = twins(params), [dict(optimizer.state.get(p, {})) for p in params]
        known = [
            {"t": float(s["step"])} | {m: s[name].double().numpy() for name, m in MOMENTS.items() if name in s}
            if s
            else {}
            for s in known
        ]
        grads = [torch.randn(p.shape) for p in params]
        ref, _ = oracle(before, [grads], optimizer.param_groups, known)
        train(optimizer, params, [grads])
        for p, r in zip(params, ref, strict=True):
            check("parameter", p, r, r)


def test_more_elements_than_an_int32_counts():
    """Memory that nobody touches costs nothing: of 2³¹ + 3 elements only the last chunk is updated."""
    n = 2**31 + 3

    def lazily():
        return torch.from_numpy(np.zeros(n, np.int16)).view(BF16)

    p = nn.Parameter(lazily())
    p.grad = lazily()
    tail = slice(n - n % CHUNK, n)
    small = [torch.randn(n % CHUNK).bfloat16() for _ in range(2)]
    p.detach()[tail], p.grad[tail] = small[0], small[1]
    optimizer = AdamW([p], lr=1e-2, stochastic_rounding=True, max_grad_norm=1e9, impl="triton")
    optimizer.state[p] = {"step": torch.zeros(()), "exp_avg": lazily(), "exp_avg_sq": lazily()}
    optimizer._tables = found = tables.Tables(optimizer, triton_impl._NORM_PROGRAMS)
    ((kind, first, chunks),) = found.launches
    assert (first, chunks) == (0, -(-n // CHUNK))
    found.launches = [tables.Launch(kind, chunks - 1, 1)]
    found.done.fill_(chunks - 1)
    triton_impl.step(optimizer)

    theta, m, v, _ = twin.update(
        small[0].float().numpy(),
        small[1].float().numpy(),
        *(np.zeros(n % CHUNK, np.float32) for _ in range(2)),
        step=0,
        lr=1e-2,
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        weight_decay=0.1,
    )
    bits = twin.round_stochastically(theta, twin.random_bits(np.arange(n - n % CHUNK, n), seed=0, t=1, index=0))
    assert same_bits(p.detach()[tail].view(torch.int16), torch.from_numpy(bits.view(np.int16)))
    assert same_bits(optimizer.state[p]["exp_avg"][tail], torch.from_numpy(m).bfloat16())
    assert same_bits(optimizer.state[p]["exp_avg_sq"][tail], torch.from_numpy(v).bfloat16())
    assert not p.detach()[: 4 * CHUNK].any()
    assert optimizer.state[p]["step"] == 1
    check("norm", optimizer.last_grad_norm, small[1].double().norm(), small[1].float().norm())


def test_a_thousand_steps_follow_the_oracle():
    torch.manual_seed(2)
    p = nn.Parameter(torch.randn(40))
    other = nn.Parameter(p.detach().clone())
    steps = [[torch.randn(40) + 0.3] for _ in range(1000)]
    optimizer = AdamW([p], lr=1e-3, betas=(0.9, 0.95), impl="triton")
    ref, states = oracle([p], steps, optimizer.param_groups)
    train(optimizer, [p], steps)
    eager = torch.optim.AdamW([other], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    train(eager, [other], steps)
    check("parameters", p, ref[0], other)
    for name, symbol in (("exp_avg", "m"), ("exp_avg_sq", "v")):
        check(name, optimizer.state[p][name], states[0][symbol], eager.state[other][name])
    assert optimizer.state[p]["step"] == 1000


# ---- statistics


@IMPLS
def test_statistics_are_those_of_the_last_step(impl):
    start = [torch.ones(300), torch.full((2000,), 2.0), torch.randn(7)]
    params = [nn.Parameter(x.bfloat16()) for x in start]
    groups = [{"params": params[:1], "lr": 1e-4}, {"params": params[1:], "lr": 0.5, "weight_decay": 0.0}]
    optimizer = AdamW(groups, state_dtype=FP32, update_stats=True, skip_nonfinite=True, impl=impl)
    assert optimizer.update_statistics() is None
    before = [p.detach().double() for p in params]
    grads = [torch.randn(x.shape).bfloat16() for x in start]
    train(optimizer, params, [grads])
    found = optimizer.update_statistics()

    ref = oracle([b.bfloat16() for b in before], [grads], optimizer.param_groups)[0]
    for i, rows in enumerate(([0], [1, 2])):
        update = torch.cat([(ref[j] - before[j]).flatten() for j in rows]).norm()
        weight = torch.cat([before[j].flatten() for j in rows]).norm()
        check("update_to_weight", found.update_to_weight[i].float(), update / weight, (update / weight).float())
    away = torch.cat([p.detach().double() == b for p, b in zip(params[1:], before[1:], strict=True)]).double().mean()
    assert found.rounded_away.tolist() == [1.0, away.item()]
    assert away < 0.01
    assert found.skipped_steps == 0

    grads[0][0] = float("nan")
    train(optimizer, params, [grads])
    after = optimizer.update_statistics()
    assert same_bits(after[:2], found[:2])
    assert (after.skipped_steps, found.skipped_steps) == (1, 0)


@IMPLS
@pytest.mark.parametrize("master", ["float32", "split"])
def test_what_a_master_keeps_is_not_rounded_away(master, impl):
    p = nn.Parameter(torch.ones(50).bfloat16())
    optimizer = AdamW([p], lr=1e-4, master_weights=master, update_stats=True, impl=impl)
    train(optimizer, [p], [[torch.ones(50)]])
    assert optimizer.update_statistics().rounded_away.tolist() == [0.0]
    assert (p == 1).all()


def test_statistics_that_nobody_asked_for_are_refused():
    with pytest.raises(ValueError, match="update_stats=True"):
        AdamW(parameters()).update_statistics()
    with pytest.raises(ValueError, match="update_stats"):
        AdamW(parameters(), update_stats=True, foreach=True)


# ---- what is left to torch


@pytest.fixture
def _as_on_a_gpu(monkeypatch):
    """``"auto"`` takes Triton where it runs, also interpreted."""
    monkeypatch.setattr(_backend, "_why_no_triton", lambda device, interpreted: None)


UNFIT = {
    "float64": lambda: ([nn.Parameter(torch.randn(3, dtype=torch.float64))], {}),
    "complex": lambda: ([nn.Parameter(torch.randn(3, dtype=torch.complex64))], {}),
    "moments": lambda: ([nn.Parameter(torch.randn(3))], {"state_dtype": torch.float64}),
    "gaps": lambda: ([nn.Parameter(torch.randn(3, 4)[:, ::2])], {}),
    "row-major": lambda: ([nn.Parameter(torch.randn(3, 4).bfloat16().t())], {"stochastic_rounding": True}),
}


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("unfit", UNFIT)
def test_auto_takes_torch_where_triton_cannot(unfit, launches):
    torch.manual_seed(0)
    params, options = UNFIT[unfit]()
    mine, other = params, [nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in params]
    grads = [torch.randn_like(p.detach()) for p in params]
    train(AdamW(mine, **options), mine, [grads] * 2)
    assert not launches
    train(AdamW(other, impl="torch", **options), other, [grads] * 2)
    assert same_bits([p.detach() for p in mine], [p.detach() for p in other])
    params, options = UNFIT[unfit]()
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(Unavailable, match=r"impl='triton'.*torch's own code"):
        AdamW(params, impl="triton", **options).step()


def test_differentiable_steps_are_torchs():
    p = torch.randn(3)
    p.grad = torch.ones(3)
    with pytest.raises(Unavailable, match="differentiable"):
        AdamW([p], differentiable=True, impl="triton").step()


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_auto_takes_triton_where_it_can(launches):
    params = parameters()
    train(AdamW(params), params, gradients(1))
    assert launches["_update_kernel"] == 1
    params = parameters()
    train(AdamW(params, fused=True), params, gradients(1))
    train(AdamW([{"params": params, "foreach": True}]), params, gradients(1))
    assert launches["_update_kernel"] == 1


def test_flags_of_torchs_are_refused_in_a_group_beside_a_kernel():
    with pytest.raises(ValueError, match="foreach"):
        AdamW([{"params": parameters(), "foreach": True}], impl="triton")


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_a_step_by_triton_and_one_by_torch_may_follow_each_other():
    params, steps = parameters(BF16), gradients(4, BF16)
    mine, other = twins(params), twins(params)
    options = {**HYPER, "master_weights": "split", "state_dtype": FP32}
    optimizer, reference = AdamW(in_two_groups(mine), **options), AdamW(in_two_groups(other), **options, impl="triton")
    for i, grads in enumerate(steps):
        optimizer._impl = ("triton", "torch")[i % 2]
        train(optimizer, mine, [grads])
        train(reference, other, [grads])
    for (_, states), (_, theirs) in ((snapshot(optimizer), snapshot(reference)),):
        for ours, other_state in zip(states, theirs, strict=True):
            assert ours["step"] == other_state["step"] == 4
            for name in ("exp_avg", "exp_avg_sq"):
                assert same_bits(ours[name], other_state[name])


# ---- new options


@pytest.mark.parametrize(
    ("dtype", "options", "match"),
    [
        (torch.float16, {"master_weights": "split"}, "master_weights.*bf16.*float16"),
        (torch.float16, {"stochastic_rounding": True}, "stochastic_rounding.*float16"),
        (BF16, {"stochastic_rounding": True, "master_weights": "split"}, "stochastic_rounding.*master"),
        (BF16, {"stochastic_rounding": True, "foreach": True}, "foreach.*stochastic_rounding"),
        (BF16, {"master_weights": "half"}, "master_weights.*split"),
        (BF16, {"stochastic_rounding": True, "differentiable": True}, "differentiable.*stochastic_rounding"),
    ],
    ids=str,
)
def test_a_bad_option_is_named(dtype, options, match):
    with pytest.raises(ValueError, match=match):
        AdamW(parameters(dtype), **options)


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5])
def test_a_bad_seed_is_named(seed):
    with pytest.raises(ValueError, match="seed"):
        AdamW([{"params": parameters(BF16), "seed": seed}], stochastic_rounding=True)
