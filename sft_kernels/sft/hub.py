"""Asks the Hugging Face hub, which only a name ``hf:owner/name`` does."""

import re
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from .._terminal import reason_of

PREFIX = "hf:"
_NAME = re.compile(r"hf:([A-Za-z0-9][\w.-]{0,95})/([A-Za-z0-9][\w.-]{0,95})(?:@([\w./-]{1,255}))?", re.ASCII)
_TOKENIZER = ["*.json", "*.jinja", "*.model", "*.spm", "*.txt", "*.tiktoken"]
_DEEPER = ["*/*.json", "*/*.safetensors", "*/*.model", "*/*.txt", "*/*.tiktoken", "consolidated*"]
_REASONS = {
    "GatedRepoError": "it is gated: ask for access on its page, then log in with hf auth login",
    "RevisionNotFoundError": "it has no such revision",
    "RepositoryNotFoundError": "there is no such repository, or it is private",
    "OfflineModeIsEnabled": "the hub is switched off by HF_HUB_OFFLINE, and the repository is not in the cache",
    "LocalEntryNotFoundError": "the hub cannot be reached, and the repository is not in the cache",
    "IncompleteSnapshotError": "the hub cannot be reached, and the repository in the cache is not whole",
}


def snapshot(name, argument, trust_remote_code=False):
    """The folder in the hub's cache with the files of ``hf:owner/name`` or
    ``hf:owner/name@revision``.

    These are configs, templates, the tokenizer and, for a ``model``, safetensors. Python files come
    only with ``trust_remote_code``. Pickled weights never do.
    """
    found = _NAME.fullmatch(name)
    parts = found.groups(default="") if found else ("..",)
    if any(".." in part for part in parts) or any("--" in part or part.endswith(".git") for part in parts[:2]):
        raise ValueError(f"{argument}: {name[:200]!r} is no hf:owner/name or hf:owner/name@revision")
    owner, repository, revision = parts
    patterns = [*_TOKENIZER, *(["*.safetensors"] if argument == "model" else [])]
    patterns += ["*.py"] if trust_remote_code else []
    folder = _downloaded(name, argument, f"{owner}/{repository}", revision or None, tuple(patterns))
    if argument == "model" and not any(folder.glob("*.safetensors")):
        raise ValueError(f"{argument}: {name} holds no safetensors; other weights are not fetched")
    return folder


@lru_cache(maxsize=64)  # so that a run sees one state of the repository
def _downloaded(name, argument, repository, revision, patterns):
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=list(patterns), ignore_patterns=_DEEPER
        )
    except Exception as error:  # of several libraries
        kinds = [kind.__name__ for kind in type(error).__mro__]
        reason = next((_REASONS[kind] for kind in kinds if kind in _REASONS), reason_of(error))
        raise OSError(f"{argument}: {name} cannot be had from the hub ({reason})") from error
    return Path(folder)


@contextmanager
def unasked():
    """In the block every request to the hub raises, of whatever library it comes."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
