"""Text on a terminal: lines without control characters, on streams that never fail."""

import os
import re
import sys
from contextlib import contextmanager, suppress
from io import UnsupportedOperation

LONGEST = 4000  # characters of a line
# tqdm moves between the lines of its bars, and begins the line of a bar anew.
_BAR = re.compile(r"(?:\n|\x1b\[A)+\Z|\r?")


def printable(text):
    """Returns ``text`` as one line of at most 4000 characters, without control characters.

    Files, file names and templates may hold them. The end of a line becomes a space. Anything else
    that does not print becomes a backslash escape.
    """
    escaped = _escaped(text[: LONGEST + 1])
    return escaped if len(escaped) <= LONGEST else f"{escaped[:LONGEST]} …"


class ForTheUser(Exception):
    """An error whose message is for the user of a command, who gets no traceback."""


def one_line(error):
    """Returns the message of an error, or the name of its type, as :func:`printable` text."""
    start = str(error).lstrip()[: 2 * LONGEST]
    message = re.sub(r"\s*[\r\n]\s*", " ", start.rstrip())
    return printable(message or type(error).__name__)


def reason_of(error):
    """Returns an error's message in one line of at most 300 characters, none of them of control."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return printable(" ".join(str(error).split()) or type(error).__name__)[:300]


def output(stream):
    """Returns an :class:`Output` for ``stream``; one that is an :class:`Output` stays as it is."""
    return stream if isinstance(stream, Output) else Output(stream)


class Output:
    """Stands for a text stream, and raises nothing if the stream cannot be written.

    Characters that the stream's encoding lacks are written as backslash escapes. After a write that
    failed, ``failed`` is the error, and everything that follows is dropped. ``stream`` may be None,
    as ``sys.stdout`` is in a process that was started without it. ``escape`` is called on each text
    that is written.
    """

    def __init__(self, stream, escape=None):
        self.stream, self.escape, self.failed = stream, escape, None

    def write(self, text):
        escaped = text if self.escape is None else self.escape(text)
        self._try(lambda: self.stream.write(_encodable(escaped, self.encoding)))
        return len(text)

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def flush(self):
        self._try(lambda: getattr(self.stream, "flush", bool)())

    @property
    def encoding(self):
        return getattr(self.stream, "encoding", None) or "utf-8"

    def isatty(self):
        if self.escape is _lines:  # so that nothing is coloured
            return False
        return getattr(self.stream, "isatty", bool)()

    def fileno(self):
        if self.stream is None:
            raise UnsupportedOperation("fileno")
        return self.stream.fileno()

    @property
    def lost(self):
        """The error that kept text from being written, or None; a closed pipe is no error."""
        self.flush()
        nobody_reads = isinstance(self.failed, (BrokenPipeError, ValueError))
        return None if nobody_reads else self.failed

    def __getattr__(self, name):
        if name == "stream":  # of a copy that is not made yet
            raise AttributeError(name)
        return getattr(self.stream, name)

    def __eq__(self, other):  # tqdm asks for the bars on the same stream
        return self.stream is (other.stream if isinstance(other, Output) else other)

    def __hash__(self):
        return id(self.stream)

    def _try(self, write):
        if self.stream is None or self.failed is not None:
            return
        try:
            write()
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self.failed = error


@contextmanager
def taken():
    """Put an :class:`Output` in the place of ``sys.stdout`` and ``sys.stderr``; yields the first.

    Whatever a command and its libraries print in the block is escaped, and costs no error.
    """
    _open_closed_descriptors()
    before = sys.stdout, sys.stderr
    outputs = Output(sys.stdout, _lines), Output(sys.stderr, _lines_and_bars)
    sys.stdout, sys.stderr = outputs
    try:
        yield sys.stdout
    finally:
        sys.stdout, sys.stderr = before
        for output in outputs:
            output.flush()
            if output.failed is not None:
                _discard(output)


@contextmanager
def coloured(*values):
    """Let the block write control sequences, unless one of ``values`` holds what does not print."""
    outputs = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, Output)]
    escapes = [output.escape for output in outputs]
    if all(str(value).isprintable() for value in values):
        for output in outputs:
            output.escape = None
    try:
        yield
    finally:
        for output, escape in zip(outputs, escapes, strict=True):
            output.escape = escape


def _open_closed_descriptors():
    """Open the null device as each standard descriptor that is closed.

    The next file that is opened would get its number, and with it all that libraries print. Reading
    from what stands for standard input is an error, as it was.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                os.set_inheritable(os.open(os.devnull, os.O_WRONLY), True)  # the lowest number


def _discard(output):
    """Empty the buffer of a stream that failed, or Python would try once more as it exits."""
    with suppress(OSError, ValueError, AttributeError):
        number = output.fileno()
        kept, null = os.dup(number), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, number)
            output.stream.flush()
        finally:
            os.dup2(kept, number)
            os.close(kept)
            os.close(null)


def _lines(text):
    return _escaped(text, kept="\n")


def _lines_and_bars(text):
    start = _BAR.match(text).end()
    return text[:start] + _lines(text[start:])


def _escaped(text, kept=""):
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else _escape_of(c) for c in text)


def _escape_of(character):
    return " " if character in "\r\n\t" else ascii(character)[1:-1]


def _encodable(text, encoding):
    try:
        return text.encode(encoding, "backslashreplace").decode(encoding)
    except LookupError:  # an encoding that Python has not
        return text.encode("ascii", "backslashreplace").decode("ascii")
