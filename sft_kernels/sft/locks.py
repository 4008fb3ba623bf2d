"""Locks by which processes keep out of each other's way."""

from contextlib import contextmanager


@contextmanager
def locked(file, waiting=None):
    """Hold the lock of an open file or folder as long as the block runs; yields False if another
    process has it.

    With ``waiting``, which is called first, the lock is waited for instead. A lock ends with its
    process, however that ends. Where the system or the file system has none, True is yielded.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield True
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if waiting is None:
            yield False
            return
        waiting()
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        pass  # a file system without locks
    yield True
