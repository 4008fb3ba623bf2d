"""Files of rows, read a line at a time: JSON lines as they are or compressed, Parquet, pipes."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import stat
import tempfile
import zlib
from collections import deque
from pathlib import Path

from . import formats, rows
from .formats import ENOUGH, NotJson, Unfit
from .rows import DataError, is_blank
from .strict_json import parse

STDIN = ("-", "/dev/stdin")
_BOM = b"\xef\xbb\xbf"
_STDLIB = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
_ARROW = {"zstd": "zstd", "lz4": "lz4"}  # as pyarrow names them
_CHUNK = 1 << 20


def check_pipes(paths):
    """Raise :class:`~.rows.DataError` if one pipe is given twice."""
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


class Source:
    """A file of rows. It can be read several times: a pipe is copied into a temporary file.

    Args:
        path: of JSON lines, which gzip, bzip2, xz, zstd or lz4 may have compressed, or of a Parquet table; ``-`` is
            standard input. The format is told by the first bytes. pyarrow reads zstd, lz4 and Parquet.

    Attributes:
        path: for messages.
        size: in bytes, of the file as it lies there.
        is_pipe: true for a file that cannot be opened again.

    Raises :class:`~.rows.DataError` for a path that cannot be opened or is a folder.
    """

    def __init__(self, path):
        self.path = "/dev/stdin" if str(path) in STDIN else str(Path(path))
        self._file = _open(self.path, _source(self.path))
        info = os.fstat(self._file.fileno())
        self.is_pipe = not stat.S_ISREG(info.st_mode) or _source(self.path) == 0
        if self.is_pipe:
            self._file = self._copied(self._file)
        self._file.seek(0, os.SEEK_END)
        self.size = self._file.tell()

    def _copied(self, pipe):
        """A temporary file of what ``pipe`` holds, unless its beginning shows that it is no data."""
        head = pipe.peek(512)
        if (refusal := formats.container(head)) and _compression(head) is None:
            raise DataError(self.path, 1, refusal.at(self.path))
        copy = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            while chunk := pipe.read(_CHUNK):
                copy.write(chunk)
        except OSError as error:
            raise DataError(self.path, None, f"cannot be read ({error.strerror})") from error
        return copy

    def digest(self):
        """A hash of the file's bytes."""
        hashed = hashlib.blake2b(digest_size=20)
        self._file.seek(0)
        while chunk := self._file.read(_CHUNK):
            hashed.update(chunk)
        return hashed.hexdigest()

    def position(self):
        """The byte of the file up to which it has been read."""
        return self._file.tell()

    def lines(self):
        """Yield number and bytes of each line that is not blank, from the beginning.

        Bytes are None if the line is too long to be held, and :class:`~.formats.Unfit` if the file's beginning shows
        what is wrong with it. A Parquet row is a line of JSON.
        """
        self._file.seek(0)
        head = self._file.read(512)
        self._file.seek(0)
        number = 0
        try:
            lines = self._parquet() if head.startswith(b"PAR1") else self._text(_compression(head))
            ahead, first = deque(), True
            for number, line in lines:
                if is_blank(line):
                    continue
                if first and line is not None:
                    line = self._beginning(line, lines, ahead)
                first = False
                yield number, line
                while ahead:
                    number, line = ahead.popleft()
                    if not is_blank(line):
                        yield number, line
        except DataError:
            raise
        except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:300] or type(error).__name__
            raise DataError(self.path, number + 1, f"cannot be read ({reason})") from error

    def _text(self, compression):
        file = self._file if compression is None else self._decompressed(compression)
        number = 0
        while line := file.readline(rows.LONGEST):
            number += 1
            if number == 1 and (refusal := formats.container(line)):
                raise DataError(self.path, number, refusal.at(self.path))
            if len(line) == rows.LONGEST and line[-1:] != b"\n":
                while (rest := file.readline(rows.LONGEST)) and rest[-1:] != b"\n":
                    pass
                line = None
            yield number, line

    def _decompressed(self, name):
        if name in _STDLIB:
            return _STDLIB[name](self._file)
        arrow = self._arrow(name)
        return io.BufferedReader(arrow.CompressedInputStream(arrow.PythonFile(self._file, mode="r"), _ARROW[name]))

    def _parquet(self):
        arrow = self._arrow("Parquet")
        import pyarrow.parquet

        table = pyarrow.parquet.ParquetFile(arrow.PythonFile(self._file, mode="r"), pre_buffer=False)
        number = 0
        for batch in table.iter_batches(batch_size=64):
            for row in batch.to_pylist():
                number += 1
                line = json.dumps(_without_nulls(row), default=str, ensure_ascii=False).encode(errors="surrogatepass")
                yield number, line if len(line) < rows.LONGEST else None

    def _arrow(self, name):
        try:
            import pyarrow
        except ImportError as error:
            refusal = formats.container(self._file.read(512))
            needs = f"{name} is read with pyarrow, which is not installed"
            raise DataError(self.path, 1, Unfit(needs, refusal.program).at(self.path)) from error
        return pyarrow

    def _beginning(self, line, lines, ahead):
        """The file's first line, or the refusal that it and those behind it ask for; these are left in ``ahead``."""
        try:
            parse(line.removeprefix(_BOM).decode(errors="replace"))
        except NotJson:
            size = 0
            for number, more in lines:
                ahead.append((number, more))
                size += len(more or b"")
                if size > ENOUGH:
                    break
            head = b"".join([line, *(more or b"" for _, more in ahead)]).removeprefix(_BOM)
            return formats.beginning(head.decode(errors="replace"), self.path) or line
        except Unfit:
            pass
        return line


def _source(path):
    """Returns the file to open: for standard input its descriptor, which may be no file to open again."""
    return 0 if str(path) in STDIN else path


def _open(path, source):
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


def _compression(head):
    """The name of what compressed a file, as far as it is read here."""
    return next((n for magic, n in formats.COMPRESSED.items() if head.startswith(magic)), None)


def _without_nulls(value):
    """``value`` without the keys that a table gives every object because another one has them."""
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value
