"""Lines on the screen, and beside them bars, or plain lines if the screen cannot show a bar."""

import os
import sys
import time
from contextlib import suppress

from tqdm import tqdm

from .._terminal import output, printable

_SECONDS = 10  # between the plain lines that stand for a bar


def say(text, file=None):
    """Print one line beside the bar, without control characters; blank lines may come first.

    A screen that is gone raises nothing, and one that cannot show a character gets an escape.
    """
    line = text.lstrip("\n")
    stream = output(sys.stdout if file is None else file)
    # Bars are on the error output. Of another file tqdm does not find them there, and the line would stand behind one.
    with screen(), tqdm.external_write_mode(file=output(sys.stderr)):
        stream.write(f"{text[: len(text) - len(line)]}{printable(line)}\n")


def warn(text):
    """Print a warning beside the bar, to the screen's error output."""
    say(f"warning: {text}", sys.stderr)


def screen():
    """The context of writing to a screen that may be gone."""
    # A terminal that is gone raises OSError, a closed file ValueError.
    return suppress(OSError, ValueError)


def can_draw():
    """Returns True if the error output is a terminal on which a line can be written over."""
    with screen():
        return output(sys.stderr).isatty() and os.environ.get("TERM") != "dumb"
    return False


def bar(total, desc, unit, shown=True, **options):
    """A bar on the error output, or :class:`Lines` if it is no terminal that can draw one.

    It shows nothing if the screen is gone or ``shown`` is false. ``options`` are tqdm's.
    """
    if not can_draw():
        return Lines(total, desc, unit, shown)
    disable = True  # tqdm flushes both streams, and an error in the middle of it cannot be cleared up
    with screen():
        for stream in (sys.stdout, sys.stderr):
            getattr(stream, "flush", bool)()
        disable = not shown
    return tqdm(total=total, desc=desc, unit=unit, file=output(sys.stderr), disable=disable, **options)


class Lines:
    """Stands for a bar, and prints a plain line to the error output every ten seconds at most.

    Work that takes less than that prints nothing. ``n`` is what is done of ``total``.
    """

    def __init__(self, total, desc, unit, shown=True):
        self.total, self.desc, self.unit, self.shown = total, desc, unit, shown
        self.n, self._began = 0, time.monotonic()
        self._next = self._began + _SECONDS

    def update(self, n=1):
        self.n += n
        if self.shown and 0 < self.n < self.total and (now := time.monotonic()) >= self._next:
            self._next = now + _SECONDS
            left = duration((now - self._began) * (self.total - self.n) / self.n)
            amount = tqdm.format_sizeof(self.total, "B") if self.unit == "B" else f"{self.total} {self.unit}"
            say(f"{self.desc}: {self.n / self.total:.0%} of {amount}, {left} left", sys.stderr)

    def close(self):
        """Nothing is left to be taken away."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def duration(seconds):
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
