import math

import pytest
import torch

from sft_kernels import AdamW
from sft_kernels.sft import guards
from sft_kernels.sft import run as running
from sft_kernels.sft import train as training
from sft_kernels.sft.guards import Guard, TooManySkips, Watch, check_learning_rate
from sft_kernels.sft.lr import cosine_factor
from sft_kernels.sft.train import train

from .small import loaded, model_of, recipe_in, rows_of, same_weights

NAN = float("nan")


@pytest.fixture
def spoil(monkeypatch):
    """Multiplies the losses of micro-batches, counted from 1, by ``factors``."""

    def spoil(factors):
        loss, calls = running.linear_cross_entropy, []

        def spoilt(*args, **kwargs):
            calls.append(None)
            return loss(*args, **kwargs) * factors.get(len(calls), 1.0)

        monkeypatch.setattr(running, "linear_cross_entropy", spoilt)

    return spoil


@pytest.fixture
def run(tmp_path, tokenizer):
    class Run:
        out = tmp_path / "run"

        def __call__(self, **options):
            self.model = model_of(len(tokenizer))
            _, _, log = train(recipe_in(tmp_path, **options), model=self.model, tokenizer=tokenizer)
            return log

        def steps(self):
            return [row for row in rows_of(self.out) if "loss" in row]

    return Run()


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_step_that_is_not_finite_is_skipped_and_its_examples_are_named(log_every, run, spoil, tmp_path, capsys):
    spoil({5: NAN})  # the first micro-batch of step 3
    run(steps=5, accumulate=2, log_every=log_every)
    rows = run.steps()
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1]
    assert [row["step"] for row in rows if "skipped" in row] == [3]
    named = rows[2]["skipped"]
    assert len(named) == rows[2]["examples"]
    assert all(source.startswith(f"{tmp_path}/chats.jsonl:") for source in named)
    said = capsys.readouterr()
    assert f"warning: step 3 is skipped: its gradient norm is not finite; examples {', '.join(named)}\n" in said.err
    assert "5, of them 1 skipped" in said.out


def test_the_named_examples_are_those_of_the_step(run, spoil, monkeypatch):
    seen, collate = [], running.collate
    monkeypatch.setattr(running, "collate", lambda rows, *args: seen.append(rows) or collate(rows, *args))
    spoil({3: NAN})
    run(steps=3)
    _, _, third = seen[-3:]
    assert run.steps()[2]["skipped"] == [example.source for row in third for example in row]


def test_a_skipped_step_leaves_weights_and_moments(run, spoil):
    """The same run without the step gives the same weights, up to the schedule: here lr is constant."""
    spoil({2: NAN})
    run(steps=2, warmup=0, lr=1e-2)
    skipped = run.model
    spoil({})
    run(steps=1, warmup=0, lr=1e-2, out=str(run.out) + "1")
    assert same_weights(skipped, run.model)


def stepped(guard, optimizer, norms):
    """Step with gradients of these norms; returns which steps were skipped."""
    (p,) = optimizer.param_groups[0]["params"]
    skipped = []
    for number, norm in enumerate(norms, start=1):
        before = p.detach().clone()
        p.grad = torch.full_like(p, norm / 2)  # of four elements
        guard.step(number)
        skipped.append(bool(p.detach().equal(before)))
    return skipped


@pytest.fixture
def optimizer():
    p = torch.nn.Parameter(torch.ones(4))
    return AdamW([p], lr=1e-2, max_grad_norm=1.0, skip_nonfinite=True)


def test_a_spike_is_skipped_once_the_median_is_known(optimizer):
    guard = Guard(optimizer, spike=3.0, most=100)
    norms = [50.0, *[1.0, 2.0] * 4, 4.6, 4.4, NAN, 100.0, 1.0]
    # Of nine norms the median is 2, but 4.4 lies below three times it; before the eighth nothing is a spike.
    assert stepped(guard, optimizer, norms) == [False] * 9 + [False, False, True, True, False]
    guard = Guard(optimizer, spike=2.0, most=100)
    assert stepped(guard, optimizer, [1.0] * 7 + [9.0, 9.0, 1.9]) == [False] * 7 + [False, True, False]
    assert int(optimizer.skipped_steps) == 3


