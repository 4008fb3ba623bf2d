"""Opens files that another program may have put there."""

import os

_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def open_now(path):
    """The file or pipe at ``path``, opened for reading bytes.

    A named pipe that nobody writes to is empty; ``open`` would wait for a writer. A shell's <(…)
    has one, and is read to its end.
    """
    descriptor = os.open(path, _FLAGS)
    try:
        if hasattr(os, "set_blocking"):
            os.set_blocking(descriptor, True)
        return os.fdopen(descriptor, "rb")  # refuses a folder
    except BaseException:
        os.close(descriptor)
        raise
