import io
import math
import re
import sys
from pathlib import Path

import pytest
import torch

from sft_kernels.sft import report
from sft_kernels.sft.evaluate import Loss
from sft_kernels.sft.report import RunLog

from .small import rows_of


def step(log, number, loss=1.0):
    log.step(
        step=number, loss=torch.tensor(loss), lr=0.1, grad_norm=torch.tensor(loss), examples=1, rows=1, tokens=2, kept=1
    )  # fmt: skip


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
    real = log.path
    step(log, 1)
    log.path = Path("/dev/full")
    step(log, 2)
    step(log, 3)
    said = capsys.readouterr().err
    assert said.count("could not be written") == 1
    assert "No space left" in said
    log.finish()
    assert "is missing" in capsys.readouterr().err
    log.path = real
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

    real, log.path = log.path, Short()
    step(log, 1)
    log.path = real
    step(log, 2)
    log.close()
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2]


def test_a_screen_that_is_gone_costs_no_run(log, tmp_path, monkeypatch):
    class Gone:
        def write(self, text):
            raise BrokenPipeError

        flush = write

    monkeypatch.setattr(sys, "stdout", Gone())
    log.bar.fp = Gone()
    step(log, 1)
    log.evaluation(1, Loss(1.0, 0.5, 1.0, 3)._asdict())
    log.close()
    log.finish()
    assert len(rows_of(tmp_path)) == 2


def test_a_screen_that_is_gone_from_the_start_costs_no_run(tmp_path, monkeypatch):
    class Gone:
        def write(self, text):
            raise BrokenPipeError

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
    report.say("\n\n· first\nsecond \x1b[2J\u202e")
    step(log, 1)
    report.say("error", screen)
    first, *lines = screen.buffer.getvalue().decode("ascii").lstrip("\n").splitlines()
    assert screen.buffer.getvalue().startswith(b"\n\n\\xb7")
    assert first == r"\xb7 first second \x1b[2J\u202e"
    assert [line.split()[0] for line in lines] == ["1", "error"]


def test_the_bar_is_taken_away_while_a_line_is_printed(tmp_path, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    log = RunLog(tmp_path, 4, 1)
    report.say("line")
    log.close()
    assert re.search(r"training:.*\r +\r(\x1b\[A)*line\n", screen.getvalue(), re.DOTALL)


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
    monkeypatch.setattr(report, "_draw", fail)
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
