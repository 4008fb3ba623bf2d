"""Files and rows that the reader does not take, each refused with the one line that converts it.

A conversion is a program that a shell calls as ``PROGRAM FILE > NEW.jsonl``. The reader takes the
new file, or its next refusal says what is still to do.
"""

import csv
import io
import json
import os
import re
import shlex
from contextlib import suppress
from itertools import count
from pathlib import Path

from .shapes import decoded, is_messages, quoted, rows_inside, shape_of

EXPECTED = 'expected an object with either "messages" or "text"'
ENOUGH = 1 << 20  # bytes of a file's beginning, to see what an object over several lines holds

_FILE = 'open(sys.argv[1], encoding="utf-8-sig")'
_LINES = f"for r in map(json.loads, filter(str.strip, {_FILE}))"
_WHOLE = f"json.load({_FILE})"
_SUFFIXES = re.compile(
    r"\.(messages\d*|jsonl?|ndjson|txt|md|[ct]sv|ya?ml|xlsx|parquet|arrow|orc"
    r"|gz|bz2|xz|zst|lz4|tar|zip)",
    re.IGNORECASE,
)


def python(expression, rows=_LINES, modules="json, sys"):
    """The program that prints ``expression`` of each row ``r`` as a line of JSON."""
    return f"python -c {shlex.quote(f'import {modules}; [print(json.dumps({expression})) {rows}]')}"


def _table(module, table):
    return python("r, default=str", f"for r in {table}.to_pylist()", f"json, sys, {module} as p")


