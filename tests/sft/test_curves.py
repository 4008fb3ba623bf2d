"""The page of curves: every kind of run draws, and what is drawn is what was measured."""

import io
import math
import time
from pathlib import Path

import numpy as np
import pytest

from sft_kernels.sft.course import Course
from sft_kernels.sft.curves import draw, short


def row(step, **more):
    numbers = {"loss": 2.0 + math.sin(step), "lr": 1e-3, "grad_norm": 1.5 + math.cos(step)}
    return {"step": step, **numbers, "tokens": 100, "padding": 10, "kept": 20, "skipped_steps": 0, **more}


def course(count=3, score=0.5, **more):
    evaluations = [{"step": step, "eval": {"loss": 1.0}} for step in (0, count)]
    for found in evaluations if score is not None else ():
        found["eval"] |= {"metric": "exact_match", "score": score}
    speed = [{"step": step, "steps": 1, "seconds": 2.0, "kept": 20, "tokens": 100} for step in range(1, count + 1)]
    given = {
        "steps": [row(step) for step in range(1, count + 1)],
        "evaluations": evaluations,
        "speed": speed,
        "out": Path(),
        "total": count,
        "clip": 1.0,
        "best": None,
    }
    return Course(**{**given, **more})


@pytest.fixture
def drawn(monkeypatch):
    """Draws a course, or only lays the page out; returns its panels by title."""
    from matplotlib.figure import Figure

    figures, real = [], Figure.savefig

    def panels(course, save=True):
        def saved(figure, file, **options):
            figures.append(figure)
            if save:
                real(figure, file, **options)
                assert file.getvalue().startswith(b"\x89PNG")

        monkeypatch.setattr(Figure, "savefig", saved)
        draw(course, io.BytesIO(), dpi=50)
        return {axis.get_title("left"): axis for axis in figures[-1].axes}

    return panels


def lines(axis):
    return {line.get_label(): line.get_xydata().tolist() for line in axis.lines}


def test_six_panels_show_what_was_measured(drawn):
    best = {"step": 3, "by": "exact_match", "value": 0.5, "loss": 1.0}
    panels = drawn(course(best=best), save=False)
    loss, metric, lr, norm, share, rate = panels.values()
    assert [*panels] == [
        "masked loss, nats a token", "exact_match, held out", "learning rate", "gradient norm", "share of the tokens",
        "tokens per second",
    ]  # fmt: skip
    steps = [row(step) for step in (1, 2, 3)]
    assert lines(loss) == {"train": [[r["step"], r["loss"]] for r in steps], "held out": [[0, 1.0], [3, 1.0]]}
    assert [*lines(metric).values()] == [[[0, 0.5], [3, 0.5]], [[3, 0.5]]]
    assert "best: 0.5 at step 3" in lines(metric)
    assert [[r["step"], r["lr"]] for r in steps] in lines(lr).values()
    assert [[r["step"], r["grad_norm"]] for r in steps] in lines(norm).values()
    assert lines(norm)["clipped to 1"] == [[0.0, 1.0], [1.0, 1.0]]  # from edge to edge
    assert lines(share) == {"carry loss": [[n, 0.2] for n in (1, 2, 3)], "padding": [[n, 0.1] for n in (1, 2, 3)]}
    assert lines(rate) == {"all": [[n, 50.0] for n in (1, 2, 3)], "kept": [[n, 10.0] for n in (1, 2, 3)]}


@pytest.mark.parametrize(
    "given",
    [
        {"count": 1, "clip": None},
        {"score": None, "evaluations": [], "speed": []},
        {"score": None, "best": {"step": 3, "by": "masked loss", "value": 1.0, "loss": 1.0}, "clip": 1e9},
        {"steps": [row(1, loss=None, grad_norm=math.inf, skipped=["a:1"]), row(2, loss=math.nan, grad_norm=None)]},
        {
            "steps": [row(1, grad_norm=0.0), row(2, grad_norm=1e9), row(3, grad_norm=1e-9)],
            "speed": [{"step": 1, "steps": 1, "seconds": 0.0, "kept": 1, "tokens": 1}],
        },
        {
            "steps": [row(1, tokens=0, kept=0), {k: v for k, v in row(2).items() if k != "padding"}, row(3)],
            "evaluations": [{"step": 1, "eval": {"loss": None, "metric": "m" * 200, "score": math.nan}}],
            "total": 9,
        },
    ],
    ids=range(6),
)
@pytest.mark.filterwarnings("error")
def test_every_run_draws(given, drawn):
    """One step, no metric, no times, numbers that are not finite, norms of any size, logs of other versions."""
    panels = drawn(course(**given))
    assert len(panels) == (6 if course(**given).metric else 5)


@pytest.mark.filterwarnings("error")
def test_a_long_run_is_thinned_out_and_says_so(drawn):
    count = 100_000
    steps = [row(step, loss=None if step == 7 else float(step % 10)) for step in range(1, count + 1)]
    began = time.process_time()
    panels = drawn(course(count, steps=steps))
    assert time.process_time() - began < 2
    loss = panels["masked loss, nats a token"]
    points = np.array(lines(loss)["train, means of 1000"])
    assert points.shape == (100, 2)
    assert points[:, 0].tolist() == [500.5 + 1000 * n for n in range(100)]
    assert points[1:, 1].tolist() == [4.5] * 99
    assert points[0, 1] == pytest.approx((4500 - 7) / 999)
    low, high = (loss.collections[0].get_paths()[0].get_extents().get_points()[i][1] for i in (0, 1))
    assert (low, high) == (0.0, 9.0)
    assert len(lines(panels["learning rate"])["one step of 1000"]) == 101


def test_the_gradient_norm_has_a_log_scale_if_it_goes_far(drawn):
    scales = []
    for norms in ((1.0, 2.0), (1.0, 20.0)):
        found = course(steps=[row(n, grad_norm=norm) for n, norm in enumerate(norms, 1)])
        scales.append(drawn(found, save=False)["gradient norm"].get_yscale())
    assert scales == ["linear", "log"]


def test_drawing_leaves_the_settings_of_the_process():
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw(course(1), io.BytesIO(), dpi=30, trial=True)
    assert dict(matplotlib.rcParams) == before


def test_a_count_is_short():
    numbers = (0, 7, 999, 999.6, 1234, 999_600, 36_460_000, 2e9, 5e12)
    assert [short(n) for n in numbers] == ["0", "7", "999", "1 k", "1.23 k", "1 M", "36.5 M", "2 G", "5 T"]
