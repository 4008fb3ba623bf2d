"""Runs a function in processes of its own, so that it is bounded in time and memory and uses every core.

The processes are forked, as torch's data loader forks its own on Linux: they have the function and all it needs without
pickling. Elsewhere the function is called here, one item after the other and without bounds. So it is in a daemon of
``multiprocessing``, which may have no processes of its own, and in a thread beside the main one: a fork there makes the
new process drop what the main thread held, and torch's Gloo then waits for ever for threads that are gone.
"""

import gc
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

SECONDS = 20  # of computing, for one piece of work
MEMORY = 2 << 30  # bytes beside those that the process has when it begins
_BEGINNING = 60  # seconds that a process may take to begin
_bounded = []  # not empty in a process of Workers


class OutOfTime(BaseException):
    """Raised by :func:`limited`. No ``Exception``, since a template's errors are caught as such."""


class Died(RuntimeError):
    """A process ended before it answered; the message says why."""


class Workers:
    """Processes that call ``function(item)``; to be used in a ``with`` block.

    Args:
        function: called in the processes. It may take :data:`MEMORY` more memory than there is now.
        count: of processes. Fewer will do if the system gives no more; ``ValueError`` if it gives none. If none of
            them begins within a minute, the work is done here.
    """

    def __init__(self, function, count):
        self.function, self.processes = function, []
        if _may_fork():
            context = multiprocessing.get_context("fork")
            for _ in range(count):
                here, there = context.Pipe()
                process = context.Process(target=_serve, args=(function, there, here), daemon=True)
                try:
                    with _quiet_fork():
                        process.start()
                except OSError as error:
                    here.close()
                    if not self.processes:
                        reason = f"no process could be started to read the data in ({error.strerror})"
                        raise ValueError(f"{reason}; see ulimit -u, and how much memory is free") from error
                    break
                finally:
                    there.close()
                self.processes.append((process, here))
        self.processes = [one for one in self.processes if _began(*one)]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process, pipe in self.processes:
            process.kill()
            process.join()
            with suppress(ValueError):  # if SIGCHLD is ignored, nobody is told that the process has ended
                process.close()
            pipe.close()

    def map(self, items):
        """Yield ``(item, result)`` in the order of ``items``, of which a few are taken ahead.

        A result is :class:`Died` if its process ended; that process is not replaced.
        """
        if not self.processes:
            for item in items:
                yield item, self.function(item)
            return
        free, waiting = deque(self.processes), deque()
        # A thread for each process: it sends an item and waits for the answer.
        with ThreadPoolExecutor(len(self.processes)) as threads:
            try:
                for item in items:
                    waiting.append((item, threads.submit(_ask, free, item)))
                    if len(waiting) > 2 * len(self.processes):
                        item, answer = waiting.popleft()
                        yield item, answer.result()
                while waiting:
                    item, answer = waiting.popleft()
                    yield item, answer.result()
            except BaseException:  # an interrupt, or no more results are wanted
                for _, answer in waiting:
                    answer.cancel()
                for process, _ in self.processes:
                    process.kill()
                raise


def _may_fork():
    main = threading.current_thread() is threading.main_thread()
    return sys.platform == "linux" and main and not multiprocessing.current_process().daemon


def _began(process, pipe):
    """Wait for a process to say that it is there. One that hangs in a lock of another thread is given up."""
    with suppress(EOFError, OSError):
        if pipe.poll(_BEGINNING):
            pipe.recv()
            return True
    process.kill()
    process.join()
    pipe.close()
    return False


def _ask(free, item):
    process, pipe = free.popleft()
    try:
        pipe.send(item)
        answer, failure = pipe.recv()
    except (EOFError, OSError):
        process.join()
        return Died(_cause(process.exitcode))
    finally:
        free.append((process, pipe))
    if failure:
        raise RuntimeError(f"in a process of its own:\n{failure}")
    return answer


def _cause(status):
    if status == -signal.SIGPROF:
        return f"it did not end within {2 * SECONDS} s of computing"
    if status is not None and status < 0:
        return f"{signal.Signals(-status).name} ended it, perhaps for lack of memory"
    return f"it ended with status {status}"


def _serve(function, pipe, other_end):
    """The loop of a process: answer until the other end is closed."""
    other_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGVTALRM, _out_of_time)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # libraries' warnings, once for each process
        os.dup2(silent, stream)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _bound_memory()
    _bounded.append(True)
    gc.freeze()  # a collection would write to the parent's objects, and so copy them
    with suppress(EOFError, OSError):  # the other end is closed
        pipe.send(None)  # see _began
        while True:
            item, answer, failure = pipe.recv(), None, None
            try:
                answer = function(item)
            except BaseException:
                failure = traceback.format_exc()
            pipe.send((answer, failure))


def _bound_memory():
    import resource

    with open("/proc/self/statm") as file:
        most = int(file.read().split()[0]) * resource.getpagesize() + MEMORY
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or most < hard:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))


@contextmanager
def limited():
    """In a process of :class:`Workers`, give the block :data:`SECONDS` of computing, then raise :class:`OutOfTime`.

    Code that does not come back to Python's interpreter is ended with its process after twice that time.
    """
    if not _bounded:
        yield
        return
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    signal.setitimer(signal.ITIMER_PROF, 2 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)


def _out_of_time(number, frame):
    raise OutOfTime


@contextmanager
def _quiet_fork():
    """Without Python 3.12's warning that a process with threads forks: what the threads hold is not used."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        yield
