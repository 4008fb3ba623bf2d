"""Saves the model of a run. Before the first step it is tried in small."""

import ctypes
import errno
import itertools
import os
import re
import shutil
import tempfile
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from .._terminal import reason_of
from . import generation, whole
from . import model as models
from .out import UNFINISHED as UNFINISHED
from .out import check_folder as check_folder
from .out import new_folder
from .progress import say

_MARGIN = 4 << 20  # for the log, the curves and what a file system needs for itself
_ROOM = re.compile(r"\.room-[a-z0-9_]{8}")  # as tempfile names it
_trial_lock = threading.Lock()


class NotSaved(OSError):
    """The model could not be saved in its folder.

    ``path`` is the folder that holds it instead, or None. ``result`` is ``(model, tokenizer,
    log)``, all of it still in memory.
    """

    path = result = None


def check_room(folder, *sizes):
    """Refuse files of ``sizes`` bytes for which ``folder`` has no room.

    The free space, a quota and the limit on a file's size all count. The files are made and removed
    again. Nothing is written to them: where the file system can, their blocks are set aside, which
    a quota counts. Elsewhere only the free space is compared.
    """
    needed = sum(sizes) + sum(sizes) // 100 + _MARGIN
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"out: saving needs {_gib(needed)} in {folder}, and {_gib(free)} are free")
    with tempfile.TemporaryDirectory(prefix=".room-", dir=folder) as room:
        for i, size in enumerate(sizes):
            try:
                with open(f"{room}/{i}", "wb") as file:
                    file.truncate(size)
                    _set_aside(file.fileno(), size)
            except OSError as error:
                what = f"no room for a file of {_gib(size)} in {folder}"
                raise OSError(f"out: {what} ({reason_of(error)})") from error


def is_room(path):
    """Returns True for a folder of :func:`check_room`, which a killed process left."""
    if path.is_symlink() or not _ROOM.fullmatch(path.name) or not path.is_dir():
        return False
    return all(file.name.isdigit() and file.is_file() for file in path.iterdir())


def rehearse(model, tokenizer, out, end_of_turn=None, copies=1, more=()):
    """Save into a trial folder in ``out``, so that a failure shows before the first step.

    An error names the argument: ``out``, ``model`` or ``tokenizer``. All is done that :func:`save`
    does, except that of every weight only one number is written. The room is checked for
    ``copies`` of the others, and for files of ``more`` bytes each. ``generate`` will end an answer
    at ``end_of_turn``, too. A generation config that transformers refuses is changed, and a line is
    printed that says how. ``out`` is made, unless something is refused.
    """
    out = Path(out)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        with _named("out", f"cannot write into {out}", None):
            out.mkdir(parents=True, exist_ok=True)
            trial = tempfile.TemporaryDirectory(prefix=".trial-", dir=out)
        with trial as folder:
            with _named("out", f"cannot write into {out}", None):
                Path(folder, "trial").write_bytes(bytes(1024))
            with _named("model", "its generation config cannot be saved"):
                _prepare_generation(model, tokenizer, end_of_turn, folder)
            saved = f"cannot be saved in {out}"
            with _named("model", saved), _one_number_of_each_weight(folder) as sizes:
                models.save_model(model, folder)
            with _named("tokenizer", saved):
                tokenizer.save_pretrained(folder)
            sizes += [file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()]
        check_room(out, *sizes * copies, *more)
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


def save(model, tokenizer, path, replace=False):
    """Save as :func:`~.model.save` does and return ``path``; ``replace`` what is there.

    If that fails, save aside and raise :class:`NotSaved`. The other places are a new folder beside
    the run's, then one in the system's folder for temporary files. If none takes the whole model,
    the weights alone are kept. The error says in one line where they are.
    """
    path = Path(path)
    try:
        models.save(model, tokenizer, path, replace)
        return path
    except Exception as error:  # safetensors and tokenizers have exceptions of their own
        failed = f"out: the model could not be saved in {path} ({reason_of(error)})"
        cause = error
    weights = None if isinstance(cause, FileExistsError) else _kept_or_removed(path)
    for place in _places_aside(path):
        try:
            models.save(model, tokenizer, place)
        except Exception:
            weights = weights or _kept_or_removed(place)
            continue
        if weights is not None:
            shutil.rmtree(weights, ignore_errors=True)
        raise _not_saved(f"{failed}; it is whole in {place}", place) from cause
    weights = weights or _save_weights(model, path)
    if weights is not None:
        what = f"its weights are in {weights}, the rest is not all there"
        raise _not_saved(f"{failed}; {what}", weights) from cause
    raise _not_saved(f"{failed}, nor beside it, nor in {tempfile.gettempdir()}", None) from cause


