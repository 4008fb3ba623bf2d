"""The options of a run, and the YAML file that holds them."""

import math
import re
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Literal, get_args, get_origin, get_type_hints

from .._terminal import one_line
from .opening import open_now

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)\Z")
_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?\Z|[-+]?\.(inf|nan)\Z", re.I)
_LONGEST = 1 << 18  # bytes of a YAML file; its reader takes some seconds for a megabyte
_LONGEST_ROW = 1 << 24  # tokens; a row is padded to its length, which has to fit into memory
_MOST = (1 << 63) - 1  # of an integer; with more digits than 4300 Python does not even print one
_NAMES = {str: "text", int: "an integer", float: "a number", bool: "true or false"}


@dataclass
class Recipe:
    """One run. Every field can stand in the YAML file and be overridden on the command line."""

    data: list[str] = field(default_factory=list)
    """Files of conversations to train on: JSONL, also compressed, or Parquet; - is standard input."""
    model: str = ""
    """A Hugging Face causal LM: a folder, a config (JSON) for random weights, or hf:owner/name to fetch one."""
    tokenizer: str | None = None
    """Its folder, or hf:owner/name; None: the model's, or for a config a byte-level BPE trained on the data."""
    chat_template: str | None = None
    """A file that replaces the tokenizer's chat template."""
    trust_remote_code: bool = False
    """Let Python code run that lies in the folders of model and tokenizer. Otherwise a folder that needs it is
    refused."""
    cache: str | None = None
    """Folder for tokenised data, which a later run starts from; None: sft_kernels in ~/.cache."""
    out: str = "out/run"
    """Folder for train.jsonl, curves.png and model/. It must not hold a run already, nor a link in their place."""
    mask: Literal["all", "completion", "completion+eot"] = "completion+eot"
    """Which tokens carry loss."""
    weigh: Literal["tokens", "examples"] = "tokens"
    """Give each kept token the same weight, or each example."""
    split_turns: bool = False
    """Make an example of its own of an assistant's turn that the chat template renders differently once others
    follow."""
    skip_bad: bool = False
    """Count and report lines that cannot be trained on, instead of stopping at the first."""
    row_tokens: int = 2048
    """Tokens in a packed row."""
    rows: int = 1
    """Rows in a micro-batch."""
    accumulate: int = 1
    """Micro-batches in an optimiser step."""
    epochs: float = 1.0
    """Passes over the data, where steps is None."""
    steps: int | None = None
    """Optimiser steps."""
    lr: float = 2e-5
    """Peak learning rate."""
    warmup: float = 0.03
    """Warm-up, as a share of the steps."""
    weight_decay: float = 0.1
    """On matrices; never on biases, norms and embeddings."""
    max_grad_norm: float = 1.0
    """Clip the global norm to this."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 autocast; auto: where the device computes in it."""
    holdout: float = 0.0
    """Share of the conversations kept out of training to measure the masked loss on."""
    eval_data: list[str] = field(default_factory=list)
    """Files to measure the masked loss on."""
    eval_every: int = 0
    """Steps between measurements; 0: before and after only."""
    log_every: int = 10
    """Steps between lines on the screen. The host waits for the device there, once, and not between; train.jsonl has
    every step all the same."""
    seed: int = 0
    """The seed of weights, split and order."""


