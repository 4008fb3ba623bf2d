"""The reference comparison: ours against the plain PyTorch way."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from sft_kernels import cli
from sft_kernels.sft import compare as comparing
from sft_kernels.sft import compare_report, curves, memory
from sft_kernels.sft import model as models
from sft_kernels.sft import plain as plain_way
from sft_kernels.sft import run as running
from sft_kernels.sft.compare import OURS, PADDED, PLAIN, Clock, Comparison, Way, compare
from sft_kernels.sft.masking import IGNORE, Example
from sft_kernels.sft.plain import Padded, Plain, pad
from sft_kernels.sft.prepare import prepare
from sft_kernels.sft.recipe import Recipe
from sft_kernels.sft.report import RunLog
from sft_kernels.sft.run import Run
from sft_kernels.sft.train import train

from .conftest import chat

STEPS = 20


@pytest.fixture
def recipe(folder, write_jsonl, tmp_path):
    """Examples of many lengths, two micro-batches a step."""
    words = "red blue green look let me count the words here".split()
    rows = [chat(" ".join(words[: 1 + i % 9]), " ".join(words[: 1 + (3 * i) % 10])) for i in range(60)]
    return Recipe(
        data=[str(write_jsonl(*rows))],
        model=str(folder),
        out=str(tmp_path / "run"),
        row_tokens=96,
        rows=2,
        accumulate=2,
        steps=STEPS,
        lr=1e-2,
        precision="fp32",
        log_every=50,
    )


def permuted(seed):
    """The plain way with the examples of each batch in an order of its own."""

    class Permuted(Plain):
        def batch(self, rows):
            examples = [example for row in rows for example in row]
            random.Random(f"{seed}/{self.log.done}").shuffle(examples)
            return pad(examples, self.ready.pad_id, self.recipe.weigh == "examples")

    return Permuted


def weights_after(ready, kind, start, folder):
    """The weights after all steps, as one fp64 tensor."""
    ready.model.load_state_dict(start)
    run = kind(ready)
    run.log = RunLog(folder, STEPS, 50)
    attention = models.boundaries_given if kind is Run else models.stock_attention
    with attention(ready.model):
        ready.model.train()
        for step, micro_batches in run.steps.after(0):
            run.step(step, micro_batches)
    run.log.close()
    return weights_of(ready.model)


def weights_of(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


@pytest.mark.parametrize("weigh", ["tokens", "examples"])
def test_after_20_steps_ours_is_as_near_to_plain_pytorch_as_rounding_allows(weigh, recipe, tmp_path):
    """The measure is what the order of a batch's examples makes of plain PyTorch's own weights, at most, in three."""
    ready = prepare(replace(recipe, weigh=weigh))
    start, before = {k: t.clone() for k, t in ready.model.state_dict().items()}, weights_of(ready.model)

    def after(kind, name):
        return weights_after(ready, kind, start, tmp_path / name)

    plain = after(Plain, "plain")
    by_rounding = max((after(permuted(i), f"permuted-{i}") - plain).norm() for i in range(3))
    assert 0 < by_rounding < 1e-4 * (plain - before).norm()
    for kind in (Run, Padded):
        assert (after(kind, kind.__name__) - plain).norm() <= 3 * by_rounding


def test_both_runs_are_measured_and_told(recipe, capsys):
    found = compare(replace(recipe, steps=4, holdout=0.2, log_every=1))
    said = capsys.readouterr().out
    ours, padded, plain = (found.ways[name] for name in (OURS, PADDED, PLAIN))
    assert [len(way.losses) for way in (ours, padded, plain)] == [4, 4, 4]
    assert ours.kept == padded.kept == plain.kept
    assert ours.losses == pytest.approx(plain.losses, rel=1e-5)
    assert ours.held_out == pytest.approx(plain.held_out, rel=1e-5)
    assert padded.tokens == plain.tokens != ours.tokens
    for way in (ours, padded, plain):
        assert [t - p for t, p in zip(way.tokens, way.padding, strict=True)] == [
            t - p for t, p in zip(ours.tokens, ours.padding, strict=True)
        ]
        assert all(0 < inside < seconds for inside, seconds in zip(way.inside, way.seconds, strict=True))
        assert way.peak_bytes > 1e8  # of a process that has imported torch
    assert found.parts_at is None
    assert max(found.losses_apart + found.norms_apart) < 1e-5
    assert 0 < found.parameters_apart < 1e-3
    for words in ("packed against padded", "ours against plain", "own overhead", "losses do not part", "padding"):
        assert words in said
    folder = Path(recipe.out, "compare")
    written = json.loads((folder / "compare.json").read_text())
    assert written["ways"][PLAIN]["losses"] == plain.losses
    assert written["ours_against_plain"] == found.fused
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    for name in ("ours", "padded", "plain"):
        rows = [json.loads(line) for line in (folder / name / "train.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert not Path(recipe.out, "model").exists()
    with pytest.raises(FileExistsError, match="holds a run already"):
        compare(recipe)


def test_the_numbers_of_a_way_by_hand():
    """The first three steps warm up; ratios are over the steps that both have."""
    rest = {"tokens": [50] * 6, "padding": [10] * 6, "losses": [], "norms": [], "peak_bytes": None, "held_out": None}
    seconds, inside = [9.0, 9.0, 9.0, 2.0, 4.0, 5.0], [9.0, 9.0, 9.0, 1.5, 2.0, 4.0]
    ours = Way(OURS, seconds, inside, [40] * 6, **rest)
    padded = Way(PADDED, [9.0, 9.0, 9.0, 10.0], [9.0] * 4, [40] * 4, **rest)
    plain = Way(PLAIN, [9.0, 9.0, 9.0, 16.0, 16.0, 16.0], seconds, [40] * 6, **rest)
    found = Comparison({OURS: ours, PADDED: padded, PLAIN: plain}, [], [], 1e-3, None)
    assert (ours.step_seconds, ours.rate(), ours.rate(4)) == (4.0, 10.0, 20.0)
    assert (ours.overhead, ours.padding_share) == (0.25, 0.2)
    assert (found.packing, found.fused) == (5.0, 4.0)


def test_the_clock_adds_up_the_parts_of_a_step(monkeypatch):
    ticks = iter([0.0, 1.0, 3.0, 4.0, 9.0, 10.0, 10.0, 12.0, 13.0])
    monkeypatch.setattr(comparing.time, "perf_counter", lambda: next(ticks))
    clock = Clock(torch.device("cpu"))
    clock.start()
    for parts in (2, 1):
        for _ in range(parts):
            with clock("forward"):
                pass
        clock.lap()
    assert (clock.seconds, clock.inside) == ([10.0, 3.0], [7.0, 2.0])


def test_the_peak_is_that_since_it_was_forgotten():
    device = torch.device("cpu")
    large = torch.ones(1 << 25)
    high = memory.peak(device)
    del large
    memory.forget_peak(device)
    assert memory.peak(device) < high - (1 << 26)


def test_a_wrong_denominator_is_seen_at_once(recipe, monkeypatch, capsys):
    """Each micro-batch by its own kept tokens, as trainers had it for years. Losses of a fresh model hide it."""
    loss = running.linear_cross_entropy
    monkeypatch.setattr(running, "linear_cross_entropy", lambda *a, num_items, **o: loss(*a, **o) / 2)
    found = compare(replace(recipe, steps=3))
    assert found.parts_at in (1, 2)
    assert f"losses part in step {found.parts_at}" in capsys.readouterr().out


def test_losses_that_are_not_finite_part(recipe, monkeypatch):
    loss, calls = running.linear_cross_entropy, []

    def spoilt(*args, **options):
        calls.append(None)
        return loss(*args, **options) * (math.nan if len(calls) > 2 else 1)

    monkeypatch.setattr(running, "linear_cross_entropy", spoilt)
    found = compare(replace(recipe, steps=3))
    assert found.parts_at == 2
    text = Path(recipe.out, "compare", "compare.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["losses_apart"][1] is None


def test_a_way_that_runs_out_of_memory_is_told_and_the_others_stay(recipe, monkeypatch, capsys):
    def full(self, batch, num_items):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB")

    monkeypatch.setattr(Plain, "loss", full)
    found = compare(replace(recipe, steps=3))
    assert "Tried to allocate 64.00 GiB" in found.ways[PLAIN].failed
    assert found.packing > 0
    assert (found.fused, found.losses_apart, found.parts_at, found.parameters_apart) == (None, [], None, None)
    said = capsys.readouterr().out
    assert "ours against plain      –" in said
    assert "plain PyTorch: CUDA out of memory" in said
    assert Path(recipe.out, "compare", "compare.png").is_file()


def test_ours_may_run_out_of_memory_too(recipe, monkeypatch, tmp_path, capsys):
    """On a system that cannot measure a peak anew, none is told: it would be that of all before."""

    def full(self, batch, num_items):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Run, "loss", full)
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "no" / "clear_refs")
    found = compare(replace(recipe, steps=1))
    assert (found.packing, found.fused, found.parts_at, found.parameters_apart) == (None, None, None, None)
    assert len(found.ways[PLAIN].losses) == 1
    assert [way.peak_bytes for way in found.ways.values()] == [None] * 3
    assert "ours: CUDA out of memory" in capsys.readouterr().out
    assert Path(recipe.out, "compare", "compare.png").is_file()


def test_copies_of_the_weights_are_in_nobody_s_memory(recipe, monkeypatch, capsys):
    """Plain PyTorch comes last, when the comparison has two. With a learning rate of 0 they have no distance."""
    monkeypatch.setattr(memory, "peak", lambda device: 10**9)
    found = compare(replace(recipe, steps=1, lr=0.0))
    copy = sum(tensor.nbytes for tensor in prepare(replace(recipe, out=f"{recipe.out}-2")).model.state_dict().values())
    assert [10**9 - way.peak_bytes for way in found.ways.values()] == [copy, 2 * copy, 2 * copy]
    assert found.parameters_apart is None
    assert "the last weights" not in capsys.readouterr().out


def test_ours_is_the_run_that_train_makes(recipe):
    """Losses and held-out loss to the bit, in bf16, whose autocast belongs to evaluations, too."""
    recipe = replace(recipe, steps=2, holdout=0.2, precision="bf16", metric_prompts=0)
    ours = compare(recipe).ways[OURS]
    _, _, log = train(replace(recipe, out=f"{recipe.out}-2"))
    assert ours.losses == [row["loss"] for row in log.history if "loss" in row]
    assert ours.held_out == log.history[-2]["eval"]["loss"]


def test_plain_pytorch_is_not_made_to_copy_its_logits(recipe, monkeypatch):
    ready, loss, seen = prepare(recipe), plain_way.torch_cross_entropy, []
    monkeypatch.setattr(
        plain_way, "torch_cross_entropy", lambda flat, *a, **o: seen.append(flat) or loss(flat, *a, **o)
    )
    ready.model.register_forward_hook(lambda model, inputs, output: seen.append(output.logits))
    run = Plain(ready)
    run.loss(pad(ready.examples[:3], 0), 5)
    logits, given = seen
    assert given.data_ptr() == logits.data_ptr()
    assert given.shape == (logits.shape[0] * logits.shape[1], logits.shape[2])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("dropout", 0.1),
        ("eval_every", 5),
        ("metric", "package.score"),
        ("neftune_alpha", 5.0),
        ("parameters", "bf16+master"),
        ("resume", True),
        ("save_every", 5),
        ("spike", 5.0),
        ("tensorboard", True),
    ],
)
def test_what_one_of_the_two_has_not_is_refused_before_the_data_are_read(option, value, recipe):
    asked = replace(recipe, data=["nowhere.jsonl"], **{option: value})
    with pytest.raises(ValueError, match=f"^{option}: .*leave it out to compare"):
        compare(asked)


def test_the_command_compares(recipe, monkeypatch, capsys):
    """It draws no curves of a run, so it does not try to, either."""
    monkeypatch.setattr(curves, "draw", pytest.fail)
    argv = ["train", "--compare", "--model", recipe.model, "--data", *recipe.data, "--out", recipe.out]
    options = {"row-tokens": "96", "rows": "2", "steps": "2", "log-every": "2", "precision": "fp32"}
    assert cli.main([*argv, *(part for name, value in options.items() for part in (f"--{name}", value))]) == 0
    said = capsys.readouterr()
    assert "ours against plain" in said.out
    assert "curves.png" not in said.err
    assert not Path(recipe.out, "train.jsonl").exists()


@pytest.mark.parametrize(("steps", "marker"), [(1, "o"), (20, "o"), (21, "None")])
def test_few_steps_are_marked_in_the_picture(steps, marker):
    panel = Figure().subplots()
    compare_report._line(panel, [2.0] * steps)
    (line,) = panel.lines
    assert (line.get_marker(), [*line.get_xdata()]) == (marker, [*range(1, steps + 1)])


def test_padded_batches_hold_each_example_once(tokenizer):
    examples = [
        Example([1, 2, 3], [IGNORE, 2, 3], "a:1"),
        Example([4], [IGNORE], "a:2"),
        Example([5, 6], [IGNORE, 6], "a:3"),
    ]
    batch = pad(examples, 9)
    assert batch.input_ids.tolist() == [[1, 2, 3], [4, 9, 9], [5, 6, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch.labels.tolist() == [[IGNORE, 2, 3], [IGNORE] * 3, [IGNORE, 6, IGNORE]]
    assert (batch.kept.count, batch.examples, batch.rows, batch.tokens) == (3, 3, 3, 9)
    assert pad(examples[::2], 9, weigh_examples=True).token_weight.tolist() == [[0.5] * 3, [1.0] * 3]
