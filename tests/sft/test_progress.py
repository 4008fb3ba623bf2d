"""Bars on a terminal that can draw them, plain lines anywhere else."""

import fcntl
import io
import json
import os
import pty
import re
import struct
import sys
import termios
import threading

import pytest

from sft_kernels import cli
from sft_kernels.sft import progress
from sft_kernels.sft.progress import bar, duration

from .small import SHAPE, recipe_in


class Terminal:
    """A terminal of 80 columns, which standard output and error output each write to; ``said`` is what it was sent."""

    def __init__(self, monkeypatch, kind):
        monkeypatch.setenv("TERM", kind)
        self.said, self._monkeypatch = b"", monkeypatch

    def __enter__(self):
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        modes = termios.tcgetattr(slave)
        modes[1] &= ~termios.OPOST  # it would send a carriage return before each end of a line
        termios.tcsetattr(slave, termios.TCSANOW, modes)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self._streams = [os.fdopen(file, "w", encoding="utf-8") for file in (slave, os.dup(slave))]
        for name, stream in zip(("stdout", "stderr"), self._streams, strict=True):
            self._monkeypatch.setattr(sys, name, stream)
        return self

    def __exit__(self, *error):
        self._monkeypatch.undo()
        for stream in self._streams:
            stream.close()
        self._reader.join()
        os.close(self._master)
        self.said = self.said.decode()

    def _read(self):
        while True:
            try:
                self.said += os.read(self._master, 1 << 16)
            except OSError:  # the other end is closed
                return


@pytest.fixture
def command(tmp_path):

    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "llama", "vocab_size": 300, "max_position_embeddings": 64, **SHAPE}))
    recipe = recipe_in(tmp_path)
    options = ["--model", str(config), "--steps", "4", "--row-tokens", "64", "--log-every", "2", "--holdout", "0.2"]
    return ["train", *options, "--data", *recipe.data, "--out", recipe.out]


def test_a_terminal_has_a_bar_beside_the_lines(command, monkeypatch):
    with Terminal(monkeypatch, "xterm-256color") as terminal:
        assert cli.main(command) == 0
    bars = re.findall(r"\r(training [^\r\n]*)", terminal.said)
    number = r"[\d,.]+"
    pattern = rf"training 4/4 100%\|█+\|, loss {number}, lr [\d.e-]+, {number} kept/s, 0:00 left"
    assert re.fullmatch(pattern, bars[-1].rstrip())
    assert all(len(line) <= 80 for line in bars)
    lines = [line.rpartition("\r")[2].split() for line in terminal.said.split("\n")]
    header = next(line for line in lines if line[:1] == ["step"])
    assert header[-2:] == ["padding", "kept"]  # the bar has the rest
    assert [line[0] for line in lines if len(line) == len(header) and line[0].isdigit()] == ["2", "4"]


def test_a_dumb_terminal_has_plain_lines(command, monkeypatch):
    with Terminal(monkeypatch, "dumb") as terminal:
        assert cli.main(command) == 0
    assert all(c.isprintable() or c == "\n" for c in terminal.said)
    lines = [line.split() for line in terminal.said.splitlines()]
    assert not [line for line in lines if line[:1] == ["training"] and line[1] != "time"]
    header = next(line for line in lines if line[:1] == ["step"])
    assert header[-3:] == ["kept", "kept/s", "left"]
    steps = [line for line in lines if len(line) == len(header) and line[0].isdigit()]
    assert [line[0] for line in steps] == ["2", "4"]
    assert steps[-1][-1] == "0:00"


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def test_without_a_terminal_long_work_says_at_times_how_far_it_is(clock, capsys):
    with bar(5_000_000, "reading", "B", unit_scale=True, leave=False) as shown:
        for second in range(1, 26):
            clock.now = second
            shown.update(200_000)
            assert shown.n == 200_000 * second
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "reading: 40% of 5.00MB, 0:15 left\nreading: 80% of 5.00MB, 0:05 left\n"
    with bar(300, "answering", "batches") as shown:
        clock.now += 3599
        shown.update()
    assert capsys.readouterr().err == "answering: 0% of 300 batches, 298:55:01 left\n"


def test_without_a_terminal_short_or_hidden_work_says_nothing(clock, capsys):
    for shown, seconds in ((True, 9.9), (False, 3600)):
        with bar(10, "reading", "B", shown) as line:
            for _ in range(10):
                clock.now += seconds / 10
                line.update()
    with bar(0, "reading", "B") as line:
        clock.now += 3600
        line.update()
    assert capsys.readouterr().err == ""


def test_a_screen_that_is_gone_costs_no_work(clock, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    for stream in (Gone(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        with bar(10, "reading", "B") as line:
            clock.now += 60
            line.update(5)
        assert line.n == 5


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599.4, "59:59"), (3600, "1:00:00"), (360_000, "100:00:00")]
)
def test_durations_read_as_on_a_clock(seconds, text):
    assert duration(seconds) == text
