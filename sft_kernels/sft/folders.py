"""Looks at a model's or tokenizer's folder before it is loaded: that it is there, that its files
can be read, and that no code of it has to run."""

import os
import re
from pathlib import Path

from . import files, hub

_ASKS = "--trust-remote-code"
_MOST = 100_000  # parts of one kind, and experts of all layers together
_DEEPEST = 10_000
_LAYERS = re.compile(r"(layers?|blocks?|depths?|stages?)$")
_PARTS = re.compile(r"(labels|experts?|heads?|groups?)$")


def find(name, argument, trust_remote_code=False):
    """The path of a folder (for ``model`` also of a config file); only ``hf:owner/name`` asks the
    hub."""
    name = os.fspath(name)
    if not name:
        raise ValueError(f"{argument}: expected a folder")
    if name.startswith(hub.PREFIX):
        return hub.snapshot(name, argument, trust_remote_code)
    shown = name if name.isprintable() else repr(name)
    if os.path.isdir(name):
        return Path(name)
    if os.path.isfile(name):
        if argument == "model":
            return Path(name)
        raise NotADirectoryError(f"{argument}: {shown} is a file, expected a folder")
    if os.path.islink(name):
        raise FileNotFoundError(f"{argument}: {shown} is a link to nothing")
    raise FileNotFoundError(f"{argument}: no such folder: {shown}")


def is_config(path):
    """Returns true if ``path`` describes a model without weights: a JSON file, or a folder with
    nothing but configs.

    A folder that lacks its weights but has more in it is no config: random weights would pass for a
    download cut short.
    """
    if os.fspath(path).startswith(hub.PREFIX):
        return False
    path = Path(path)
    if path.is_file():
        return True
    if not os.fspath(path) or not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir()}
    return bool(names) and names <= {files.CONFIG, files.GENERATION}


def check_tokenizer(name, trust_remote_code=False):
    """The path of a tokenizer's folder, looked at: what it holds can be read, and no code is
    missing."""
    folder = find(name, "tokenizer", trust_remote_code)
    files.check_tokenizer_files(folder, "tokenizer")
    code_of(folder, "tokenizer", trust_remote_code)
    if not trust_remote_code and files.vocabulary_file(folder) is None:
        raise ValueError(f"tokenizer: {folder} holds no tokenizer files, such as tokenizer.json")
    return folder


def settings_of(name, trust_remote_code=False):
    """Returns `(path, settings)` of a model's folder or config: what its config.json says, looked at.

    No code runs: a folder whose code would have to is refused, unless ``trust_remote_code``.
    """
    path = find(name, "model", trust_remote_code)
    file = path / files.CONFIG if path.is_dir() else path
    if path.is_dir() and os.path.lexists(path / "adapter_config.json"):
        raise ValueError(
            f"model: {path} holds an adapter (adapter_config.json), which is not supported as a folder; "
            "merge it into its model, or load it with peft and hand the model to train()"
        )
    if not os.path.lexists(file):
        raise ValueError(f"model: {path} holds no config.json")
    settings = files.json_object(file, "model")
    _check_settings(settings, file)
    code = code_of(path, "model", trust_remote_code)
    if not trust_remote_code or not code:
        _check_kind(settings, file, code)
    generate = path / "custom_generate" / "generate.py"
    if os.path.lexists(generate) and not trust_remote_code:
        raise needs_code(path, "model", [str(generate)])
    return path, settings


def check_model(name, trust_remote_code=False):
    """Returns `(path, settings, weights)`: :func:`settings_of`, and the files of weights, looked at.

    A config has none.
    """
    path, settings = settings_of(name, trust_remote_code)
    if path.is_dir() and os.path.lexists(path / files.GENERATION):
        files.json_object(path / files.GENERATION, "model")
    if is_config(path):
        return path, settings, []
    weights = files.check_weights(path, settings, "model")
    if not weights:
        raise FileNotFoundError(f"model: {path} holds no weights, such as model.safetensors")
    return path, settings, weights


