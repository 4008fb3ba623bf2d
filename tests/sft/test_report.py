import io
import json
import math
import re
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from sft_kernels.sft import curves, progress, report, speed
from sft_kernels.sft.evaluate import Loss
from sft_kernels.sft.report import RunLog

from .small import rows_of, strict


class Terminal(io.StringIO):
    def isatty(self):
        return True


def step(log, number, loss=1.0, **more):
    counts = {"examples": 1, "rows": 1, "tokens": 4, "padding": 1, "kept": 2}
    log.step(step=number, loss=torch.tensor(loss), lr=0.1, grad_norm=torch.tensor(loss), **counts, **more)


@pytest.fixture
def log(tmp_path):
    return RunLog(tmp_path, 4, 1)


def test_a_number_that_is_not_finite_is_null_in_the_file_and_itself_elsewhere(log, tmp_path, capsys):
    step(log, 1, math.nan)
    step(log, 2, math.inf)
    log.evaluation(2, Loss(math.nan, 0.5, -math.inf, 3)._asdict())
    log.close()
    first, second, held_out = rows_of(tmp_path)
    assert (first["loss"], second["loss"], second["grad_norm"]) == (None, None, None)
    assert held_out["eval"] == {"loss": None, "accuracy": 0.5, "entropy": None, "kept": 3}
    assert math.isnan(log.history[0]["loss"])
    assert "nan" in capsys.readouterr().out
    log.finish()
    assert (tmp_path / "curves.png").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_costs_no_run_and_loses_no_line_once_there_is_room(log, tmp_path, capsys):
    real = log.file.path
    step(log, 1)
    log.file.path = Path("/dev/full")
    step(log, 2)
    step(log, 3)
    said = capsys.readouterr().err
    assert said.count("could not be written") == 1
    assert "No space left" in said
    log.finish()
    assert "is missing" in capsys.readouterr().err
    log.file.path = real
    step(log, 4)
    log.close()
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4]


def test_a_write_cut_short_is_completed(log, tmp_path):
    class Short:
        """Takes seven bytes, then is full."""

        def __init__(self):
            self.room = 7

        def open(self, *args, **kwargs):
            return self

        def __enter__(self):
            self.file = (tmp_path / "train.jsonl").open("ab", buffering=0)
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, text):
            if not self.room:
                raise OSError(28, "No space left on device")
            taken, self.room = self.file.write(text[: self.room]), 0
            return taken

    real, log.file.path = log.file.path, Short()
    step(log, 1)
    log.file.path = real
    step(log, 2)
    log.close()
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2]


class Gone:
    def write(self, text):
        raise BrokenPipeError

    def flush(self):
        raise BrokenPipeError

    def isatty(self):
        return True


def test_a_screen_that_is_gone_costs_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    log = RunLog(tmp_path, 4, 1)
    assert not log.bar.disable
    monkeypatch.setattr(sys, "stdout", Gone())
    log.bar.fp = Gone()
    step(log, 1)
    log.evaluation(1, Loss(1.0, 0.5, 1.0, 3)._asdict())
    log.close()
    log.finish()
    assert len(rows_of(tmp_path)) == 2


def test_a_screen_that_is_gone_from_the_start_costs_no_run(tmp_path, monkeypatch):
    class Full(Gone):
        def flush(self):
            raise OSError(28, "No space left on device")

    for name, stream in (("gone", Gone()), ("full", Full()), ("none", None)):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        log = RunLog(tmp_path / name, 1, 1)
        step(log, 1)
        log.close()
        log.finish()
        assert len(rows_of(tmp_path / name)) == 1


