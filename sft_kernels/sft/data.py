"""Conversations from JSONL, checked line by line before anything is trained."""

import json
from pathlib import Path
from typing import Any, NamedTuple

ROLES = ("system", "user", "assistant", "tool")


class DataError(ValueError):
    """A line that cannot be trained on: which file, which line, why."""

    def __init__(self, path, line, reason):
        super().__init__(f"{path}:{line}: {reason}" if line else f"{path}: {reason}")
        self.path, self.line, self.reason = path, line, reason


class Record(NamedTuple):
    """One line: a conversation (``messages``, and ``tools`` for the template), or plain ``text``."""

    path: str
    line: int
    messages: list[dict[str, Any]] | None
    text: str | None
    tools: list | None

    def error(self, reason):
        return DataError(self.path, self.line, reason)


def read_jsonl(path, bad=None):
    """The records of a UTF-8 file with one JSON object a line; blank lines are passed over.

    A line is ``{"messages": [{"role": …, "content": …}, …]}``, optionally with ``"tools"``, or ``{"text": …}``. The
    first bad line raises :class:`DataError`; given a list as ``bad``, each is appended there and left out. A file
    without any record raises in either case.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(path, None, "no such file")
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(_record(str(path), number, line))
        except DataError as error:
            if bad is None:
                raise
            bad.append(error)
    if not records:
        raise DataError(path, None, "no conversation in it" if not bad else "no usable conversation in it")
    return records


def _record(path, number, line):
    def fail(reason):
        raise DataError(path, number, reason)

    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        fail(f"not UTF-8 ({error.reason} at byte {error.start})")
    except json.JSONDecodeError as error:
        fail(f"not JSON ({error.msg} at column {error.colno})")
    if b"\\ud" in line.lower():
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            fail("half a surrogate pair, which is no character")
    if not isinstance(row, dict) or ("messages" in row) == ("text" in row):
        fail('expected an object with either "messages" or "text"')
    if "text" in row:
        if not isinstance(row["text"], str) or not row["text"].strip():
            fail('"text" is empty or not a string')
        return Record(path, number, None, row["text"], None)

    messages, tools = row["messages"], row.get("tools")
    if not isinstance(messages, list) or not messages:
        fail('"messages" is empty or not a list')
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            fail(f"message {i} is not an object")
        if message.get("role") not in ROLES:
            fail(f"message {i} has unknown role {message.get('role')!r}; expected one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            fail(f"message {i} ({message['role']}) has neither a string as content nor tool calls")
    if not any(m["role"] == "assistant" and (m.get("content") or m.get("tool_calls")) for m in messages):
        fail("no assistant turn to learn from")
    if tools is not None and not isinstance(tools, list):
        fail('"tools" is not a list')
    return Record(path, number, messages, None, tools)
