"""``AdamW`` over whatever hypothesis finds: shapes, layouts, dtypes, groups, missing gradients, options."""

from typing import NamedTuple

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from sft_kernels import AdamW

from .adamw import BAD, check_step, snapshot, train
from .helpers import same_bits

# The same examples on every machine. What the fixtures do for a test they need not do again for each example.
FUZZ = settings(
    derandomize=True,
    deadline=None,
    max_examples=100,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(), (0,), (0, 3), (1,), (1, 1, 1), (2,), (7,), (33,), (3, 5), (13, 17), (2, 3, 5), (1025,)]


def backwards(x):
    return x.permute(tuple(reversed(range(x.dim()))))


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: backwards(backwards(x).contiguous()),
    "every other": lambda x: torch.stack([x, x.new_full(x.shape, 77)], -1)[..., 0],
}


class Case(NamedTuple):
    dtype: torch.dtype
    params: list  # of shape, layout, and layout of the gradient
    cut: int  # where the second group begins
    given: list  # by step: which gradients there are
    options: dict
    seed: int

    def build(self):
        """Groups, parameters and gradients by step: the same ones each time."""
        generator = torch.Generator().manual_seed(self.seed)

        # The budget is relative to a result. So that nothing cancels in a tensor of one element, parameters stand far
        # from zero, and the gradients of an element have the same sign at every step.
        def values(shape, layout, shift=0.0):
            signs = torch.ones(shape).flatten().index_fill(0, torch.arange(0, torch.Size(shape).numel(), 2), -1)
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64).abs() + shift
            return LAYOUTS[layout]((drawn * signs.view(shape)).to(self.dtype))

        params = [nn.Parameter(values(shape, layout, shift=2.0)) for shape, layout, _ in self.params]
        steps = [
            [values(shape, layout) if here else None for (shape, _, layout), here in zip(self.params, row, strict=True)]
            for row in self.given
        ]
        groups = [{"params": params[: self.cut]}, {"params": params[self.cut :], "lr": 0.1, "weight_decay": 0.0}]
        return groups, params, steps

    def optimizer(self, groups, **options):
        return AdamW(groups, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3, **self.options, **options)


@st.composite
def cases(draw):
    options = draw(st.sampled_from([{}, {}, {"foreach": True}, {"foreach": False}, {"impl": "triton"}]))
    triton = "impl" in options  # which leaves float64, and parameters with gaps, to torch
    layouts = [*LAYOUTS]
    layout, dtype = st.sampled_from(layouts[: 2 if triton else 3]), st.sampled_from(DTYPES[: 3 if triton else 4])
    params = draw(
        st.lists(st.tuples(st.sampled_from(SHAPES), layout, st.sampled_from(layouts)), min_size=1, max_size=4)
    )
    row = st.lists(st.booleans() | st.just(True), min_size=len(params), max_size=len(params))
    if not options.get("foreach"):
        options = options | draw(st.sampled_from([{}, {"master_weights": "float32"}]))
        options = options | draw(st.just({}) | st.builds(lambda dtype: {"state_dtype": dtype}, dtype))
    return Case(
        dtype=draw(dtype),
        params=params,
        cut=draw(st.integers(0, len(params))),
        given=draw(st.lists(row, min_size=1, max_size=3)),
        options=options | {"amsgrad": draw(st.booleans()), "maximize": draw(st.booleans())},
        seed=draw(st.integers(0, 2**16)),
    )


CLIPS = st.sampled_from([None, 0.5, 1e6, float("inf")])


@FUZZ
@given(cases(), CLIPS, st.booleans())
def test_every_step_is_the_oracles(case, max_grad_norm, skip_nonfinite):
    groups, _, steps = case.build()
    optimizer = case.optimizer(groups, max_grad_norm=max_grad_norm, skip_nonfinite=skip_nonfinite)
    for grads in steps:
        check_step(optimizer, grads)
    assert optimizer.skipped_steps == 0


@FUZZ
@given(cases(), CLIPS)
def test_same_inputs_same_bits(case, max_grad_norm):
    results = []
    for _ in range(2):
        groups, params, steps = case.build()
        optimizer = case.optimizer(groups, max_grad_norm=max_grad_norm)
        train(optimizer, params, steps)
        results.append((snapshot(optimizer), [p.grad for p in params], optimizer.last_grad_norm))
    assert same_bits(*results)


@FUZZ
@given(cases(), st.sampled_from([None, float("inf")]))
def test_one_optimiser_over_two_groups_is_two_optimisers(case, max_grad_norm):
    assume(0 < case.cut < len(case.params))
    groups, params, steps = case.build()
    whole = case.optimizer(groups, max_grad_norm=max_grad_norm)
    train(whole, params, steps)

    groups, params, steps = case.build()
    parts = [case.optimizer([group], max_grad_norm=max_grad_norm) for group in groups]
    train(parts[0], params[: case.cut], [grads[: case.cut] for grads in steps])
    train(parts[1], params[case.cut :], [grads[case.cut :] for grads in steps])
    assert same_bits(snapshot(whole), [a + b for a, b in zip(*map(snapshot, parts), strict=True)])


@FUZZ
@given(cases(), CLIPS, st.sampled_from(BAD), st.data())
def test_a_skipped_step_leaves_everything_as_it_was(case, max_grad_norm, bad, data):
    groups, params, steps = case.build()
    optimizer = case.optimizer(groups, max_grad_norm=max_grad_norm, skip_nonfinite=True)
    train(optimizer, params, steps)
    before = snapshot(optimizer)
    poisoned = list(steps[0])
    at = data.draw(st.sampled_from([i for i, g in enumerate(poisoned) if g is not None and g.numel()] or [None]))
    assume(at is not None)
    values = poisoned[at].flatten()  # a copy where it is not contiguous
    poisoned[at] = values.index_fill(0, data.draw(st.integers(0, values.numel() - 1).map(torch.tensor)), bad).view(
        poisoned[at].shape
    )
    had_state = {i for i, p in enumerate(params) if p in optimizer.state}
    train(optimizer, params, [poisoned])
    after = snapshot(optimizer)
    assert same_bits(after[0], before[0])
    states = [optimizer.state[p] for i, p in enumerate(params) if i in had_state]
    assert same_bits(states, before[1])
    assert all(
        optimizer.state[p]["step"] == 0 for i, p in enumerate(params) if i not in had_state and p in optimizer.state
    )
    assert optimizer.skipped_steps == 1
    assert not optimizer.last_grad_norm.isfinite()
