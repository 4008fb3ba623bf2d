"""Remembers which files a demo wrote, so that a second one removes those and nothing else."""

import hashlib
import json
import os
import re
import stat
from contextlib import contextmanager
from pathlib import Path

from .out import check_path

NAME = "demo.json"
_NEW = "demo.json.new"
_KIND = "sft-kernels demo"
_LONGEST = 1 << 20
# Files of a phase that was killed, which could not be listed any more.
_HALF = re.compile(
    r"(base|chats|held_out)\.jsonl|config\.json|(train|speed)\.jsonl|curves\.png|compare\.(json|png)|page\.html|[\w-]*model[\w.-]*\.(pt|safetensors)|trial"
    r"|state(-\d+)?\.(json|safetensors)|files\.json"
    r"|generation_config\.json|tokenizer(_config)?\.json|special_tokens_map\.json|chat_template\.jinja|\d+"
)
_HALF_FOLDERS = re.compile(
    r"(model(-unfinished)?|best|step-\d+)(\.partial|\.replaced)?|checkpoints|compare|ours|padded|plain"
    r"|\.(trial|room)-\w+"
)


class Manifest:
    """The list in ``demo.json`` of a demo's folder: each file with the hash of what was written.

    ``phases`` are the folders inside, one for each phase. A folder is refused, and nothing in it
    touched, if it holds anything that no demo wrote, or a link.
    """

    def __init__(self, folder, phases):
        self.folder, self.phases = check_path(folder), tuple(phases)
        self.files, self.writing = {}, None
        if self.folder.is_symlink():
            raise FileExistsError(f"out: {self.folder} is a link; give the folder itself")

    def begin(self):
        """Remove what an earlier demo left in the folder; the folder is then this demo's."""
        found = self._found()
        for path in [path for path, is_folder in found if not is_folder]:
            path.unlink()
        for path in reversed([path for path, is_folder in found if is_folder]):
            path.rmdir()
        self.files = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write()

    @contextmanager
    def phase(self, name):
        """In the block the folder ``name`` is made and filled; after it, its files are listed."""
        self.writing = name
        self._write()
        yield self.folder / name
        for path, is_folder in _walk(self.folder / name):
            if not is_folder:
                self.files[path.relative_to(self.folder).as_posix()] = _hash(path)
        self.writing = None
        self._write()

    def _found(self):
        """Everything in the folder but the list, folders before what is in them; refused if any is
        foreign."""
        if not self.folder.exists():
            return []
        listed = self._read()
        if listed is None:
            if entry := next(iter(sorted(self.folder.iterdir())), None):
                raise FileExistsError(
                    f"out: {self.folder} is no earlier demo: it holds {entry.name} and no {NAME}; give a new folder"
                )
            return []
        found = [entry for entry in _walk(self.folder) if entry[0] != self.folder / NAME]
        for path, is_folder in found:
            inside = path.relative_to(self.folder)
            if is_folder is None:
                raise FileExistsError(f"out: {path} is a link or no file, which no demo wrote; move it away")
            if not (self._is_folder(inside, listed) if is_folder else self._is_file(inside, path, listed)):
                what = "was changed" if inside.as_posix() in listed["files"] else "is no file of a demo"
                raise FileExistsError(f"out: {path} {what}; move it away, or give a new folder")
        return found

    def _is_folder(self, inside, listed):
        if inside.as_posix() in self.phases or any(Path(file).is_relative_to(inside) for file in listed["files"]):
            return True
        return self._was_being_written(inside, listed) and bool(_HALF_FOLDERS.fullmatch(inside.name))

    def _is_file(self, inside, path, listed):
        if inside.as_posix() == _NEW:
            return True  # a list that was half written
        if inside.parts[0] not in self.phases:
            return False
        hashed = listed["files"].get(inside.as_posix())
        if hashed is not None:
            return hashed == _hash(path)
        return self._was_being_written(inside, listed) and bool(_HALF.fullmatch(inside.name))

    def _was_being_written(self, inside, listed):
        return len(inside.parts) > 1 and inside.parts[0] == listed["writing"]

    def _read(self):
        """The content of the list, or None if there is none; ``FileExistsError`` if it is another's."""
        path = self.folder / NAME
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise FileExistsError(f"out: {path} is no list of a demo ({error.strerror})") from error
        with os.fdopen(descriptor, "rb") as file:
            regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
            text = file.read(_LONGEST) if regular else b""
        try:
            listed = json.loads(text)
            if listed["kind"] != _KIND or not isinstance(listed["files"], dict):
                raise ValueError
            return {"files": listed["files"], "writing": listed["writing"]}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise FileExistsError(f"out: {path} is no list of a demo; give a new folder") from error

    def _write(self):
        new = self.folder / _NEW
        with new.open("x") as file:
            json.dump({"kind": _KIND, "files": self.files, "writing": self.writing}, file, indent=1)
        new.replace(self.folder / NAME)


def _walk(folder):
    """Pairs of a path and whether it is a folder, None for a link or what is no file; folders
    first."""
    for path in sorted(folder.iterdir()):
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            yield path, True
            yield from _walk(path)
        else:
            yield path, False if stat.S_ISREG(mode) else None


def _hash(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