def code_of(path, argument, trust_remote_code=False):
    """The Python files that the folder's settings name for ``argument``, as text; they are not
    opened.

    With ``trust_remote_code`` one that is not there is refused, and so is one that lies on the hub.
    """
    folder, file = (path, None) if path.is_dir() else (path.parent, path)
    file = file or folder / (files.CONFIG if argument == "model" else files.TOKENIZER_CONFIG)
    named = files.json_object(file, argument).get("auto_map") if os.path.lexists(file) else None
    if isinstance(named, dict):
        wanted = ("AutoConfig", "AutoModelForCausalLM") if argument == "model" else ("AutoTokenizer",)
        named = [named.get(name) for name in wanted]
    code = []
    for entry in _strings(named):
        repository, _, reference = entry.rpartition("--")
        module = reference.split(".")[0]
        if trust_remote_code and repository:
            raise ValueError(
                f"{argument}: {file} names code on the hub ({entry[:200]}), which is not fetched; "
                "put its Python files into the folder and leave out what stands before --"
            )
        if trust_remote_code and not (folder / f"{module}.py").is_file():
            raise ValueError(f"{argument}: {folder / module}.py is not there, which {file.name} names")
        code.append(f"{repository}--{module}.py" if repository else f"{folder / module}.py")
    return list(dict.fromkeys(code))


def needs_code(path, argument, code):
    """The error for a folder whose ``code`` may not run."""
    return ValueError(f"{argument}: {path} has code of its own ({', '.join(code)}); {_ASKS} lets it run")


def _check_settings(settings, file):
    """Refuse settings that would fetch code, that mean quantized weights, or that ask for more
    parts than a model has."""
    layers = experts = 1
    for key, value in entries(settings):
        where = f"model: {file}: {key}"
        if key in ("quantization_config", "compression_config") and value:
            raise ValueError(f"{where}: quantized weights are not supported; give the model in 32 or 16 bits")
        kernel = next((text for text in _strings(value) if "/" in text), None)
        if "_implementation" in f"_{key}" and kernel:
            raise ValueError(f"{where}: code from the hub ({kernel[:200]}) is not supported; leave it out")
        counts = value if isinstance(value, list) else [value]
        for count in counts:
            if not isinstance(count, int) or isinstance(count, bool):
                continue
            most = _DEEPEST if _LAYERS.search(key) else _MOST if _PARTS.search(key) else None
            if most is not None and count > most:
                raise ValueError(f"{where}: {count} is more than any model has; at most {most} are supported")
            layers = max(layers, count) if most == _DEEPEST else layers
            experts = max(experts, count) if "experts" in key else experts
            if key in ("num_hidden_layers", "n_layer", "num_layers") and count < 1:
                raise ValueError(f"{where}: expected at least 1, got {count}")
    if layers * experts > _MOST:
        raise ValueError(f"model: {file}: {layers} layers of {experts} experts are more than any model has")


def _check_kind(settings, file, code):
    """Refuse a model that transformers has not, or that is no causal LM."""
    import transformers
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind = settings.get("model_type")
    if not isinstance(kind, str):
        raise ValueError(f"model: {file} has no model_type, so that it is no model's config")
    mapped = AutoModelForCausalLM._model_mapping
    known = kind in CONFIG_MAPPING
    if known and CONFIG_MAPPING[kind] in mapped:
        return
    if code:
        raise needs_code(file.parent, "model", code)
    if known:
        raise ValueError(f"model: {file}: {kind} is no causal LM")
    what = f"transformers {transformers.__version__} has no model_type {kind[:100]!r}"
    raise ValueError(f"model: {file}: {what}")


def entries(value):
    """All keys and values of nested objects."""
    level = [value]
    while level:
        node = level.pop()
        if isinstance(node, dict):
            yield from node.items()
            level += node.values()
        elif isinstance(node, list):
            level += node


def _strings(value):
    level, found = [value], []
    while level:
        node = level.pop(0)
        if isinstance(node, str):
            found.append(node)
        elif isinstance(node, (list, tuple)):
            level += node
        elif isinstance(node, dict):
            level += node.values()
    return found