_CONTAINERS = (  # the first bytes of a file, its format, the program
    (b"\x1f\x8b", "gzip", "zcat"),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd -dc"),
    (b"BZh", "bzip2", "bzcat"),
    (b"\xfd7zXZ\0", "xz", "xzcat"),
    (b"\x04\x22\x4d\x18", "lz4", "lz4 -dc"),
    (b"PK\x03\x04", "zip", "unzip -p"),
    (b"PAR1", "Parquet", _table("pyarrow.parquet", "p.read_table(sys.argv[1])")),
    (b"ARROW1", "Arrow", _table("pyarrow", "p.ipc.open_file(sys.argv[1]).read_all()")),
    (b"\xff\xff\xff\xff", "Arrow", _table("pyarrow", "p.ipc.open_stream(sys.argv[1]).read_all()")),
    (b"ORC", "ORC", _table("pyarrow.orc", "p.read_table(sys.argv[1])")),
    (b"\xff\xfe\0\0", "UTF-32", "iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "UTF-16", "iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16", "iconv -f UTF-16 -t UTF-8"),
    (b"{\0", "UTF-16", "iconv -f UTF-16LE -t UTF-8"),
    (b"[\0", "UTF-16", "iconv -f UTF-16LE -t UTF-8"),
    (b"\0{", "UTF-16", "iconv -f UTF-16BE -t UTF-8"),
    (b"\0[", "UTF-16", "iconv -f UTF-16BE -t UTF-8"),
)
_COMPRESSED = ("gzip", "zstd", "bzip2", "xz", "lz4")
_RECORDS = 'sys.stdout, orient="records", lines=True'
_EXCEL = f"import pandas, sys; pandas.read_excel(sys.argv[1]).to_json({_RECORDS})"
_SAVED = "import datasets, sys; datasets.load_from_disk(sys.argv[1]).to_json(sys.stdout.buffer)"
_PARTS = f"for d in yaml.safe_load_all({_FILE}) for r in (d if isinstance(d, list) else [d])"
_YAML = python("r, default=str", _PARTS, "json, sys, yaml")
_LITERALS = python("ast.literal_eval(r)", f"for r in filter(str.strip, {_FILE})", "ast, json, sys")
_PROSE = python('{"text": r.strip()}', f"for r in filter(str.strip, {_FILE})")
_NULLS = f"json.loads(l, parse_constant=lambda _: None) for l in {_FILE} if l.strip()"
_ASK = '{"messages": [{"role": "user", "content": r["QUESTION"]}, '
_FILL_IN = python(_ASK + '{"role": "assistant", "content": r["ANSWER"]}]}')
NULLS = python("r", f"for r in ({_NULLS})")


class Unfit(ValueError):
    """A reason not to take a line or a file, and the program that would convert it."""

    def __init__(self, reason, program=None):
        super().__init__(reason)
        self.reason, self.program = reason, program

    def at(self, path):
        """The reason, with the command that converts ``path``."""
        if self.program is None:
            return self.reason
        file, new = _names(Path(path))
        return f"{self.reason}. To convert it: {self.program} {file} > {new}"


class NotJson(Unfit):
    """A text that is no JSON, perhaps because a value spans several lines."""


def _names(path):
    """A file's name for the shell, and one that is still free; placeholders for a pipe."""
    if not (path.is_file() or path.is_dir()):
        return "FILE", "NEW.jsonl"
    stem = path.name
    while _SUFFIXES.fullmatch((split := os.path.splitext(stem))[1]):
        stem = split[0]
    names = (f"{stem}{'.messages' * (i > 0)}{i if i > 1 else ''}.jsonl" for i in count())
    free = next(new for name in names if not (new := path.with_name(name)).exists())
    return shlex.quote(str(path)), shlex.quote(str(free))


def folder(path):
    """The refusal of a folder."""
    names = {entry.name for entry in os.scandir(path)}
    if "dataset_dict.json" in names:
        return Unfit("is a folder of splits that datasets saved; give one of the folders in it")
    if {"dataset_info.json", "state.json"} <= names:
        return Unfit("is a folder that datasets saved", f"python -c {shlex.quote(_SAVED)}")
    inside = f"{shlex.quote(str(path))}/*.jsonl"
    return Unfit(f"is a folder; give the files in it, for example {inside}")


def compression(head):
    """Names what compressed a file by its first bytes, if the reader takes it; else None."""
    names = (name for magic, name, _ in _CONTAINERS if head.startswith(magic))
    return next((name for name in names if name in _COMPRESSED), None)


def container(head):
    """The refusal of a file by its first bytes; None for what may be UTF-8 text."""
    for magic, name, program in _CONTAINERS:
        if head.startswith(magic):
            if name == "zip" and b"[Content_Types].xml" in head[:64]:
                name, program = "Excel", f"python -c {shlex.quote(_EXCEL)}"
            return Unfit(f"is {name}, and the reader takes JSONL in UTF-8", program)
    if head[257:262] == b"ustar":
        return Unfit("is a tar archive, and the reader takes JSONL", "tar -xOf")
    if b"\0" in head and not head.lstrip().startswith((b"{", b"[")):
        return Unfit("is binary, and the reader takes JSONL in UTF-8")
    return None


def row(value):
    """The refusal of a line that is JSON but holds neither ``messages`` nor ``text``."""
    lines = _LINES.replace(" r ", " l ")
    if isinstance(value, list) and value and not is_messages(value):
        return _array("a JSON array", value[0], f"{lines} for r in l", ".[]")
    if inside := rows_inside(value):
        return _under(*inside, f"{lines} for r in l")
    if isinstance(value, dict) and value.get("input_ids") is not None:
        return Unfit('"input_ids" without "labels"; labels are -100 where a token is not to be learned')
    if isinstance(value, dict) and isinstance(value.get("label"), bool):
        reason = f'{EXPECTED}; rows whose "label" is false are answers not to learn from, so keep the others first'
        return Unfit(reason, "jq -c 'select(.label) | del(.label)'")
    if shape := shape_of(value):
        return Unfit(f"{EXPECTED}, got {shape.name}", python(shape.expression))
    if not isinstance(value, dict) or not value:
        return Unfit(f"{EXPECTED}, got {json.dumps(value)[:60]}")
    keys = ", ".join(repr(key[:60]) for key in [*value][:8])
    fill_in = "name the right ones for QUESTION and ANSWER"
    return Unfit(f"{EXPECTED}, got the keys {keys} ({fill_in})", _FILL_IN)


def _under(key, rows, every):
    """The refusal of rows under a key of one object."""
    key, name = quoted(key), f"rows under the key {key[:60]!r}"
    return _array(name, rows[0], f"{every}[{key}]", f".[{key}][]")


def _array(name, first, rows, query):
    """The refusal of many rows in one value, ``first`` being the first of them."""
    name = f"{name}, and the reader takes one object a line"
    if isinstance(first, dict) and {"messages", "text"} & {*first}:
        return Unfit(name, f"jq -c {shlex.quote(query)}")
    if shape := shape_of(first):
        return Unfit(f"{name}; the rows are {shape.name}", python(shape.expression, rows))
    if isinstance(first, dict):
        return Unfit(name, f"jq -c {shlex.quote(query)}")
    return Unfit(f"{EXPECTED}, got an array")


def behind_the_value(rest, column):
    """The refusal of a line that goes on behind its value."""
    if rest.strip() == ",":
        return Unfit(f"not JSON (a comma at column {column})", "sed 's/},[[:space:]]*$/}/'")
    if rest.lstrip()[:1] in ("{", "["):
        return Unfit(f"not JSON (a second value at column {column})", "jq -c .")
    return NotJson(f"not JSON (Extra data at column {column})")


def beginning(head, path):
    """The refusal of a file by a ``head`` whose first line is not JSON; None if it says nothing."""
    suffix, line = Path(path).suffix.lower(), head.partition("\n")[0].strip()
    head = head.lstrip()
    if head.startswith("{'"):
        return Unfit("not JSON but Python's notation, with single quotes", _LITERALS)
    if head.startswith(("[", "{")):
        return _json(head)
    if suffix in (".yaml", ".yml") or re.match(r"---$|- \w+:", line):
        return Unfit("is YAML, and the reader takes JSONL", _YAML)
    if line.startswith("version https://git-lfs"):
        return Unfit("is a pointer of Git LFS, not the data; git lfs pull fetches them")
    if line.startswith("<"):
        return Unfit("is HTML or XML, and the reader takes JSONL")
    if found := _columns(head, line, suffix):
        return found
    if suffix in (".txt", ".md", ".text"):
        return Unfit("is text, and the reader takes JSONL", _PROSE)
    return None


def _json(head):
    """The refusal of a value over several lines, as far as ``head`` shows it."""
    if head[0] == "[":
        first = _decode(head[1:].lstrip())
        if is_messages([first]):
            rows = f"for r in [{_WHOLE}]"
            program = python(shape_of([first]).expression, rows)
            return Unfit("a JSON array over several lines", program)
        if first is None and not re.match(r"\[\s*([\[{\"]|$)", head):
            return None
        return _array("a JSON array", first or {"text": ""}, f"for r in {_WHOLE}", ".[]")
    value = _decode(head)
    if inside := rows_inside(value):
        return _under(*inside, f"for r in {_WHOLE}")
    if isinstance(value, dict) or re.match(r'\{\s*\n\s*"', head):
        return Unfit("an object over several lines, and the reader takes one a line", "jq -c .")
    if found := re.match(r'\{\s*"(\w+)"\s*:\s*\[\s*(?=\{)', head):
        first = _decode(head[found.end() :])
        if first and not is_messages([first]):
            return _under(found[1], [first], f"for r in {_WHOLE}")
    return None


def _columns(head, line, suffix):
    """The refusal of comma-separated values or the like."""
    mark = max("\t,;|", key=line.count)
    columns = [column.strip() for column in line.replace('"', "").split(mark)]
    header = len(columns) > 1 and all(re.fullmatch(r"\w[\w .-]{0,39}", c) for c in columns)
    if suffix not in (".csv", ".tsv") and not header:
        return None
    first = {column: "x" for column in columns}
    with suppress(csv.Error, StopIteration):
        rows = csv.DictReader(io.StringIO(head, newline=""), delimiter=mark)
        first = {key: value for key, value in next(rows).items() if isinstance(key, str)}
    if "text" in first:
        expression = '{"text": r["text"]}'
    elif "messages" in first:
        expression = decoded("messages")
    else:
        shape = shape_of(first)
        expression = shape.expression if shape else "r"
    rows = f'for r in csv.DictReader({_FILE[:-1]}, newline=""), delimiter={json.dumps(mark)})'
    modules = "csv, json, sys; csv.field_size_limit(2**31 - 1)"
    return Unfit("is CSV, and the reader takes JSONL", python(expression, rows, modules))


def _decode(text):
    """The first JSON value of a text, None if there is none."""
    try:
        return json.JSONDecoder().raw_decode(text)[0]
    except (ValueError, RecursionError):
        return None
