"""A row of data as a :class:`Record`: messages, text or tokens, under the names that are common for them."""

from typing import Any, NamedTuple

from .._terminal import printable
from . import formats
from .formats import Unfit
from .messages import check, check_tools
from .shapes import ALIASES, SYSTEM, known_shape
from .spoken import SWITCHES
from .strict_json import parse

LONGEST = 1 << 22  # bytes of a line: about a million tokens, which no row of a batch holds
IGNORE = -100
BOM = b"\xef\xbb\xbf"
_MASKS = ("loss_mask", "completion_mask", "assistant_masks", "seq_lengths")


class DataError(ValueError):
    """A line that cannot be trained on: which file, which line, why. The message is one line."""

    def __init__(self, path, line, reason):
        super().__init__(printable(f"{path}:{line}: {reason}" if line else f"{path}: {reason}"))
        self.path, self.line, self.reason = path, line, reason


class Record(NamedTuple):
    """One row: a conversation (``messages`` and the template's ``tools``), plain ``text``, or ``tokens``."""

    path: str
    line: int
    messages: list[dict[str, Any]] | None
    text: str | None
    tools: list | None
    tokens: tuple[list[int], list[int]] | None = None  # ids and labels

    def error(self, reason):
        return DataError(self.path, self.line, reason)


def record_of(path, number, line):
    """The :class:`Record` of a line as :meth:`.sources.Source.lines` yields it.

    Raises :class:`~.formats.Unfit` with the reason not to take it.
    """
    if isinstance(line, Unfit):
        raise line
    if line is None:
        raise Unfit(f"longer than {LONGEST >> 20} MiB")
    try:
        text = line.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 ({error.reason} at byte {error.start}); name its encoding for ENCODING"
        raise Unfit(reason, "iconv -f ENCODING -t UTF-8") from error
    row = parse(text)
    if not isinstance(row, dict):
        raise formats.row(row)
    if row.get("input_ids") is not None and row.get("labels") is not None:
        return Record(path, number, None, None, None, _tokens(row))
    if row.get("messages") is None and (kind := known_shape(row)):
        row = _READERS[kind](row)
    messages, text = row.get("messages"), row.get("text")
    if messages is None and text is None and "messages" not in row and "text" not in row:
        raise formats.row(row)
    if messages is not None and text is not None:
        program = formats.python('{k: r[k] for k in r if k != "text"}')
        raise Unfit(f"{formats.EXPECTED}, got both", program)
    if text is None and "messages" in row:
        return Record(path, number, check(row), None, check_tools(row.get("tools")))
    if not isinstance(text, str) or not text.strip():
        raise Unfit('"text" is empty or not a string')
    return Record(path, number, None, text, None)


def is_blank(line):
    """True for a line with nothing in it but space."""
    return line is not None and (line.isspace() or line.strip() in (b"", BOM))


def _tokens(row):
    """``(ids, labels)`` of a row that brings both, without the tokens that its attention mask leaves out."""
    ids, labels = row["input_ids"], row["labels"]
    for name, values in (("input_ids", ids), ("labels", labels)):
        if not isinstance(values, list) or not values or not all(type(v) is int for v in values):
            raise Unfit(f'"{name}" is not a list of token ids')
    for key in _MASKS:
        if row.get(key) is not None:
            raise Unfit(f'"{key}" beside "labels" is not supported; write {IGNORE} into the labels')
    attended = row.get("attention_mask")
    attended = [1] * len(ids) if attended is None else attended
    if not isinstance(attended, list) or any(type(v) is not int or v not in (0, 1) for v in attended):
        raise Unfit('"attention_mask" is not a list of 0 and 1')
    if not len(ids) == len(labels) == len(attended):
        raise Unfit(f'"input_ids" has {len(ids)} entries, "labels" {len(labels)}, "attention_mask" {len(attended)}')
    if min(ids) < 0 or (min(labels) < 0 and any(label < 0 and label != IGNORE for label in labels)):
        raise Unfit(f"a token id below 0; only labels may be {IGNORE}")
    if max(*ids, *labels) >= 1 << 31:
        raise Unfit("a token id of 2³¹ or more")
    positions = row.get("position_ids")
    if positions is not None and positions != [*range(len(ids))]:
        raise Unfit('"position_ids" do not count from 0 up, as in a row of several examples; give each a line')
    there = [i for i, seen in enumerate(attended) if seen]
    if len(there) < len(ids):
        ids, labels = [ids[i] for i in there], [labels[i] for i in there]
    if not ids:
        raise Unfit('"attention_mask" leaves no token')
    return ids, labels


