"""JSON without what Python's reader lets pass: every fault of a text becomes one reason."""

import json
import math
import re
import sys

from .formats import NULLS, NotJson, Unfit, behind_the_value

MAX_DEPTH = 100  # a copy or a dump of something deeper could run into Python's recursion limit
_SURROGATE = re.compile(r"\\u[dD]")
_DEEP = f"nested deeper than {MAX_DEPTH} levels"


def parse(text):
    """Return the value of a JSON text; raise :class:`~.formats.Unfit` for anything else.

    Beyond what ``json`` raises, these are refused: NaN and Infinity, a number that is too large,
    a key that stands twice in one object, half a surrogate pair, and nesting deeper than
    ``MAX_DEPTH``.
    """
    try:
        value = _DECODER.decode(text)
    except Unfit:
        raise
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            raise behind_the_value(text[error.pos :], error.pos + 1) from error
        raise NotJson(f"not JSON ({error.msg} at column {error.pos + 1})") from error
    except RecursionError as error:
        raise Unfit(_DEEP) from error
    except MemoryError as error:
        raise Unfit("does not fit into memory") from error
    except ValueError as error:  # int() of more digits than Python allows
        digits = sys.get_int_max_str_digits()
        raise Unfit(f"an integer of more than {digits} digits; write it as a string") from error
    if text.count("[") + text.count("{") > MAX_DEPTH and _deep(value):
        raise Unfit(_DEEP)
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise Unfit("half a surrogate pair, which is no character") from error
    return value


def _deep(value):
    level = [value]
    for _ in range(MAX_DEPTH):
        below = []
        for node in level:
            for child in node.values() if isinstance(node, dict) else node:
                if isinstance(child, (dict, list)):
                    below.append(child)  # noqa: PERF401
        if not below:
            return False
        level = below
    return True


def _object(pairs):
    made = dict(pairs)
    if len(made) != len(pairs):
        seen = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise Unfit(f"the key {twice[:60]!r} stands twice in one object")
    return made


def _float(digits):
    if math.isinf(value := float(digits)):
        raise Unfit(f"the number {digits[:60]} is too large for a float; write it as a string")
    return value


def _constant(name):
    raise Unfit(f"{name}, which is not JSON; write null", NULLS)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_constant)
