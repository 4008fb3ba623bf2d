"""A file of JSON lines that grows with a run, on a disk that may be full at times."""

import json
import math

from .._terminal import reason_of
from .progress import warn


class JsonLines:
    """Adds lines to the file ``path``. A number that is not finite is ``null`` in it.

    A line that cannot be written costs one warning. It is tried again with each later one, so that
    none is lost once there is room. ``unwritten`` are the bytes that wait.
    """

    def __init__(self, path):
        self.path, self.unwritten, self._warned = path, b"", False

    def add(self, row):
        """Add a line, which :meth:`write` writes."""
        self.unwritten += (json.dumps(finite(row), allow_nan=False) + "\n").encode()

    def write(self):
        """Write all lines that wait, or as much as there is room for."""
        if not self.unwritten:
            return
        try:
            with self.path.open("ab", buffering=0) as file:  # a buffer would write again
                while self.unwritten:
                    self.unwritten = self.unwritten[file.write(self.unwritten) :]
        except OSError as error:
            if not self._warned:
                warn(f"{self.path} could not be written, to be tried again ({reason_of(error)})")
            self._warned = True


def finite(value):
    """``value`` with ``None`` in the place of numbers that JSON has not: NaN and infinities."""
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