def test_a_spike_does_not_move_the_median(optimizer):
    guard = Guard(optimizer, spike=2.0, most=1000)
    assert stepped(guard, optimizer, [1.0] * 8 + [10.0] * 100 + [1.5]) == [False] * 8 + [True] * 100 + [False]


def test_steps_without_a_gradient_do_not_count(optimizer):
    guard = Guard(optimizer, spike=2.0, most=1000)
    assert not any(stepped(guard, optimizer, [0.0] * 20 + [1.0] * 4 + [0.0] * 9 + [5.0] + [1.0] * 4)[20:24])
    assert int(optimizer.skipped_steps) == 0
    # Of ten norms above 0 the median is 1.
    assert stepped(guard, optimizer, [2.1, 1.9]) == [True, False]


def test_the_norm_of_gradients_in_bf16_is_not_rounded_to_bf16():
    """2.009 is above twice the median of 1, and would be 2 in bf16."""
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    q = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = AdamW([p, q], lr=1e-2, max_grad_norm=1.0, skip_nonfinite=True)
    guard = Guard(optimizer, spike=2.0, most=1000)
    q.grad = torch.zeros_like(q)
    for number in range(1, 10):
        p.grad = torch.full_like(p, 0.5)
        guard.step(number)
    p.grad, q.grad = torch.ones_like(p), torch.full_like(q, 0.171875)
    guard.step(10)
    assert 2.0 < float(optimizer.last_grad_norm) < 2.01
    assert int(optimizer.skipped_steps) == 1


def test_the_median_forgets(optimizer):
    guard = Guard(optimizer, spike=2.0, most=1000)
    growing = [1.01**i for i in range(300)]  # by a factor of 20
    assert not any(stepped(guard, optimizer, growing))


def test_without_spike_no_finite_norm_is_skipped(optimizer):
    guard = Guard(optimizer, spike=0.0, most=100)
    assert not any(stepped(guard, optimizer, [1.0] * 20 + [1e6]))


def test_after_too_many_skips_everything_is_skipped_until_it_is_read(optimizer):
    guard = Guard(optimizer, spike=0.0, most=3)
    assert stepped(guard, optimizer, [1.0, NAN, NAN, 1.0, NAN, NAN, NAN, 1.0, 1.0]) == (
        [False, True, True, False, True, True, True, True, True]
    )
    guard.try_again()
    assert stepped(guard, optimizer, [1.0, NAN, 1.0]) == [False, True, False]


@pytest.mark.parametrize("log_every", [1, 5])
def test_too_many_skips_end_the_run_with_a_checkpoint_it_can_go_on_from(log_every, run, spoil, tmp_path, tokenizer):
    spoil({3: NAN, 5: NAN, 6: NAN, 7: NAN})
    with pytest.raises(TooManySkips, match=r"the last \d steps were skipped.*; --resume goes on from") as e:
        run(steps=12, max_skips=3, log_every=log_every, lr=1e-2)
    rows = rows_of(run.out)
    assert [row["skipped_steps"] for row in rows[:7]] == [0, 0, 1, 1, 2, 3, 4]
    last = 7 if log_every == 1 else 10
    assert rows[-1]["step"] == last
    assert rows[-1]["stopped"].startswith("the last")
    folder = run.out / "checkpoints" / f"step-{last}"
    assert str(folder) in str(e.value)
    held = loaded(folder / "model")
    assert same_weights(held, run.model)
    spoil({})
    recipe = recipe_in(tmp_path, steps=12, max_skips=3, log_every=log_every, lr=1e-2, resume=True)
    model, _, _ = train(recipe, model=model_of(len(tokenizer)), tokenizer=tokenizer)
    assert [row["step"] for row in run.steps()] == [*range(1, 13)]
    assert run.steps()[-1]["skipped_steps"] == rows[last - 1]["skipped_steps"]
    assert not same_weights(held, model)


def test_too_many_skips_at_the_very_end_are_seen(run, spoil):
    spoil({3: NAN, 4: NAN})
    with pytest.raises(TooManySkips, match="the last 2 steps"):
        run(steps=4, max_skips=2, log_every=10)


