"""The checkpoints of a run: complete or passed over, the newest ones kept."""

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from .._terminal import reason_of
from . import whole
from .locks import locked
from .progress import warn

FOLDER = "checkpoints"
_NAME = re.compile(r"step-([1-9][0-9]*)")
_LEFT = re.compile(r"step-[1-9][0-9]*\.(partial|replaced|removed)")
_FILES = "files.json"
_LONGEST = 1 << 24  # bytes of a list of files


class Checkpoints:
    """The folders ``step-N`` in ``checkpoints`` in a run's folder.

    Each holds ``files.json``, which lists its other files with sizes and SHA-256 and is written
    last. A checkpoint is complete if it is as that list says.
    """

    def __init__(self, out, keep):
        self.folder, self.keep = Path(out, FOLDER), keep

    def write(self, step, fill):
        """Write ``step-N``, to which ``fill(folder)`` writes files, then keep it and the newest
        ``keep - 1`` before it; returns its path.

        Nothing is removed before the new one is complete, so a failure costs no earlier one. Those of
        later steps are damaged, or the run would have gone on from them. They stay until a later
        checkpoint takes their place.
        """
        path = self.folder / f"step-{step}"

        def fill_and_list(folder):
            fill(folder)
            sizes = dict(_files(folder))
            listed = {name: [sizes[name], digest] for name, digest in _digests(folder, sizes)}
            (folder / _FILES).write_text(json.dumps(listed, indent=1), encoding="utf-8")

        try:
            whole.write(path, fill_and_list, replace=True)
        except BaseException:
            with suppress(OSError):
                whole.clear_up(path)  # a full disk needs the room
                self.folder.rmdir()  # unless there are others
            raise
        self.rotate(step)
        return path

    def rotate(self, step):
        """Remove those before ``step``, which is complete, that ``keep`` does not cover."""
        before = [old for number, old in self._by_age() if number < step]
        for old in before[self.keep - 1 :]:
            self._remove(old)

    def newest(self):
        """The newest complete checkpoint, or None. Each one that is not complete is named and
        passed over."""
        for _, path in self._by_age():
            try:
                check(path)
            except (OSError, ValueError) as error:
                warn(f"resume: {path} is passed over ({reason_of(error)})")
                continue
            return path
        return None

    def clear_up(self):
        """Remove what a killed process left half."""
        if self.folder.is_dir():
            for _, path in self._by_age():
                whole.recover(path)
            for path in self.folder.iterdir():
                if _LEFT.fullmatch(path.name):
                    if path.suffix == ".replaced":
                        whole.recover(path.with_suffix(""))
                    whole.remove(path)

    def _by_age(self):
        """Pairs of step and folder, the newest first."""
        if not self.folder.is_dir():
            return []
        found = [(_NAME.fullmatch(path.name), path) for path in self.folder.iterdir()]
        return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)

    def _remove(self, path):
        gone = path.with_name(f"{path.name}.removed")
        try:
            path.rename(gone)  # so that a kill leaves none that looks whole
            whole.remove(gone)
        except OSError as error:
            warn(f"{path} could not be removed ({reason_of(error)})")


def check(path):
    """Raise ``ValueError`` if the checkpoint ``path`` is not as its list of files says."""
    try:
        with open(path / _FILES, "rb") as file:
            listed = json.loads(file.read(_LONGEST))
        expected = {name: (int(size), str(digest)) for name, (size, digest) in listed.items()}
    except FileNotFoundError as error:
        raise ValueError(f"{_FILES} is missing") from error
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{_FILES} is damaged") from error
    found = dict(_files(path))
    for name, (size, _) in expected.items():
        if name not in found:
            raise ValueError(f"{name} is missing")
        if found[name] != size:
            raise ValueError(f"{name} has {found[name]} bytes, {size} were written")
    for name, digest in _digests(path, expected):
        if expected[name][1] != digest:
            raise ValueError(f"{name} is damaged: its SHA-256 is not the one that was written")


@contextmanager
def only_run(out):
    """Refuse a second process that runs in the folder ``out`` as long as the block runs."""
    folder = os.open(out, os.O_RDONLY)
    try:
        with locked(folder) as ours:
            if not ours:
                raise FileExistsError(f"out: another run is writing to {out}; wait for it, or end it")
            yield
    finally:
        os.close(folder)


def _files(folder):
    """Pairs of name and size of every file but the list, in order."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != _FILES:
            yield name, path.stat().st_size


def _digests(folder, names):
    """Pairs of name and SHA-256 of some files, on every core."""

    def digest(name):
        with open(folder / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:
        return [*zip(names, pool.map(digest, names), strict=True)]
