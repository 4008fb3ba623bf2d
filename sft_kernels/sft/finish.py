"""The end of a run, whichever way it comes: the model is saved first, and nothing else that fails
costs it."""

import os
import signal
import sys
import threading
from contextlib import contextmanager, suppress

from .._terminal import reason_of
from .report import say
from .saving import UNFINISHED, NotSaved, save


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM ended the run, after its model was saved.

    ``status`` is the usual exit status, 130 or 143. ``path`` is the model's folder, and ``result``
    is ``(model, tokenizer, log)``, as :func:`~.train.train` would have returned it.
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
        what = "finishing this step, then saving the model; a second signal ends at once"
        with suppress(OSError):  # a print could come in the middle of another, which raises
            os.write(2, f"\n{self.signal.name}: {what}\n".encode())


@contextmanager
def saved_at_the_end(model, tokenizer, log, evaluate):
    """Yield a :class:`Stop`; however the block ends, its log is kept and its model saved.

    At the end, and after a signal, the model is saved in ``model`` in the log's folder before
    anything else. Then come the last evaluation (not after a signal), the curves and what is
    printed. After a signal :class:`Stopped` is raised, after a failed save
    :class:`~.saving.NotSaved`. After an error in the block the model is saved in
    ``model-unfinished``, and the error is raised again. ``evaluate(stop, step)`` writes to the log.
    """
    stop = Stop()
    try:
        try:
            with suppress(_Asked):
                yield stop
        except BaseException:
            with suppress(Exception):  # after an error on the device its numbers may be lost, too
                log.close()
            raise
        log.close()
    except Exception as error:
        _save_unfinished(model, tokenizer, log, error)
        stop.restore()
        raise
    except BaseException as interrupt:
        log.ended(type(interrupt).__name__)
        stop.restore()
        raise
    try:
        if stop.signal and log.done < log.total:
            log.ended(stop.signal.name)
        path = _save(model, tokenizer, log, "model")
        if not stop.signal:
            _evaluate_last(evaluate, stop, log, path)
        log.finish()
    except Exception:
        log.finish()
        raise
    finally:
        stop.restore()
    if stop.signal:
        raise _stopped(stop.signal, (model, tokenizer, log), path)


def _save_unfinished(model, tokenizer, log, error):
    log.ended(f"{type(error).__name__}: {reason_of(error)}")
    if not log.done:
        return
    what = f"the run failed after step {log.done} of {log.total}"
    try:
        path = _save(model, tokenizer, log, UNFINISHED)
        say(f"{what}; the unfinished model is in {path}", sys.stderr)
    except NotSaved as failed:
        say(str(failed), sys.stderr)
    log.finish()


def _save(model, tokenizer, log, name):
    try:
        return save(model, tokenizer, log.out / name)
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


def _stopped(number, result, path):
    log = result[2]
    state = "unfinished" if log.done < log.total else "finished"
    after = f"{number.name} after step {log.done} of {log.total}"
    error = Stopped(number, f"{after}; the {state} model is in {path}")
    error.path, error.result = path, result
    return error
