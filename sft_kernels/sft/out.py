"""Looks at the folder that a run writes to, before anything is read or written."""

import os
import secrets
from pathlib import Path

UNFINISHED = "model-unfinished"
"""The folder in ``out`` for the model of a run that an error ended."""
BEST = "best"
"""The folder in ``out`` for the best model on held-out data."""
LOG, SPEED, CURVES, TENSORBOARD = "train.jsonl", "speed.jsonl", "curves.png", "tensorboard"
"""The files in ``out`` that tell of a run, and the folder for TensorBoard's."""
COMPARISON = "compare"
"""The folder in ``out`` for a comparison with plain PyTorch."""
WRITTEN = (
    LOG,
    SPEED,
    CURVES,
    TENSORBOARD,
    COMPARISON,
    "checkpoints",
    BEST,
    "model",
    UNFINISHED,
    "model-weights.pt",
    f"{UNFINISHED}-weights.pt",
)
"""All that a run may leave in ``out``."""
_DEEPEST = 200  # folders; ``mkdir`` takes a step of Python's stack for each that is not there
_PARTIAL = ("model.partial", f"{BEST}.partial", f"{BEST}.replaced", f"{UNFINISHED}.partial")
_REPLACED = ("model.replaced", f"{UNFINISHED}.replaced")  # of a run that went on


def check_folder(out):
    """Refuse an ``out`` that cannot become a folder of this run.

    That is no folder or lies below none, cannot be written to, holds what a run writes, be it a
    link to nothing, or holds what a killed run left. Folders named ``.trial-…`` and ``.room-…``
    are of a killed run, too. Their names are never used again, so they are left alone.
    """
    out = check_path(out)
    for name in WRITTEN:
        if os.path.lexists(out / name):
            raise FileExistsError(f"out: {out} holds a run already ({_described(out / name)})")
    for name in _PARTIAL:
        if os.path.lexists(out / name):
            raise FileExistsError(
                f"out: {out} holds {_described(out / name)}, which a run left that was killed while it saved; "
                "move it away or give another folder"
            )


def check_again(out):
    """The path of an ``out`` in which a run may go on; a link in the place of what it writes is refused."""
    out = check_path(out)
    for path in (*(out / name for name in (*WRITTEN, *_PARTIAL, *_REPLACED)), *out.glob("checkpoints/step-*")):
        if path.is_symlink():
            raise FileExistsError(f"out: {path} is a link, through which nothing is written")
    return out


def check_path(out):
    """``out`` as a path: a folder that can be written to, or one that can be made. A link to a
    folder is one."""
    text = os.fspath(out)
    if not text:
        raise ValueError("out: expected a folder")
    if "\0" in text:
        raise ValueError(f"out: {text!r} is no path")
    if (home := os.path.expanduser(text)) != text:
        raise ValueError(f"out: {text[:100]} is not expanded; give {home[:100]}, or ./{text[:100]} for that name")
    path = Path(text)
    if len(path.parts) > _DEEPEST:
        raise ValueError(f"out: {text[:100]}… has {len(path.parts)} folders in it; at most {_DEEPEST} are supported")
    for place in (path, *path.absolute().parents):
        try:
            there = os.path.lexists(place)
            folder = place.is_dir()
            place.lstat() if not there else None
        except FileNotFoundError:
            continue
        except NotADirectoryError:  # a file among its parents, which comes next
            continue
        except OSError as error:
            raise type(error)(f"out: {text[:300]} cannot be used ({error.strerror})") from error
        if not folder:
            below = "" if place is path else f", so {path} cannot be made"
            what = "a link to nothing" if place.is_symlink() and not place.exists() else "not a folder"
            raise NotADirectoryError(f"out: {place} is {what}{below}; give a folder or a new path")
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(f"out: {place} cannot be written to (no permission)")
        break
    return path


def new_folder(parent, prefix):
    """A new folder in ``parent``, with the mode that the umask gives, unlike ``tempfile``'s."""
    while True:
        folder = Path(parent, prefix + secrets.token_hex(4))
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder


def _described(path):
    if path.is_symlink():
        return f"{path.name}, a link" if path.exists() else f"{path.name}, a link to nothing"
    return path.name
