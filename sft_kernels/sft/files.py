"""Reads the files of a model or tokenizer folder before another library does: each fault becomes
one line that names the file."""

import json
import os
import re
import stat
import sys
import warnings
from pathlib import Path

from .._terminal import reason_of
from .opening import open_now

CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
INDEX = "model.safetensors.index.json"
_PICKLED_INDEX = "pytorch_model.bin.index.json"
_SETTINGS = (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.json")
_TEXTS = ("chat_template.jinja", "merges.txt", "vocab.txt")
_LARGE = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model", "tekken.json", *_TEXTS[1:])
_VOCABULARIES = ("*.tiktoken", "*.model", "*.spm", "vocab*", "merges*", "bpe*", "te*ken*.json")
_POINTER = b"version https://git-lfs.github.com/spec/"
_LONGEST = 64 << 20  # bytes of a JSON that is read whole
_LONGEST_TEMPLATE = 1 << 20
_FLOATS = {"F64", "F32", "F16", "BF16"}


def opened(path, argument):
    """The file at ``path`` opened for reading bytes; ``ValueError`` if it is none or a git-lfs
    pointer."""
    try:
        file = open_now(path)
    except IsADirectoryError as error:
        raise ValueError(f"{argument}: {path} is no file") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{argument}: {path} cannot be read ({reason_of(error)})") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{argument}: {path} is no file")
    if file.read(len(_POINTER)) == _POINTER:
        file.close()
        raise ValueError(f"{argument}: {path} is a git-lfs pointer, not the file itself; run git lfs pull")
    file.seek(0)
    return file


def json_object(path, argument):
    """The JSON object in a file. Infinity is let through, since Mamba's configs hold it; NaN is
    not."""
    with opened(path, argument) as file:
        data = file.read(_LONGEST + 1)
    if len(data) > _LONGEST:
        raise ValueError(f"{argument}: {path} is longer than {_LONGEST >> 20} MiB")
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_constant)
    except json.JSONDecodeError as error:
        what = f"{error.msg} at line {error.lineno}" if data.strip() else "the file is empty"
        raise ValueError(f"{argument}: {path} is not JSON ({what})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{argument}: {path} is not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{argument}: {path} is not JSON ({reason_of(error)})") from error
    if not isinstance(value, dict):
        kind = {list: "an array", str: "a string", type(None): "null"}.get(type(value), "a single value")
        raise ValueError(f"{argument}: {path} holds {kind}, expected a JSON object")
    return value


def _constant(name):
    if name == "NaN":
        raise ValueError("NaN is not JSON")
    return float(name)


def check_text(path, argument):
    """The text of a UTF-8 file that is not empty and no longer than a template may be."""
    try:
        with open_now(path) as file:  # a pipe is fine, as a shell's <(…) makes it
            data = file.read(_LONGEST_TEMPLATE + 1)
    except (OSError, ValueError) as error:
        raise ValueError(f"{argument}: {path} cannot be read ({reason_of(error)})") from error
    if len(data) > _LONGEST_TEMPLATE:
        raise ValueError(f"{argument}: {path} is longer than {_LONGEST_TEMPLATE >> 20} MiB, so it is no template")
    if data.startswith(_POINTER):
        raise ValueError(f"{argument}: {path} is a git-lfs pointer, not the file itself; run git lfs pull")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{argument}: {path} is not UTF-8 (byte {error.start})") from error
    if not text.strip():
        raise ValueError(f"{argument}: {path} is empty")
    return text


def template(path):
    """The chat template in the file ``path``."""
    if not os.fspath(path):
        raise ValueError("chat_template: expected a file")
    return check_text(path, "chat_template")


def check_template(path):
    """Refuse what :func:`template` refuses. A pipe is left alone, since it can be read only once."""
    if not os.path.exists(path) or os.path.isfile(path) or os.path.isdir(path):
        template(path)


def check_tokenizer_files(folder, argument, in_full=False):
    """Refuse a folder whose tokenizer files cannot be read.

    Of the large ones only the beginning is looked at; ``in_full`` reads them, too, to say what a
    failed load was about.
    """
    for name in (CONFIG, *_SETTINGS):
        if os.path.lexists(folder / name):
            settings = json_object(folder / name, argument)
            if name == TOKENIZER_CONFIG and not _are_texts(settings.get("chat_template")):
                raise ValueError(f"{argument}: {folder / name}: chat_template is no text, nor a list of named texts")
    if os.path.lexists(folder / _TEXTS[0]):
        opened(folder / _TEXTS[0], argument).close()  # no pipe, since transformers reads it once more
        check_text(folder / _TEXTS[0], argument)
    for name in _LARGE:
        if not os.path.lexists(folder / name):
            continue
        with opened(folder / name, argument) as file:
            start = file.read(64).lstrip()
            file.seek(-min(64, os.fstat(file.fileno()).st_size), os.SEEK_END)
            end = file.read().rstrip()
        if not start:
            raise ValueError(f"{argument}: {folder / name} is empty")
        if name.endswith(".json") and not (start.startswith(b"{") and end.endswith(b"}")):
            json_object(folder / name, argument)  # which says why it is none
        if in_full and name.endswith(".json"):
            json_object(folder / name, argument)
        elif in_full and name in _TEXTS:
            try:
                (folder / name).read_bytes().decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{argument}: {folder / name} is not UTF-8 (byte {error.start})") from error


