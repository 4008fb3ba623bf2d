"""Conversations from JSONL, checked line by line before anything is trained."""

import os
import stat
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

from . import formats
from .formats import ENOUGH, NotJson, Unfit
from .messages import ROLES as ROLES
from .messages import check, check_tools
from .strict_json import parse

LONGEST = 1 << 28  # bytes of a line; a longer one is no conversation
LONGEST_MESSAGE = 4000
STDIN = ("-", "/dev/stdin")
_BOM = b"\xef\xbb\xbf"


class DataError(ValueError):
    """A line that cannot be trained on: which file, which line, why. The message is one line."""

    def __init__(self, path, line, reason):
        super().__init__(_printable(f"{path}:{line}: {reason}" if line else f"{path}: {reason}"))
        self.path, self.line, self.reason = path, line, reason


class Record(NamedTuple):
    """One line: a conversation (``messages`` and the template's ``tools``), or plain ``text``."""

    path: str
    line: int
    messages: list[dict[str, Any]] | None
    text: str | None
    tools: list | None

    def error(self, reason):
        return DataError(self.path, self.line, reason)


class Lines(NamedTuple):
    """The lines of some files: those that were read, and why each of the others was left out."""

    records: list[Record]
    bad: list[DataError]


def read_all(paths, skip_bad=False):
    """Read JSONL files; :class:`Lines` are returned as they are, so that a pipe is read once."""
    if isinstance(paths, Lines):
        return paths
    check_pipes(paths)
    bad = []
    records = [record for path in paths for record in read_jsonl(path, bad if skip_bad else None)]
    return Lines(records, bad)


def check_pipes(paths):
    """Raise :class:`DataError` if one pipe is given twice."""
    seen = set()
    for path in paths:
        try:
            info = os.stat(_source(path))
        except (OSError, ValueError):
            continue  # the reader says so
        again = stat.S_ISREG(info.st_mode) or stat.S_ISDIR(info.st_mode)
        if again and _source(path) != 0:
            continue
        if (info.st_dev, info.st_ino) in seen:
            reason = "given twice, but a pipe can be read only once; write it to a file"
            raise DataError(path, None, reason)
        seen.add((info.st_dev, info.st_ino))


def read_jsonl(path, bad=None):
    """The records of a UTF-8 file with one JSON object a line; blank lines are passed over.

    A line is ``{"messages": [{"role": …, "content": …}, …]}``, optionally with ``"tools"``,
    or ``{"text": …}``. The file may be a pipe, and ``-`` is standard input. The first bad line
    raises :class:`DataError`; given a list as ``bad``, each is appended there and left out. A
    file without any record raises in either case.
    """
    records, refused = [], []
    path = "/dev/stdin" if str(path) in STDIN else str(Path(path))
    ahead = deque()
    with _open(path) as file:
        lines = _lines(path, file)
        for number, line in _taking(ahead, lines):
            if line is not None and line.strip() in (b"", _BOM):
                continue
            try:
                records.append(_record(path, number, line))
            except Unfit as error:
                if line and not records and not refused and isinstance(error, NotJson):
                    ahead.extend(_ahead(lines))
                    error = _beginning(path, line, ahead) or error
                refusal = DataError(path, number, error.at(path))
                if bad is None:
                    raise refusal from error
                refused.append(refusal)
    if bad is not None:
        bad += refused
    if not records:
        if refused:
            raise DataError(path, None, f"no usable conversation in it; {first_of(refused)}")
        raise DataError(path, None, "no conversation in it")
    return records


def first_of(bad):
    """Words for a message: the number of lines that were left out, and the first of them."""
    return f"refused {len(bad)} line{'s' * (len(bad) > 1)}, the first: {bad[0]}"


def _source(path):
    """Returns the file to open: for standard input its descriptor, which may be no file to open again."""
    return 0 if str(path) in STDIN else path


def _open(path):
    source = _source(path)
    try:
        if stat.S_ISDIR(os.stat(source).st_mode):
            raise DataError(path, None, formats.folder(path).at(path))
        return open(source, "rb", closefd=source != 0)
    except FileNotFoundError:
        raise DataError(path, None, "no such file") from None
    except DataError:
        raise
    except OSError as error:
        raise DataError(path, None, f"cannot be read ({error.strerror})") from error
    except ValueError as error:  # a name that no file can have
        raise DataError(path, None, f"cannot be read ({error})") from error


def _lines(path, file):
    """Number and bytes of each line; None for one that is too long to be held."""
    number = 0
    try:
        while line := file.readline(LONGEST):
            number += 1
            if number == 1 and (refusal := formats.container(line)):
                raise DataError(path, number, refusal.at(path))
            if len(line) == LONGEST and line[-1:] != b"\n":
                while (rest := file.readline(LONGEST)) and rest[-1:] != b"\n":
                    pass
                line = None
            yield number, line
    except OSError as error:
        raise DataError(path, number + 1, f"cannot be read ({error.strerror})") from error


def _taking(ahead, lines):
    """The lines, after each of them those that were taken ahead of the others."""
    for line in lines:
        yield line
        while ahead:
            yield ahead.popleft()


def _ahead(lines):
    """The next lines, as many as show what a value over several lines is."""
    taken, size = [], 0
    for number, line in lines:
        taken.append((number, line))
        size += len(line or b"")
        if size > ENOUGH:
            break
    return taken


def _beginning(path, line, ahead):
    """The refusal of a file by its first lines, None if they say nothing."""
    head = b"".join([line, *(line or b"" for _, line in ahead)]).removeprefix(_BOM)
    return formats.beginning(head.decode(errors="replace"), path)


def _record(path, number, line):
    if line is None:
        raise Unfit(f"longer than {LONGEST >> 20} MiB")
    try:
        text = line.removeprefix(_BOM).decode()
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 ({error.reason} at byte {error.start}); name its encoding for ENCODING"
        raise Unfit(reason, "iconv -f ENCODING -t UTF-8") from error
    row = parse(text)
    if not isinstance(row, dict):
        raise formats.row(row)
    messages, text = row.get("messages"), row.get("text")
    if messages is None and text is None and "messages" not in row and "text" not in row:
        raise formats.row(row)
    if messages is not None and text is not None:
        program = formats.python('{k: r[k] for k in r if k != "text"}')
        raise Unfit(f"{formats.EXPECTED}, got both", program)
    if text is None and "messages" in row:
        return Record(path, number, check(row), None, check_tools(row.get("tools")))
    if not isinstance(text, str) or not text.strip():
        raise Unfit('"text" is empty or not a string')
    return Record(path, number, None, text, None)


def _printable(text):
    """One line without control characters, as files and templates may hold them."""
    if not text.isprintable():
        plain = (c if c.isprintable() else " " if c in "\r\n\t" else ascii(c)[1:-1] for c in text)
        text = "".join(plain)
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]} …"
