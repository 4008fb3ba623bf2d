"""An assistant's message: does it carry loss, and is all that it has a model say rendered?"""

import json
import re
from itertools import count

REASONING = ("reasoning_content", "reasoning", "thinking")
# A message without loss: OpenAI, Mistral and Together say weight 0, axolotl train or training, ms-swift loss.
SWITCHES = ("weight", "train", "training", "loss")
READ_HERE = ("role", "content", "tool_calls", *REASONING, *SWITCHES)
_THINK_TAG = re.compile(r"</?think(?:ing)?>|\[/?THINK\]")


def carries_loss(message):
    """True for an assistant's message, unless one of :data:`SWITCHES` is 0 or false."""
    off = (key for key in SWITCHES if message.get(key) is not None and not message[key])
    return message["role"] == "assistant" and next(off, None) is None


def switched_off(message):
    """True for an assistant's message that says that it carries no loss."""
    return message["role"] == "assistant" and not carries_loss(message)


def _function(call):
    return call["function"] if isinstance(call.get("function"), dict) else call


def _map_calls(message, change):
    """A copy of ``message`` with ``change(name, arguments)`` as name and arguments of every call."""
    calls = []
    for call in message["tool_calls"]:
        function = _function(call)
        name, arguments = change(function.get("name"), function.get("arguments"))
        changed = {**function, "name": name, "arguments": arguments}
        if "arguments" not in function:
            del changed["arguments"]
        calls.append({**call, "function": changed} if function is not call else changed)
    return {**message, "tool_calls": calls}


def with_argument_objects(messages):
    """``messages`` with every call's arguments as an object, also if they came as a JSON string (OpenAI's format).

    An empty string is the empty object.
    """

    return [
        _map_calls(m, lambda name, arguments: (name, _parsed(arguments))) if m.get("tool_calls") else m
        for m in messages
    ]


def _parsed(arguments):
    return json.loads(arguments or "{}") if isinstance(arguments, str) else arguments


def reasonings(message):
    """``(key, text)`` of the message's reasoning, under every name that it has."""
    return [(key, message[key]) for key in REASONING if isinstance(message.get(key), str) and message[key].strip()]


def said_by(message):
    """``(part, text)`` of every string that an assistant's message would have the model say."""
    if isinstance(message.get("content"), str):
        yield "words", message["content"]
    for key, text in reasonings(message):
        yield key, text
    for call in message.get("tool_calls") or ():
        function = _function(call)
        yield "tool call's name", function.get("name") or ""
        for text in _strings(function.get("arguments")):
            yield "tool call's arguments", text


def _strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def words_end(message, text, start):
    """The place in ``text`` behind the last of the message's words, as far as they are there from ``start`` on."""
    parts = (message.get("content") or "", *dict(reasonings(message)).values())
    found = (_find(part, text, start) for part in parts)
    return max((end for end in found if end is not None), default=start)


def missing_part(message, rendered, clean=str):
    """Names the first part of an assistant's message whose words ``rendered`` lacks, or returns None.

    Words and signs of ``clean(part)`` are looked for in their order; the space and the tags around them may differ. Of
    a call these are its name, and the keys and strings of its arguments.
    """
    for part, text in (("the content", message.get("content") or ""), *reasonings(message)):
        if _find(clean(text), rendered) is None:
            return f"{part}, or a part of it"
    at = 0
    for call in message.get("tool_calls") or ():
        function, ends = _function(call), []
        name = function.get("name") or ""
        for part, text in ((f"the tool call's name {name!r}", name), *_arguments(function)):
            ends.append(_find(clean(text), rendered, at))
            if ends[-1] is None:
                return part
        at = max(ends)
    return None


def _arguments(function):
    part = f"the arguments of {function.get('name')!r}"
    return ((part, text) for text in _strings(_parsed(function.get("arguments"))))


def _find(text, rendered, at=0):
    """The end of the words and signs of ``text`` in ``rendered``, in their order; None if one is missing."""
    for word in re.findall(r"\w+|[^\w\s]", _THINK_TAG.sub(" ", text)):
        found = rendered.find(word, at)
        if found < 0:
            return None
        at = found + len(word)
    return at


def has_parts(message):
    """True if a part of the message could be taken for another one, or for words of the template's."""
    content = message.get("content")
    tagged = isinstance(content, str) and _THINK_TAG.search(content)
    return bool(message.get("tool_calls") or reasonings(message) or tagged)


def with_marks(message, first=0):
    """A copy of an assistant's message that says things found nowhere else, and ``(part, text)`` of each.

    A template that renders a part renders its text. Replaced are content (but for its tags) and reasoning, calls'
    names, and the strings and numbers in their arguments; keys, booleans and null stay. ``first`` tells apart the marks
    of several messages.
    """
    number, marks = count(7_301_550_001 + first), {}

    def mark(part, value):
        if isinstance(value, dict):
            return {key: mark(part, item) for key, item in value.items()}
        if isinstance(value, list):
            return [mark(part, item) for item in value]
        if isinstance(value, str):
            word = f"Zq{next(number)}"
            marks[word] = part
            return value.replace(value.strip(), word) if value.strip() else word
        elif isinstance(value, int) and not isinstance(value, bool):
            replaced = next(number)
        elif isinstance(value, float):
            replaced = next(number) + 0.5
        else:
            return value
        marks[str(replaced)] = part
        return replaced

    def change(name, arguments):
        inside = mark(f"the arguments of {name!r}", _parsed(arguments))
        inside = json.dumps(inside) if isinstance(arguments, str) else inside
        return mark(f"the tool call's name {name!r}", name), inside

    changed, content = dict(message), message.get("content")
    if isinstance(content, str):
        pieces = re.split(f"({_THINK_TAG.pattern})", content)
        tagged = (i % 2 or not piece.strip() for i, piece in enumerate(pieces))
        changed["content"] = "".join(
            piece if tag else mark("the content", piece) for tag, piece in zip(tagged, pieces, strict=True)
        )
    same = {}
    for key, text in reasonings(message):
        if text not in same:
            same[text] = mark(key, text)
        changed[key] = same[text]
    if message.get("tool_calls"):
        changed = _map_calls(changed, change)
    return changed, [(part, text) for text, part in marks.items()]


def printed_as_python(message, rendered):
    """The name of a call whose arguments ``rendered`` has as Python writes a dict, which is no JSON; or None."""
    for call in message.get("tool_calls") or ():
        arguments = _function(call).get("arguments")
        if isinstance(arguments, dict):
            python = str(arguments)
            if python in rendered and python != json.dumps(arguments, ensure_ascii=False):
                return _function(call).get("name")
    return None