def from_yaml(path):
    """The :class:`Recipe` in a YAML file: one mapping of options to values, lists of values, or null for the default.

    Raises ``ValueError`` naming the file, and the option whose value does not fit. Aliases are refused, since a few
    lines of them stand for more values than memory holds, and so is a file of more than 256 KiB.
    """
    values = _read(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of options")
    kinds = get_type_hints(Recipe)
    for key in values:
        if key not in kinds:
            raise ValueError(f"{path}: unknown option {key!r}; there are {', '.join(sorted(kinds))}")
    given = {key: value for key, value in values.items() if value is not None}
    return Recipe(**{key: _as(kinds[key], value, f"{path}: {key}") for key, value in given.items()})


def _read(path):
    """The value of a YAML file without aliases and tags, in which no key stands twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Takes for a number what looks like one. In YAML 1.1, 1:30 is 90, 010 is 8, and there are dates."""

    Loader.yaml_implicit_resolvers = {
        first: [(tag, rule) for tag, rule in rules if not tag.endswith((":int", ":float", ":timestamp"))]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    signs = list("-+.0123456789")
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, signs)
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, signs)
    try:
        with open_now(path) as file:
            source = file.read(_LONGEST + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if len(source) > _LONGEST:
        raise ValueError(f"{path}: longer than {_LONGEST >> 10} KiB, so it is no recipe")
    try:
        text = source.decode("utf-8-sig")
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):  # as they are read, since deep nesting takes hours
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("aliases (*name) are not supported; write the value out")
            if getattr(event, "tag", None):
                raise ValueError(f"tags ({event.tag}) are not supported; write the value alone")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > 3:
                raise ValueError("nested deeper than a list of values")
        root = yaml.compose(text, Loader)
        keys = [key.value for key, _ in root.value] if isinstance(root, yaml.MappingNode) else []
        if twice := next((key for i, key in enumerate(keys) if key in keys[:i]), None):
            raise ValueError(f"{twice!r} stands there twice")
        return yaml.load(text, Loader) or {}
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: not YAML: {one_line(error)}") from error
    except ValueError as error:  # also an integer that Python has not
        raise ValueError(f"{path}: {error}") from error


def _as(kind, value, name):
    """``value`` as an option of the type ``kind``; a number in quotes is one, too."""
    if kind == list[str]:
        return [_as(str, entry, name) for entry in (value if isinstance(value, list) else [value])]
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{name}: expected one of {', '.join(get_args(kind))}, got {_shown(value)}")
        return value
    kind = next((k for k in get_args(kind) if k is not type(None)), kind)  # of X | None
    fits = isinstance(value, bool) == (kind is bool)
    if fits and kind in (int, float) and isinstance(value, (int, float, str)):
        with suppress(ValueError, OverflowError):
            if kind is float or not isinstance(value, float) or value.is_integer():
                return kind(value)
    elif fits and isinstance(value, kind):
        return value
    hint = "; put it in quotes" if kind is str and not isinstance(value, (list, dict)) else ""
    raise ValueError(f"{name}: expected {_NAMES[kind]}, got {_shown(value)}{hint}")


def _shown(value):
    return f"a {type(value).__name__}" if isinstance(value, (list, dict)) else repr(value)[:60]


def check(recipe, model_given=False):
    """Raise ``ValueError`` for a value that makes no sense. ``model_given``: the recipe need not name one."""
    for option in fields(recipe):
        value = getattr(recipe, option.name)
        if isinstance(value, int) and abs(value) > _MOST:
            raise ValueError(f"{option.name}: expected at most 2⁶³ − 1")
    if not recipe.data:
        raise ValueError("data: expected at least one JSONL file")
    if not model_given and not recipe.model:
        raise ValueError("model: expected a folder or a config")
    check_row_tokens(recipe.row_tokens)
    for name in ("rows", "accumulate", "log_every"):
        if getattr(recipe, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(recipe, name)}")
    if recipe.steps is not None and recipe.steps < 1:
        raise ValueError(f"steps: expected at least 1, got {recipe.steps}")
    if recipe.steps is None and not 0 < recipe.epochs < math.inf:
        raise ValueError(f"epochs: expected more than 0, got {recipe.epochs}")
    for name in ("lr", "weight_decay", "max_grad_norm"):
        if not 0 <= getattr(recipe, name) < math.inf:
            raise ValueError(f"{name}: expected a finite number from 0 up, got {getattr(recipe, name)}")
    if recipe.eval_every < 0:
        raise ValueError(f"eval_every: expected 0 or more steps, got {recipe.eval_every}")
    if not 0 <= recipe.seed < 1 << 63:
        raise ValueError(f"seed: expected an integer from 0 to 2⁶³ − 1, got {recipe.seed}")
    for name in ("warmup", "holdout"):
        if not 0 <= getattr(recipe, name) < 1:
            raise ValueError(f"{name}: expected a share from 0 to 1, got {getattr(recipe, name)}")


def check_row_tokens(number):
    """Raise ``ValueError`` for a row that is too short or too long."""
    if not 1 <= number <= _LONGEST_ROW:
        raise ValueError(f"row_tokens: expected from 1 to {_LONGEST_ROW}, got {str(number)[:30]}")
