"""Files of rows, read a line at a time: JSON lines as they are or compressed, Parquet, pipes."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import stat
import tempfile
import zlib
from collections import deque
from contextlib import contextmanager, nullcontext
from pathlib import Path

from .._terminal import reason_of
from . import formats, rows
from .formats import ENOUGH, NotJson, Unfit
from .rows import BOM, DataError, is_blank
from .strict_json import parse

STDIN = ("-", "/dev/stdin")
_STREAMS = {"bzip2": bz2.BZ2Decompressor, "xz": lzma.LZMADecompressor}
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
        with _open(self.path, _source(self.path)) as file:
            self.is_pipe = not stat.S_ISREG(os.fstat(file.fileno()).st_mode) or _source(self.path) == 0
            self._copy = self._copied(file) if self.is_pipe else None
            self.size = os.fstat((self._copy or file).fileno()).st_size
        self._file = None

    def _copied(self, pipe):
        """A temporary file of what ``pipe`` holds, unless its beginning shows that it is no data."""
        head = pipe.peek(512)
        if (refusal := formats.container(head)) and formats.compression(head) is None:
            raise DataError(self.path, 1, refusal.at(self.path))
        try:
            copy = tempfile.TemporaryFile()  # noqa: SIM115
            while chunk := pipe.read(_CHUNK):
                copy.write(chunk)
            copy.flush()
        except OSError as error:
            reason = f"cannot be copied to a temporary file ({error.strerror}); TMPDIR names the folder for it"
            raise DataError(self.path, None, reason) from error
        return copy

    @contextmanager
    def _opened(self):
        with nullcontext(self._copy) if self._copy else _open(self.path, self.path) as self._file:
            self._file.seek(0)
            yield self._file

    def digest(self):
        """A hash of the file's bytes."""
        hashed = hashlib.blake2b(digest_size=20)
        with self._opened() as file:
            while chunk := file.read(_CHUNK):
                hashed.update(chunk)
        return hashed.hexdigest()

    def stamp(self):
        """A value that changes if the file is written to."""
        info = os.fstat(self._copy.fileno()) if self._copy else os.stat(self.path)
        return info.st_size, info.st_mtime_ns, info.st_ino

    def position(self):
        """The byte of the file up to which :meth:`lines` has read; at their end its size."""
        return self.size if self._file is None or self._file.closed else self._file.tell()

    def lines(self):
        """Yield number and bytes of each line that is not blank, from the beginning.

        Bytes are None if the line is too long to be held, and :class:`~.formats.Unfit` if the file's beginning shows
        what is wrong with it. A Parquet row is a line of JSON.
        """
        with self._opened() as file:
            head = os.pread(file.fileno(), 512, 0) if hasattr(os, "pread") else file.read(512)
            file.seek(0)
            yield from self._lines(head)

    def _lines(self, head):
        number = 0
        try:
            lines = self._parquet() if head.startswith(b"PAR1") else self._text(formats.compression(head))
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
            raise DataError(self.path, number + 1, f"cannot be read ({reason_of(error)})") from error

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
        if name == "gzip":
            return gzip.open(self._file)
        if name in _STREAMS:
            return io.BufferedReader(_Streams(self._file, _STREAMS[name]))
        arrow = self._arrow(name)
        return io.BufferedReader(arrow.CompressedInputStream(self._for_arrow(arrow), name))

    def _parquet(self):
        arrow = self._arrow("Parquet")
        import pyarrow.parquet

        table = pyarrow.parquet.ParquetFile(
            self._for_arrow(arrow), pre_buffer=False, buffer_size=_CHUNK, page_checksum_verification=True
        )
        number = 0
        for batch in table.iter_batches(batch_size=64):
            for row in batch.to_pylist():
                number += 1
                line = json.dumps(_without_nulls(row), default=_as_text, ensure_ascii=False)
                line = line.encode(errors="surrogatepass")
                yield number, line if len(line) < rows.LONGEST else None

    def _arrow(self, name):
        try:
            import pyarrow
        except ImportError as error:
            refusal = formats.container(self._file.read(512))
            needs = f"{name} is read with pyarrow, which is not installed"
            raise DataError(self.path, 1, Unfit(needs, refusal.program).at(self.path)) from error
        return pyarrow

    def _for_arrow(self, arrow):
        """The file from its beginning, under another descriptor, which pyarrow closes. Both have one position."""
        file = open(os.dup(self._file.fileno()), "rb")  # noqa: SIM115
        file.seek(0)  # what was read of it lies in the other one's buffer
        return arrow.PythonFile(file, mode="r")

    def _beginning(self, line, lines, ahead):
        """The file's first line, or the refusal that it and those behind it ask for; these are left in ``ahead``."""
        try:
            parse(line.removeprefix(BOM).decode(errors="replace"))
        except NotJson:
            size = 0
            for number, more in lines:
                ahead.append((number, more))
                size += len(more or b"")
                if size > ENOUGH:
                    break
            head = b"".join([line, *(more or b"" for _, more in ahead)]).removeprefix(BOM)
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


def _without_nulls(value):
    """``value`` without the keys that a table gives every object because another one has them.

    A number that is none is such a null: pandas writes NaN.
    """
    if isinstance(value, dict):
        return {key: entry for key, old in value.items() if (entry := _without_nulls(old)) is not None}
    if isinstance(value, list):
        return [_without_nulls(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _as_text(value):
    """A value of a table that JSON has not, as a string; None for bytes that are no text."""
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError:
        return None


class _Streams(io.RawIOBase):
    """The bytes of compressed streams that lie end to end in ``file``.

    ``bz2.open`` and ``lzma.open`` end without an error at a second stream that is damaged, and its lines are lost.
    """

    def __init__(self, file, decompressor):
        self.file, self.decompressor = file, decompressor
        self.stream = decompressor()

    def readable(self):
        return True

    def readinto(self, buffer):
        while True:
            given = b""
            if self.stream.eof:
                given = self.stream.unused_data or self.file.read(_CHUNK)
                if not given:
                    return 0
                self.stream = self.decompressor()
            elif self.stream.needs_input and not (given := self.file.read(_CHUNK)):
                raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            if data := self.stream.decompress(given, len(buffer)):
                buffer[: len(data)] = data
                return len(data)