def _prepare_generation(model, tokenizer, end_of_turn, folder):
    model = models.causal_lm(model)
    if getattr(model, "generation_config", None) is None:
        return
    changes = [generation.move_from_model_config(model)]
    if end_of_turn is not None:
        models.stop_at(model, end_of_turn)
    pad = tokenizer.pad_token_id
    model.generation_config, change = generation.saveable(model.generation_config, folder, pad)
    for line in filter(None, [*changes, change]):
        say(line)


@contextmanager
def _named(argument, what, kind=ValueError):
    """Turn what the block raises into a ``kind`` that names the argument; None keeps the type."""
    try:
        yield
    except Exception as error:
        raise (kind or type(error))(f"{argument}: {what} ({reason_of(error)})") from error


@contextmanager
def _one_number_of_each_weight(folder):
    """In the block, ``save_pretrained`` into ``folder`` writes one number of each weight; yields
    the full file sizes.

    transformers decides in it which weights make a file, and under which names; safetensors still
    refuses what it does not save. A writer other than transformers' own (PEFT's, of adapters)
    writes its weights whole.
    """
    from transformers import modeling_utils

    real, sizes = modeling_utils.safe_save_file, []

    def write(tensors, filename, *args, **kwargs):
        if not Path(filename).is_relative_to(folder):  # another thread saves at the same time
            return real(tensors, filename, *args, **kwargs)
        parts = {name: t.reshape(-1)[:1] for name, t in tensors.items()}
        real(parts, filename, *args, **kwargs)
        # The header comes on top, with longer offsets than in the trial.
        header = Path(filename).stat().st_size - sum(t.numel() * t.element_size() for t in parts.values())
        sizes.append(sum(t.numel() * t.element_size() for t in tensors.values()) + header + 64 * len(tensors))

    with _trial_lock:
        modeling_utils.safe_save_file = write
        try:
            yield sizes
        finally:
            modeling_utils.safe_save_file = real


def _set_aside(descriptor, size):
    """Give a file its blocks. Python's ``posix_fallocate`` would write to each where a file system
    cannot do it."""
    if os.name != "posix" or not size:
        return
    allocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if allocate is None:
        return
    allocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    code = ctypes.get_errno() if allocate(descriptor, 0, 0, size) else 0
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise OSError(code, os.strerror(code))


def _places_aside(path):
    """Yields ``model`` in new folders: beside the run's, then among the temporary files. An unused
    one is removed."""
    run = path.absolute().parent
    for parent in (run.parent, Path(tempfile.gettempdir())):
        try:
            folder = new_folder(parent, f"{run.name}-")
        except OSError:
            continue
        try:
            yield folder / path.name
        finally:
            with suppress(OSError):
                folder.rmdir()


def _kept_or_removed(path):
    """Returns the folder that a failed save began where it holds all weights; another is removed,
    and None returned."""
    from safetensors import safe_open

    partial = whole.partial(path)
    names = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
    try:
        if any((partial / name).is_file() for name in names):
            for file in partial.glob("*.safetensors"):
                with safe_open(file, "pt"):  # which compares the file's length with its header
                    pass
            return partial
    except Exception:
        pass  # cut short
    shutil.rmtree(partial, ignore_errors=True)
    return None


def _save_weights(model, path):
    """Save the state dict alone, beside ``path`` or aside; returns the file, or None."""
    for place in itertools.chain([path], _places_aside(path)):
        file = place.with_name(f"{path.name}-weights.pt")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            opened = file.open("xb")  # never through a link, nor over what is there
        except OSError:
            continue
        try:
            with opened:
                torch.save(model.state_dict(), opened)
            return file
        except Exception:
            with suppress(OSError):
                file.unlink()
    return None


def _not_saved(message, path):
    error = NotSaved(message)
    error.path = path
    return error


def _gib(size):
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