def test_the_command_says_it_in_one_line(monkeypatch, capsys):
    from sft_kernels import cli

    def fail(recipe):
        raise TooManySkips("the last 3 steps were skipped")

    monkeypatch.setattr(training, "train", fail)
    assert cli.main(["train"]) == 1
    assert capsys.readouterr().err == "sft-kernels: the last 3 steps were skipped\n"


# ---- the loss and the learning rate


@pytest.mark.parametrize(
    ("losses", "asked"),
    [
        ({1: 3.0, 2: 0.49}, True),
        ({1: 0.2, 2: 0.51}, False),  # the first step's is the model's own, before any update
        ({20: 0.4}, True),
        ({21: 0.1}, False),
        ({2: NAN, 3: None}, False),
    ],
)
def test_a_loss_that_is_low_so_early_asks_about_the_mask_once(losses, asked, capsys):
    watch = Watch(10)
    for _ in range(2):
        for step, loss in losses.items():
            watch({"step": step, "loss": loss, "skipped_steps": 0, "grad_norm": 1.0}, [])
    assert capsys.readouterr().err.count("is the mask right?") == asked


def test_a_run_whose_loss_is_low_asks(run, monkeypatch, capsys):
    monkeypatch.setattr(guards, "_LOW_LOSS", 100.0)
    run(steps=4)
    assert capsys.readouterr().err.count("sft-kernels inspect shows which tokens carry loss") == 1


class Sized(torch.nn.Module):
    """A model of so many parameters, without their memory."""

    def __init__(self, *sizes):
        super().__init__()
        self.weights = torch.nn.ParameterList(
            torch.nn.Parameter(torch.empty(int(size), device="meta"), requires_grad=trained) for size, trained in sizes
        )


@pytest.mark.parametrize(
    ("sizes", "lr", "usual"),
    [
        ([(8e9, True)], 2e-5, None),
        ([(8e9, True)], 1e-3, "2e-06 to 3e-05"),
        ([(8e9, True)], 1e-7, "2e-06 to 3e-05"),
        ([(70e9, True)], 1e-5, None),
        ([(70e9, True)], 1e-4, "1e-06 to 2e-05"),
        ([(1.2e9, True)], 1e-3, "5e-06 to 3e-04"),
        ([(3.5e8, True)], 2e-3, "1e-05 to 1e-03"),
        ([(8e9, False), (2e7, True)], 2e-4, None),
        ([(8e9, False), (2e7, True)], 2e-3, "2e-05 to 3e-04"),
        ([(1e6, True)], 1.0, None),  # no model that the table speaks of
        ([(8e9, True)], 0.0, None),
    ],
)
def test_a_learning_rate_is_compared_with_the_table(sizes, lr, usual, capsys):
    check_learning_rate(lr, Sized(*sizes))
    said = capsys.readouterr().err
    if usual is None:
        assert said == ""
    else:
        assert said.startswith(f"warning: lr: {lr:.3g} is unusual for ")
        assert f"{usual} is usual (up to 1 B: 1e-05 to 1e-03; " in said


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("size", [1e9, 4e9, 2e10, 7e10])
def test_the_ends_of_the_table_are_usual(size, adapters, capsys):
    """As they are written, such as 3e-3, which is more than ten times 3e-4."""
    model = Sized((size * 0.99, False), (size * 0.01, True)) if adapters else Sized((size, True))
    for rate in next(rates for upper, *rates in guards.LEARNING_RATES if size <= upper):
        check_learning_rate(float(f"{rate * (10 if adapters else 1):.0e}"), model)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("accumulate", [1, 2, 5])
def test_the_logged_learning_rate_is_the_schedules_and_the_updates(accumulate, run, monkeypatch):
    """At every optimiser step, and it is the one that the update is made with."""
    used, step = [], guards.Guard.step

    def spied(self, number):
        used.append([group["lr"] for group in self.optimizer.param_groups])
        step(self, number)

    monkeypatch.setattr(guards.Guard, "step", spied)
    run(steps=10, warmup=0.2, lr=3e-4, accumulate=accumulate, log_every=3)
    logged = [row["lr"] for row in run.steps()]
    assert logged == [3e-4 * cosine_factor(t, 10, 2) for t in range(10)]
    assert used == [[lr, lr] for lr in logged]
    assert logged[:2] == [1.5e-4, 3e-4]
    assert math.isclose(logged[-1] / 3e-4, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 7 / 8)))