def _are_texts(templates):
    """Returns true for a text, for named ones, and for None."""
    if isinstance(templates, dict):
        texts = list(templates.values())
    elif isinstance(templates, list):
        texts = [entry.get("template") if isinstance(entry, dict) else entry for entry in templates]
    else:
        texts = [templates]
    return all(text is None or isinstance(text, str) for text in texts)


def vocabulary_file(folder):
    """The file in ``folder`` that a tokenizer's vocabulary is in, or None."""
    if (folder / "tokenizer.json").is_file():
        return folder / "tokenizer.json"
    found = (path for pattern in _VOCABULARIES for path in sorted(folder.glob(pattern)))
    return next((path for path in found if path.is_file()), None)


def check_weights(folder, settings, argument):
    """The files of weights that transformers would load, each looked at; none for no weights.

    Safetensors come first, then pickled weights. Those are opened as torch opens them: only tensors
    are made, and no code runs.
    """
    named = settings.get("transformers_weights")
    if named is not None:
        raise ValueError(f"{argument}: {folder / CONFIG}: transformers_weights is not supported; leave it out")
    for name, check, ending in (("model.safetensors", _check_safetensors, ".safetensors"),
                                ("pytorch_model.bin", _check_pickled, ".bin")):  # fmt: skip
        index = folder / (INDEX if ending == ".safetensors" else _PICKLED_INDEX)
        if os.path.lexists(folder / name):
            files = [folder / name]
        elif os.path.lexists(index):
            files = _shards(index, ending, argument)
        else:
            continue
        for file in files:
            check(file, argument)
        return files
    return []


def _shards(index, ending, argument):
    listed = json_object(index, argument)
    shards = listed.get("weight_map")
    if not isinstance(listed.get("metadata"), dict):
        raise ValueError(f"{argument}: {index}: metadata is missing, expected an object")
    if not isinstance(shards, dict) or not shards or not all(isinstance(s, str) for s in shards.values()):
        raise ValueError(f"{argument}: {index}: weight_map is no mapping of weights to files")
    names = sorted(set(shards.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(ending) or "\0" in name:
            raise ValueError(f"{argument}: {index} names {name[:200]!r}, which is no {ending} file of the folder")
        if not (index.parent / name).exists():
            raise ValueError(f"{argument}: {index.parent / name} is not there, which {index.name} names")
    return [index.parent / name for name in names]


def _check_safetensors(path, argument):
    from safetensors import safe_open

    with opened(path, argument) as file:
        try:
            with safe_open(path, "pt"):  # which compares the file's length with its header
                pass
        except Exception as error:  # safetensors has one of its own
            reason = reason_of(error).removeprefix("Error while deserializing header: ")
            if "not fully covered" in reason:
                reason = "its length is not the one that its header gives, so it was cut off or added to"
            raise ValueError(f"{argument}: {path} is no safetensors file ({reason})") from error
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    for name, tensor in header.items():
        kind = "F32" if name == "__metadata__" else tensor["dtype"]
        if kind not in _FLOATS and (kind.startswith("F") or (len(tensor["shape"]) > 1 and name.endswith(".weight"))):
            raise ValueError(
                f"{argument}: {path}: {name[:200]} is of the type {kind}, which is not supported; "
                "give weights in F32, F16 or BF16"
            )


def _check_pickled(path, argument):
    import torch

    with opened(path, argument):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle's version
            weights = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # a pickle can raise anything
        text = str(error)
        if found := re.search(r"GLOBAL ([\w.]+)", text):
            reason = f"it asks for {found[1]}, which is no tensor; nothing of it was run"
        elif "eights only" in text:
            reason = "it is no pickle of tensors; nothing of it was run"
        else:
            reason = "it is no checkpoint, or cut off"
        raise ValueError(f"{argument}: {path} cannot be read as weights ({reason})") from error
    if (
        not isinstance(weights, dict)
        or not weights
        or not all(isinstance(name, str) and isinstance(w, torch.Tensor) for name, w in weights.items())
    ):
        raise ValueError(f"{argument}: {path} is no mapping of names to tensors")


def memory():
    """The bytes of memory, swap included, that this process could have."""
    most = []
    if sys.platform == "linux":
        amounts = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text()))
        most.append(sum(int(amounts.get(name, 0)) for name in ("MemTotal", "SwapTotal")) << 10)
        for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
            try:
                most.append(int(Path(file).read_text()))
            except (OSError, ValueError):  # not there, or "max"
                continue
    elif hasattr(os, "sysconf"):
        most.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min((amount for amount in most if amount > 0), default=1 << 46)
