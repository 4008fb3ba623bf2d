"""SIGINT and SIGTERM as the end of a command, whatever it is doing."""

import os
import signal
import sys
import threading
from functools import partial


class Interrupted(KeyboardInterrupt):
    """SIGINT ended the command.

    After a plain ``KeyboardInterrupt`` Python may end by the signal, and not with the status 130.
    """

    status = 128 + signal.SIGINT


class Terminated(KeyboardInterrupt):
    """SIGTERM ended the command."""

    status = 128 + signal.SIGTERM


_ENDS = {
    signal.SIGINT: partial(Interrupted, "interrupted"),
    signal.SIGTERM: partial(Terminated, "terminated"),
}
_SECONDS = 5  # long enough for what is cleared up after the first
_USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Signals:
    """Makes SIGINT and SIGTERM raise :class:`Interrupted` and :class:`Terminated` in its block.

    A second signal does what it would have done without the block. Handlers of others stay in
    place. What is raised can be lost: Python ignores it in ``__del__``, and a library may turn it
    into an error that it then ignores. So it is raised again every few seconds until the block ends.

    If the block is the ``last`` thing that the process does, a signal after it ends the process
    silently. ``end`` is the exception of the first signal, or None.
    """

    def __init__(self, last):
        self.last, self.end = last, None
        self._before, self._number, self._repeats = {}, None, False

    def __enter__(self):
        self._hook, sys.unraisablehook = sys.unraisablehook, self._ignored
        if threading.current_thread() is threading.main_thread():
            for number, handler in _USUAL.items():
                if signal.getsignal(number) == handler:
                    self._before[number] = handler
                    signal.signal(number, self._raise)
            alarm = getattr(signal, "SIGALRM", None)  # Windows has none
            if alarm and signal.getsignal(alarm) == signal.SIG_DFL:
                signal.signal(alarm, self._again)
                self._repeats = True
        return self

    def __exit__(self, *error):
        if self._repeats:
            self._repeat_in(0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        for number, handler in self._before.items():
            signal.signal(number, _exit if self.last else handler)
        sys.unraisablehook = self._hook

    def _raise(self, number, frame):
        self._number, end = number, _ENDS[number]()
        self.end = self.end or end
        signal.signal(number, self._before[number])
        self._repeat_in(_SECONDS)
        raise end

    def _again(self, number, frame):
        self._repeat_in(_SECONDS)
        if signal.getsignal(self._number) == self._before[self._number]:
            signal.signal(self._number, self._raise)
        signal.raise_signal(self._number)

    def _ignored(self, error):
        if isinstance(error.exc_value, (Interrupted, Terminated)):
            self._repeat_in(0.01)
        else:
            self._hook(error)

    def _repeat_in(self, seconds):
        if self._repeats and self.end is not None:
            signal.setitimer(signal.ITIMER_REAL, seconds)


def _exit(number, frame):
    os._exit(128 + number)
