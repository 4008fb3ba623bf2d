"""The end of a run, whichever way it comes: model or checkpoint is saved first, and nothing else that
fails costs it."""

import os
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from functools import partial

from .._terminal import reason_of
from .guards import TooManySkips
from .progress import say, warn
from .saving import UNFINISHED, NotSaved, save


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM ended the run, after a checkpoint or the finished model was saved.

    ``status`` is the usual exit status, 130 or 143. ``path`` is the model's folder, in the
    checkpoint or in the run's folder, and ``result`` is ``(model, tokenizer, log)``, as
    :func:`~.train.train` would have returned it.
    """

    def __init__(self, number, message):
        super().__init__(message)
        self.status = 128 + number
        self.path = self.result = None


class _Asked(Exception):
    """Ends an evaluation, because a signal asked for the end of the run."""


class Stop:
    """Notes SIGINT and SIGTERM from the first step on, so that the step that is running is
    finished.

    The first signal puts the earlier handlers back, so a second one ends the run at once. A signal
    that is ignored stays ignored. Only the main thread can handle signals; in another thread
    nothing is noted.
    """

    def __init__(self):
        self.signal = None
        self._previous = {}

    def steps(self, steps):
        """Yield the steps; none after a signal."""
        self._listen()
        for step in steps:
            yield step
            if self.signal:
                return

    def batches(self, batches):
        """Yield the batches of an evaluation; a signal ends it."""
        for batch in batches:
            if self.signal:
                raise _Asked
            yield batch

    def restore(self):
        """Put the earlier handlers back."""
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _listen(self):
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            # None was not set from Python, so it could not be put back.
            if handler not in (None, signal.SIG_IGN):
                self._previous[number] = handler
                signal.signal(number, self._note)

    def _note(self, number, frame):
        self.signal = signal.Signals(number)
        self.restore()
        what = "finishing this step, then saving; a second signal ends at once"
        with suppress(OSError):  # a print could come in the middle of another, which raises
            os.write(2, f"\n{self.signal.name}: {what}\n".encode())


@contextmanager
def saved_at_the_end(model, tokenizer, log, evaluate, checkpoint, replace=False):
    """Yield a :class:`Stop`; however the block ends, its log is kept and its model saved.

    At the end the model is saved in ``model`` in the log's folder before anything else. Then come
    the last evaluation, the curves and what is printed. After a signal ``checkpoint()`` is called,
    which saves one and returns its folder, and :class:`Stopped` is raised. So it is after too many
    skipped steps. After another error the model is saved in ``model-unfinished``. Errors are raised
    again; a failed save raises :class:`~.saving.NotSaved`. ``evaluate(stop, step)`` writes to the
    log. ``replace``: models that are there are of this run, and make room.
    """
    stop = Stop()
    save_in = partial(_save, model, tokenizer, log, replace=replace)
    try:
        try:
            with suppress(_Asked):
                yield stop
        except BaseException:
            with suppress(Exception):  # after an error on the device its numbers may be lost, too
                log.close()
            raise
        log.close()
    except TooManySkips as error:
        path = _checkpoint(checkpoint, save_in, log, str(error))
        log.finish()
        stop.restore()
        raise TooManySkips(f"{error}; {_resumable(path)}") from error
    except Exception as error:
        _save_unfinished(save_in, log, error)
        stop.restore()
        raise
    except BaseException as interrupt:
        log.ended(type(interrupt).__name__)
        stop.restore()
        raise
    unfinished = stop.signal and log.done < log.total
    try:
        if unfinished:
            path = _checkpoint(checkpoint, save_in, log, stop.signal.name)
        else:
            path = save_in("model")
        if not stop.signal:
            _evaluate_last(evaluate, stop, log, path)
        if not stop.signal:
            log.finished()
        log.finish()
    except Exception:
        log.finish()
        raise
    finally:
        stop.restore()
    if stop.signal:
        where = _resumable(path) if unfinished else f"the finished model is in {path}"
        error = Stopped(stop.signal, f"{stop.signal.name} after step {log.done} of {log.total}; {where}")
        error.path = path / "model" if unfinished and path.name != UNFINISHED else path
        error.result = model, tokenizer, log
        raise error


def _checkpoint(checkpoint, save_in, log, reason):
    """Save a checkpoint, or at least the model, of a run that ends for ``reason``; returns the folder."""
    try:
        path = checkpoint()  # before the log says that the run ended, which is not so once it goes on
    except Exception as error:
        warn(f"no checkpoint could be saved ({reason_of(error)})")
        path = None
    log.ended(reason)
    return path or save_in(UNFINISHED)


def _resumable(path):
    if path.name == UNFINISHED:
        return f"the unfinished model is in {path}"
    return f"--resume goes on from {path}, whose model/ is the unfinished model"


def _save_unfinished(save_in, log, error):
    log.ended(f"{type(error).__name__}: {reason_of(error)}")
    if not log.done:
        return
    what = f"the run failed after step {log.done} of {log.total}"
    try:
        path = save_in(UNFINISHED)
        say(f"{what}; the unfinished model is in {path}", sys.stderr)
    except NotSaved as failed:
        say(str(failed), sys.stderr)
    log.finish()


def _save(model, tokenizer, log, name, replace):
    try:
        return save(model, tokenizer, log.out / name, replace)
    except NotSaved as error:
        error.result = model, tokenizer, log
        if log.stopped:
            after = f"{log.stopped} ended the run after step {log.done} of {log.total}"
            error.args = (f"{error}; {after}",)
        raise


def _evaluate_last(evaluate, stop, log, path):
    try:
        evaluate(stop, log.done)
    except _Asked:
        pass
    except BaseException:
        say(f"the last evaluation did not end; the finished model is in {path}", sys.stderr)
        raise
