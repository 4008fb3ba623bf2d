"""Writes folders that are there in whole or not at all."""

import errno
import os
import shutil
from pathlib import Path


def partial(path):
    """The folder beside ``path`` that :func:`write` fills and then renames to it."""
    return Path(path).with_name(Path(path).name + ".partial")


def replaced(path):
    """The name that an earlier folder at ``path`` has while another takes its place."""
    return Path(path).with_name(Path(path).name + ".replaced")


def write(path, fill, replace=False):
    """Make the folder ``path``: ``fill(folder)`` writes its files beside it; they are synced, then
    the folder is renamed.

    With ``replace`` a folder that is there goes once the new one is complete, and so does what a
    killed process left. Without it, either raises ``FileExistsError``. A process that is killed
    leaves the new folder, the old one, or the old one as :func:`replaced`, which :func:`recover`
    puts back.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if replace:
        remove(partial(path))
        recover(path)
    for taken in (partial(path),) if replace else (path, partial(path)):
        if os.path.lexists(taken):
            raise FileExistsError(f"{taken} exists already")
    partial(path).mkdir()
    mode = partial(path).stat().st_mode & 0o777  # as the umask gives it
    fill(partial(path))
    for file in partial(path).rglob("*"):
        if file.is_file():
            file.chmod(mode & 0o666)  # safetensors lets nobody but the owner read it
        sync(file)
    sync(partial(path))
    if replace and os.path.lexists(path):
        path.rename(replaced(path))
    partial(path).rename(path)
    sync(path.parent)
    if replace:
        remove(replaced(path))


def recover(path):
    """Put back the folder that a killed process was about to replace."""
    if replaced(path).is_dir():
        remove(replaced(path)) if os.path.lexists(path) else replaced(path).rename(path)


def clear_up(path):
    """Leave what there was before a :func:`write` that failed or was killed, or what it completed."""
    recover(path)
    remove(partial(path))


def remove(path):
    """Remove a folder, if it is there. A link is refused, and what it leads to stays."""
    if path.is_symlink():
        raise FileExistsError(f"{path} is a link")
    if path.is_dir():
        shutil.rmtree(path)


def sync(path):
    """Wait for the disk, which may say only here that it or a quota is full."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():  # Windows opens none
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise  # a file system that has no fsync is no failure
    finally:
        os.close(descriptor)
