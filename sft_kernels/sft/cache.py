"""Tokenised files that a later run starts from, each in a folder named by everything that its tokens depend on."""

import hashlib
import json
import os
import shutil
import tempfile
import weakref
from contextlib import contextmanager, suppress
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

from .._terminal import reason_of
from . import whole
from .examples import Part
from .locks import locked
from .progress import warn
from .rows import DataError

_LIBRARIES = ("transformers", "tokenizers", "jinja2")


def default_folder():
    """``sft_kernels`` in the user's folder for caches (``XDG_CACHE_HOME``, else ``~/.cache``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sft_kernels")


def part(source, known, build, folder=None):
    """The :class:`~.examples.Part` of a :class:`~.sources.Source`: the one in the cache, or a new one.

    ``build(folder)`` writes one into an empty folder. The new one is in the cache in whole or not at all; another
    process that wants the same waits for it. What cannot be kept (a pipe, a tokenizer of a class that transformers has
    not, a cache that cannot be written) is built in a temporary folder.

    Args:
        known: the :func:`fingerprint` of the encoder.
        folder: of the cache, by default :func:`default_folder`. If it is given, it must be writable: else ``OSError``.
    """
    build = partial(_unchanged, source, source.stamp(), build)
    key = None if source.is_pipe or known is None else _key(source, known)
    if key is None:
        return _temporary(source, build)
    try:
        place = Path(folder or default_folder()).absolute() / key
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{place}.lock", "ab"):
            pass
    except (OSError, RuntimeError) as error:
        if folder is not None:
            raise OSError(f"cache: cannot write into {folder} ({reason_of(error)})") from error
        warn(f"tokens are not kept for the next run: the cache cannot be written ({reason_of(error)})")
        return _temporary(source, build)
    waiting = partial(warn, "another run is reading the same file; waiting for it")
    with open(f"{place}.lock", "ab") as lock, locked(lock, waiting):
        if (found := _opened(place, source)) is None:
            _sweep(place.parent)
            found = _built(place, source, build)
    return found


def _unchanged(source, stamp, build, folder):
    build(folder)
    with suppress(FileNotFoundError):
        if source.stamp() == stamp:
            return
    raise DataError(source.path, None, "changed while it was read")


def _built(place, source, build):
    try:
        with _naming(place.parent):
            whole.write(place, build, replace=True)
    except BaseException:
        shutil.rmtree(whole.partial(place), ignore_errors=True)
        raise
    return _opened(place, source)


def _opened(place, source):
    """The part in ``place``; None if there is none, or files are not as long as they should be."""
    try:
        return Part(place, source.path)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _temporary(source, build):
    with _naming(tempfile.gettempdir()):
        folder = tempfile.mkdtemp(prefix="sft_kernels-")
        try:
            build(Path(folder))
            found = Part(folder, source.path)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    weakref.finalize(found, shutil.rmtree, folder, ignore_errors=True)
    return found


@contextmanager
def _naming(folder):
    """Say in which folder a disk is full."""
    try:
        yield
    except OSError as error:
        message = f"cache: {folder} cannot take the tokenised data ({reason_of(error)}); give another with --cache"
        raise OSError(message) from error


def _key(source, known):
    return _hash("\0".join([source.path, source.digest(), known]).encode(errors="surrogateescape"))


def _hash(data):
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def fingerprint(encoder):
    """All that the tokens of a given file depend on, as text; None if they depend on code that is not known here."""
    tokenizer = encoder.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kind = type(tokenizer)
    if backend is None or kind.__module__.split(".")[0] != "transformers":
        return None
    given = {k: v for k, v in tokenizer.init_kwargs.items() if not k.endswith(("_file", "_object", "name_or_path"))}
    template = tokenizer.chat_template
    return json.dumps(
        [
            [version(library) for library in _LIBRARIES],
            _hash(b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))),
            [kind.__qualname__, backend.to_str(), tokenizer.special_tokens_map, given, template],
            [encoder.mode, encoder.split_turns],
            date.today().isoformat() if "strftime_now" in str(template) else None,
        ],
        sort_keys=True,
        default=str,
    )


def _sweep(folder):
    """Remove what killed runs left."""
    for unfinished in folder.glob(f"{'[0-9a-f]' * 32}.partial"):  # and nothing of somebody else's
        with suppress(OSError), open(unfinished.with_suffix(".lock"), "ab") as lock, locked(lock) as ours:
            if ours:
                shutil.rmtree(unfinished, ignore_errors=True)