def _conversation(row):
    """ShareGPT: ``conversations`` of ``from`` and ``value``, or of ``role`` and ``content``."""
    said = row["conversations"]
    if not isinstance(said, list) or not said:
        raise Unfit('"conversations" is empty or not a list')
    return _row(row, ("conversations", "text"), _messages(said))


def _instruction(row):
    """Alpaca: ``instruction``, perhaps with ``input``, and ``output``; ``history`` holds pairs said before."""
    asked = [_string(row, key) for key in ("instruction", "input")]
    question = "\n\n".join(filter(str.strip, asked))
    if not question:
        raise Unfit('"instruction" is empty')
    history = row.get("history") or []
    if not isinstance(history, list) or not all(_is_pair(pair) for pair in history):
        raise Unfit('"history" is not a list of pairs of strings')
    said = [*(text for pair in history for text in pair), question, _answer(row, "output")]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    return _row(row, ("instruction", "input", "output", "history", "text"), messages)


def _completion(row):
    """``prompt`` and ``completion``, each a string or a list of messages. The prompt's own turns have no loss."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list):
        messages = _messages(prompt)
        for message in messages:
            if message.get("role") == "assistant" and not any(name in message for name in SWITCHES):
                message["weight"] = 0
    else:
        messages = [{"role": "user", "content": _string(row, "prompt")}]
    if isinstance(completion, list):
        messages += _messages(completion)
    else:
        messages.append({"role": "assistant", "content": _answer(row, "completion")})
    return _row(row, ("prompt", "completion", "label", "text"), messages)


_READERS = {"conversations": _conversation, "instruction": _instruction, "completion": _completion}


def _row(row, used, messages):
    """``row`` with ``messages`` in the place of the keys that they come from, the system prompt in front."""
    for key in SYSTEM:
        if isinstance(row.get(key), str) and messages[0].get("role") not in ("system", "developer"):
            used = (*used, key)
            messages = [{"role": "system", "content": row[key]}] * bool(row[key].strip()) + messages
    return {**{key: value for key, value in row.items() if key not in used}, "messages": messages}


def _messages(said):
    messages = []
    for i, message in enumerate(said):
        if not isinstance(message, dict):
            raise Unfit(f"message {i} is not an object")
        name, content = ("value", message.get("value")) if "value" in message else ("content", message.get("content"))
        role = message.get("from", message.get("role"))
        made = {key: value for key, value in message.items() if key not in ("from", "value", "role", "content")}
        if content is not None and not isinstance(content, str):
            raise Unfit(f'message {i}: "{name}" is not a string')
        if role == "function_call":
            made |= {"role": "assistant", "content": "", "tool_calls": _calls(i, content)}
        else:
            made |= {"role": ALIASES.get(role, role) if isinstance(role, str) else role, "content": content}
        messages.append(made)
    return messages


def _calls(i, content):
    try:
        calls = parse(content or "")
    except Unfit as error:
        raise Unfit(f"message {i}: a function_call is not JSON ({error.reason})") from error
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]


def _string(row, key):
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise Unfit(f'"{key}" is not a string')
    return value or ""


def _answer(row, key):
    answer = _string(row, key)
    if not answer.strip():
        raise Unfit(f'"{key}" is empty, so there is no answer to learn')
    return answer


def _is_pair(pair):
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
