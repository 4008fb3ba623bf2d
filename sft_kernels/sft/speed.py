"""The time that training takes: a clock, and its readings in a file of their own."""

import json
import math
import time
from contextlib import suppress

from .jsonl import JsonLines

_RECENT = 10  # readings that the time left is reckoned from
_LARGEST = 1e15  # that a reading may hold; their sums are to be told, too
_KINDS = {"step": int, "steps": int, "seconds": (int, float), "kept": int, "tokens": int}


class Speed:
    """Measures how long the steps of a run take, and writes it to ``speed.jsonl``.

    Each line is of the ``steps`` up to and with ``step``: the wall ``seconds`` they took, their
    ``kept`` tokens and all their ``tokens``, padding too. Times differ from run to run, so they are kept
    out of ``train.jsonl``. ``rows`` are all lines, those of before a resume too; of these each is
    dropped that is damaged or of a step after ``done``.
    """

    def __init__(self, path, done=None):
        self.file = JsonLines(path)
        self.rows = [] if done is None else self._take_up(done)
        self._before = len(self.rows)
        self.restart()

    def restart(self):
        """Start the clock anew: the time since the last reading was not spent on training."""
        self._since = time.perf_counter()

    def read(self, steps):
        """Add a line for ``steps``, rows of ``train.jsonl`` that the device is done with; returns it."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        counts = {name: sum(row[name] for row in steps) for name in ("kept", "tokens")}
        row = {"step": steps[-1]["step"], "steps": len(steps), "seconds": round(seconds, 6), **counts}
        self.rows.append(row)
        self.file.add(row)
        self.file.write()
        return row

    def left(self, steps):
        """The seconds that so many more steps will take if they go on as the last ones did."""
        recent = self.rows[self._before :][-_RECENT:]
        return steps * sum(row["seconds"] for row in recent) / sum(row["steps"] for row in recent)

    def _take_up(self, done):
        """The rows of the file up to the step ``done``, which alone stay in it."""
        rows = []
        with suppress(OSError):
            lines = self.file.path.read_bytes().splitlines()
            rows = [row for row in map(_parsed, lines) if row and row["step"] <= done]
            self.file.path.unlink()
        for row in rows:
            self.file.add(row)
        self.file.write()
        return rows


def per_second(row, name):
    """The tokens (``kept`` or ``tokens``) a second of a reading; infinite if it took no time."""
    return row[name] / row["seconds"] if row["seconds"] else math.inf


def _parsed(line):
    """The reading in a line of ``speed.jsonl``, or None if no run wrote it."""
    try:
        row = json.loads(line)
        fits = all(isinstance(row[name], kind) and 0 <= row[name] < _LARGEST for name, kind in _KINDS.items())
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return row if fits and row["steps"] else None