def test_a_line_is_printed_beside_the_bar_on_any_screen(log, monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", screen)
    progress.say("\n\n· first\nsecond \x1b[2J\u202e")
    step(log, 1)
    progress.say("error", screen)
    first, *lines = screen.buffer.getvalue().decode("ascii").lstrip("\n").splitlines()
    assert screen.buffer.getvalue().startswith(b"\n\n\\xb7")
    assert first == r"\xb7 first second \x1b[2J\u202e"
    assert [line.split()[0] for line in lines] == ["1", "error"]


def test_the_bar_is_taken_away_while_a_line_is_printed(tmp_path, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    log = RunLog(tmp_path, 4, 1)
    progress.say("line")
    log.close()
    assert re.search(r"training .*\r +\r(\x1b\[A)*line\n", screen.getvalue(), re.DOTALL)


def test_the_reason_of_an_error_is_one_line_without_control_characters():
    assert report.reason_of(ValueError("a\n  b\x1b[2J\u2028")) == r"a b\x1b[2J"
    assert report.reason_of(OSError(28, "No space left on device")) == "No space left on device"


def test_curves_that_cannot_be_drawn_are_a_warning_before_the_first_step(tmp_path, monkeypatch, capsys):
    import matplotlib

    monkeypatch.setenv("PATH", "/nonexistent")  # no LaTeX
    with matplotlib.rc_context({"text.usetex": True}):
        log = RunLog(tmp_path, 1, 1)
    said = capsys.readouterr().err
    assert "warning: curves.png cannot be drawn" in said
    assert "Traceback" not in said
    step(log, 1)
    log.close()
    log.finish()
    assert not log.curves
    assert not (tmp_path / "curves.png").exists()


def test_curves_that_fail_at_the_end_are_a_warning(log, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("no\nink")

    step(log, 1)
    log.close()
    monkeypatch.setattr(curves, "draw", fail)
    log.finish()
    assert "warning: curves.png could not be drawn (no ink)" in capsys.readouterr().err
    assert not log.curves


def test_half_an_image_is_removed(log, tmp_path, monkeypatch, capsys):
    def full(path, image):
        with path.open("wb") as file:
            file.write(image[:9])
        raise OSError(28, "No space left on device")

    step(log, 1)
    log.close()
    monkeypatch.setattr(Path, "write_bytes", full)
    log.finish()
    assert "No space left" in capsys.readouterr().err
    assert not (tmp_path / "curves.png").exists()


def test_a_folder_in_the_place_of_the_curves_is_a_warning(tmp_path, capsys):
    (tmp_path / "curves.png").mkdir()
    assert not RunLog(tmp_path, 1, 1).curves
    assert "is a folder" in capsys.readouterr().err


def test_drawing_chooses_no_back_end_for_the_process(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"backend": "svg"}):
        RunLog(tmp_path, 1, 1)
        assert matplotlib.rcParams["backend"] == "svg"


def test_an_early_end_is_a_line_of_the_file(log, tmp_path):
    step(log, 1)
    log.ended("SIGTERM")
    assert rows_of(tmp_path)[-1] == {"step": 1, "of": 4, "stopped": "SIGTERM"}
    assert (log.done, log.total, log.stopped) == (1, 4, "SIGTERM")


# ---- the time


class Clock:
    """Stands for the clock: it goes on when it is told to."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(speed.time, "perf_counter", clock)
    return clock


def times_of(out):
    return [strict(line) for line in (out / "speed.jsonl").read_text().splitlines()]


def run(log, clock, steps, seconds):
    for number in steps:
        clock.now += seconds
        step(log, number)


def test_a_line_of_the_clock_has_the_time_of_its_steps_without_what_came_between(tmp_path, clock):
    log = RunLog(tmp_path, 9, 3)
    run(log, clock, range(1, 5), 0.5)
    with log.aside():  # in the middle of a line, which ends here
        clock.now += 1000
        log.evaluation(4, Loss(1.0, 0.5, 1.0, 3)._asdict())
    run(log, clock, range(5, 9), 0.25)
    with suppress(OSError), log.aside():
        clock.now += 1000
        raise OSError("full")
    run(log, clock, [9], 0.25)
    log.close()
    assert times_of(tmp_path) == log.speed.rows
    assert [tuple(row.values()) for row in log.speed.rows] == [
        (3, 3, 1.5, 6, 12),
        (4, 1, 0.5, 2, 4),
        (7, 3, 0.75, 6, 12),
        (8, 1, 0.25, 2, 4),
        (9, 1, 0.25, 2, 4),
    ]
    assert list(log.speed.rows[0]) == ["step", "steps", "seconds", "kept", "tokens"]


def test_the_time_left_is_that_of_the_last_lines_and_this_process(tmp_path, clock, capsys):
    earlier = json.dumps({"step": 1, "steps": 1, "seconds": 9e9, "kept": 2, "tokens": 4})
    (tmp_path / "speed.jsonl").write_text(earlier + "\n")
    log = RunLog(tmp_path, 1000, 2, keep=0, done=1)
    run(log, clock, range(2, 6), 60.0)
    run(log, clock, range(6, 26), 4.0)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[-2:] for row in rows[:3]] == [["kept/s", "left"], ["0", "16:37:00"], ["0", "16:35:00"]]
    assert rows[-1][-1] == "1:05:00"  # 975 steps of 4 seconds


def test_lines_of_the_clock_after_the_checkpoint_go_and_damaged_ones_cost_themselves_alone(tmp_path):
    first, second, late = ({"step": n, "steps": 2, "seconds": 1.0, "kept": 4, "tokens": 8} for n in (2, 4, 6))
    wrong = [{"step": 4}, second | {"steps": 0}, second | {"seconds": -1.0}, second | {"kept": "4"}]
    wrong += [second | {"seconds": 1e300}, [1], math.inf]
    lines = [json.dumps(row) for row in (first, *wrong, second, late)]
    path = tmp_path / "speed.jsonl"
    path.write_bytes("\n".join([*lines, '{"step": 4, "st']).encode() + b"\n\xff\n" + b"[" * 100_000)
    log = RunLog(tmp_path, 9, 1, keep=0, done=4)
    assert log.speed.rows == times_of(tmp_path) == [first, second]
    step(log, 5)
    assert [row["step"] for row in times_of(tmp_path)] == [2, 4, 5]


def test_a_folder_in_the_place_of_the_times_costs_a_warning(tmp_path, capsys):
    (tmp_path / "speed.jsonl").mkdir()
    log = RunLog(tmp_path, 2, 1, keep=0, done=0)
    step(log, 1)
    step(log, 2)
    log.close()
    assert capsys.readouterr().err.count("could not be written") == 1
    assert len(rows_of(tmp_path)) == 2


# ---- the end


def test_the_table_at_the_end_says_what_the_run_came_to(tmp_path, clock, capsys):
    log = RunLog(tmp_path, 30, 10)
    held_out = {"kept": 3, "accuracy": 0.5, "metric": "exact_match", "stopped": 1.0}
    log.evaluation(0, {"loss": 4.0, "score": 0.0, **held_out})
    for number in range(1, 21):
        clock.now += 3.5
        loss = math.nan if number == 2 else 5.0 - number / 10
        step(log, number, loss, skipped_steps=torch.tensor(int(number > 1)))
    log.evaluation(20, {"loss": 3.0, "score": 0.75, **held_out})
    log.best = {"step": 10, "by": "exact_match", "value": 0.8, "loss": 3.5}
    log.close()
    (tmp_path / "best").mkdir()
    capsys.readouterr()
    log.finish()
    assert dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines()) == {
        "steps": "20 of 30, of them 1 skipped because of the gradient's norm",
        "examples": "20",
        "tokens": "80, padding 25.0%",
        "kept": "40, 50.0% of the tokens",
        "training time": "1:10, 1 kept tokens/s",
        "loss": "4.9000 → 3.0500, means of steps 1–2 → 19–20",
        "loss, held out": "4.0000 → 3.0000, after step 0 → 20",
        "exact_match, held out": "0 → 0.75, after step 0 → 20",
        "best model": f"of step 10, exact_match 0.8, in {tmp_path / 'best'}",
        "files": f"train.jsonl, speed.jsonl, curves.png, best/ in {tmp_path}",
    }


def test_a_run_that_went_on_without_its_times_says_of_which_steps_they_are(tmp_path, clock, capsys):
    log = RunLog(tmp_path, 4, 1)
    run(log, clock, [1, 2], 1.0)
    size = log.position()
    (tmp_path / "speed.jsonl").unlink()
    log = RunLog(tmp_path, 4, 1, keep=size, done=2)
    run(log, clock, [3, 4], 2.0)
    log.close()
    log.finish()
    said = capsys.readouterr()
    assert "0:04 for the 2 steps whose time is known, 1 kept tokens/s" in said.out
    assert "of step 1 → 4" in said.out
    assert not said.err
    assert (tmp_path / "curves.png").is_file()


def test_a_run_without_a_step_has_no_table(log, tmp_path, capsys):
    capsys.readouterr()
    log.evaluation(0, Loss(1.0, 0.5, 1.0, 3)._asdict())
    log.close()
    log.finish()
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert not (tmp_path / "curves.png").exists()
