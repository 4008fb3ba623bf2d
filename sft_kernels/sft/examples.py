"""Examples that lie in files: the tokens of a data set, mapped into memory and not read before they are asked for."""

import hashlib
import json
import weakref
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path

import numpy as np

from .masking import Example
from .rows import DataError

_INDEX = ("start", "length", "kept", "line")
_MOST_MAPPED = 64  # each map is an open file
_mapped = []
_FILES = ("ids.int32", "labels.int32", "index.int64", "refused.jsonl")


class PartWriter:
    """Writes the examples of one file into ``folder``; to be used in a ``with`` block, whose end completes them."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.tokens = self.examples = self.refused = 0

    def __enter__(self):
        with ExitStack() as files:
            self._files = [files.enter_context(open(self.folder / name, "wb")) for name in _FILES]
            self._close = files.pop_all().close
        return self

    def __exit__(self, *error):
        self._close()

    def add(self, ids, labels, index):
        """Add examples: their tokens and labels, int32 laid end to end, and the int64 rows ``(length, kept, line)``."""
        lengths = index[:, 0]
        starts = self.tokens + np.cumsum(lengths) - lengths
        for file, array in zip(self._files, (ids, labels, np.column_stack([starts, index])), strict=False):
            file.write(array.tobytes())
        self.tokens += len(ids)
        self.examples += len(index)

    def refuse(self, line, reason):
        self._files[3].write((json.dumps([line, reason]) + "\n").encode())
        self.refused += 1

    def finish(self, **about):
        """Write what else is known of the file."""
        counts = {"examples": self.examples, "tokens": self.tokens, "refused": self.refused}
        text = json.dumps({**counts, "refused_bytes": self._files[3].tell(), **about})
        (self.folder / "about.json").write_text(text, encoding="utf-8")


class Part:
    """The examples of one file, as :class:`PartWriter` wrote them; ``ValueError`` if a file of theirs is cut short.

    Attributes:
        path: of the file they come from.
        about: what ``finish`` was given, and the counts ``examples``, ``tokens`` and ``refused``.
        index: int64 ``[examples, 4]``: start, length and kept tokens of each example, and its line.
    """

    def __init__(self, folder, path):
        self.folder, self.path = Path(folder), path
        self.about = json.loads((self.folder / "about.json").read_text(encoding="utf-8"))
        examples, tokens = self.about["examples"], self.about["tokens"]
        sizes = [(self.folder / name).stat().st_size for name in _FILES]
        if sizes != [4 * tokens, 4 * tokens, 8 * len(_INDEX) * examples, self.about["refused_bytes"]]:
            raise ValueError(f"{self.folder}: files are cut short")
        self.index = np.fromfile(self.folder / _FILES[2], np.int64).reshape(-1, len(_INDEX))
        self._maps = None
        if tokens and sum(other() is not None for other in _mapped) < _MOST_MAPPED:
            self._map()  # at once, so that a cache may be emptied while it is in use

    def _map(self):
        self._maps = maps = [np.asarray(np.memmap(self.folder / name, np.int32, "r")) for name in _FILES[:2]]
        _mapped[:] = [other for other in _mapped if other()] + [weakref.ref(self)]
        for other in _mapped[:-_MOST_MAPPED]:
            other()._maps = None
        del _mapped[:-_MOST_MAPPED]
        return maps

    def tokens(self, start, length):
        """``(ids, labels)``, lists, of ``length`` tokens from ``start`` on."""
        maps = self._maps or self._map()  # another thread may let go of them meanwhile
        return tuple(array[start : start + length].tolist() for array in maps)

    def arrays(self):
        """All tokens, their labels, and the index."""
        return [*(self._maps or self._map()), self.index] if self.about["tokens"] else [self.index]

    def refused(self):
        """Yield the :class:`~.rows.DataError` of each line that was refused."""
        with open(self.folder / "refused.jsonl", encoding="utf-8") as file:
            for line in file:
                yield DataError(self.path, *json.loads(line))


class Examples(Sequence):
    """The examples of some :class:`Part` s, or of a choice of them; each is a :class:`~.masking.Example`.

    Attributes:
        lengths: int32, tokens of each example.
        kept: int32, labels of each.
    """

    def __init__(self, parts, chosen=None):
        self.parts = parts
        self._ends = [*accumulate(len(part.index) for part in parts)]
        self.chosen = np.arange(self._ends[-1] if parts else 0) if chosen is None else chosen
        self.lengths, self.kept = (self._column(name).astype(np.int32) for name in ("length", "kept"))

    def __len__(self):
        return len(self.chosen)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return self.choose(np.arange(len(self))[i])
        number = int(self.chosen[i])
        part, row = self._place(number)
        start, length, _, line = part.index[row].tolist()
        return Example(*part.tokens(start, length), f"{part.path}:{line}")

    def __add__(self, other):
        """These examples, then the ``other`` ones."""
        before = self._ends[-1] if self.parts else 0
        return Examples([*self.parts, *other.parts], np.concatenate([self.chosen, other.chosen + before]))

    def choose(self, places):
        """The :class:`Examples` at some places of these, in that order."""
        return Examples(self.parts, self.chosen[places])

    def digest(self):
        """SHA-256 of all tokens and labels, and of which of them these examples are; it reads the files."""
        digest = hashlib.sha256(self.chosen.astype(np.int64))
        for part in self.parts:
            for array in part.arrays():
                digest.update(array)
        return digest.hexdigest()

    def sources(self):
        """int64 of each example, the same for those of one line of one file."""
        lines = self._column("line")
        files = np.searchsorted(self._ends, self.chosen, side="right")
        return files * (int(lines.max(initial=0)) + 1) + lines

    def _column(self, name):
        column = _INDEX.index(name)
        found = [part.index[:, column] for part in self.parts]
        return np.concatenate(found)[self.chosen] if found else np.empty(0, np.int64)

    def _place(self, number):
        at = bisect_right(self._ends, number)
        return self.parts[at], number - (self._ends[at - 1] if at else 0)
