"""Reads a recipe from a YAML file: values, never more than that."""

import re
from contextlib import suppress
from typing import Literal, get_args, get_origin, get_type_hints

from .._terminal import one_line
from .opening import open_now
from .recipe import NAMES, Recipe

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)\Z")
_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?\Z|[-+]?\.(inf|nan)\Z", re.I)
_LONGEST = 1 << 18  # bytes of a YAML file; its reader takes some seconds for a megabyte


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
    raise ValueError(f"{name}: expected {NAMES[kind]}, got {_shown(value)}{hint}")


def _shown(value):
    return f"a {type(value).__name__}" if isinstance(value, (list, dict)) else repr(value)[:60]
