"""Rows that hold a conversation in some other shape, each with the expression that rewrites it.

An expression is Python over a row ``r``. It ends up in a one-liner that a user pastes into a shell.
"""

import json
from contextlib import suppress
from typing import NamedTuple

ALIASES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
_ALWAYS = ("human", "gpt")  # as a later line may well have what the one at hand has not
_QUESTIONS = ("instruction", "prompt", "question", "query", "problem", "input", "user")
_ANSWERS = ("output", "completion", "response", "answer", "chosen", "solution", "assistant")
_MORE = ("input", "context")  # what an instruction is about; often empty
_CHATS = ("conversations", "conversation", "dialogue", "dialog", "chat", "turns")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
SYSTEM = ("system", "system_prompt", "system_message")
_TOOLS = '**{k: r[k] for k in r if k == "tools"}'
_CALLS = '[{"type": "function", "function": c} for c in (v if isinstance(v, list) else [v])]'


def known_shape(row):
    """Names the shape of an object that :mod:`.rows` reads as messages, or returns None."""
    if "conversations" in row and row["conversations"] is not None and not isinstance(row["conversations"], str):
        return "conversations"
    if isinstance(row.get("instruction"), str) and "output" in row:
        return "instruction"
    asked, said = row.get("prompt"), row.get("completion")
    kept = row.get("label", True) is not False  # an answer not to learn from
    return "completion" if kept and isinstance(asked, str | list) and isinstance(said, str | list) else None


class Shape(NamedTuple):
    """A shape by name, and the expression of its rewritten row."""

    name: str
    expression: str


def shape_of(row):
    """The :class:`Shape` of a row that has neither ``messages`` nor ``text``, or None. A row that is read has none."""
    if isinstance(row, str):
        return Shape("a string", '{"text": r}')
    if is_messages(row):
        return Shape("a list of messages", f'{{"messages": {_messages("r", row)}}}')
    if not isinstance(row, dict) or known_shape(row):
        return None
    found = _conversation(row, _CHATS) or _pair(row) or _conversation(row, ("chosen", *row))
    found = found or _encoded(row) or _single(row)
    return found and Shape(found.name, f'r if "messages" in r else {found.expression}')


def is_messages(value):
    """Returns True for a list of messages, by whatever names."""
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value):
    return isinstance(value, dict) and ("role" in value or ("from" in value and "value" in value))


def rows_inside(row):
    """``(key, rows)`` of a list of rows under a key of an object, or None."""
    for key, value in row.items() if isinstance(row, dict) else ():
        if not isinstance(value, list) or not value or is_messages(value):
            continue
        first = value[0]
        if isinstance(first, dict) and ({"messages", "text"} & {*first} or known_shape(first) or shape_of(first)):
            return key, value
    return None


def mended(messages):
    """The expression of a row with other roles, content or calls; None if it needs none."""
    fixed = _messages('r["messages"]', messages)
    return f'{{**r, "messages": {fixed}}}' if fixed != 'r["messages"]' else None


def quoted(key):
    """A key as both Python and JSON write it."""
    return json.dumps(key, ensure_ascii=False)


def with_system(key):
    """The expression that makes the system prompt beside ``"messages"`` the first message."""
    others = f"**{{k: r[k] for k in r if k != {quoted(key)}}}"
    return f'{{{others}, "messages": {_system([key])} + r["messages"]}}'


def with_tools():
    """The expression that makes OpenAI's old ``"functions"`` the tools they became."""
    calls = '[{"type": "function", "function": f} for f in r.get("functions") or []]'
    return f'{{**{{k: r[k] for k in r if k != "functions"}}, "tools": {calls}}}'


def decoded(key):
    """The expression that reads what stands under ``key`` as a JSON string."""
    key = quoted(key)
    return f"{{**r, {key}: json.loads(r[{key}]) if isinstance(r[{key}], str) else r[{key}]}}"


def _system(keys):
    """The expression of the system prompt's message, in a list that may be empty."""
    prompt = f"r.get({quoted(next((key for key in SYSTEM if key in keys), SYSTEM[0]))})"
    return f'[{{"role": "system", "content": {prompt}}}] * bool({prompt})'


def _row(keys, messages):
    return f'{{"messages": {_system(keys)} + {messages}, {_TOOLS}}}'


def _pair(row):
    """One question and one answer: Alpaca, prompt and completion, and the like."""
    question = next((key for key in _QUESTIONS if _said(row.get(key))), None)
    answer = next((key for key in _ANSWERS if _said(row.get(key)) and key != question), None)
    if question is None or answer is None:
        return None
    asked, reply = f"r[{quoted(question)}]", f"r[{quoted(answer)}]"
    first = "user"
    if is_messages(row[question]):
        first = row[question][0].get("role")
        asked = _messages(asked, row[question])
    else:
        more = [key for key in _MORE if key not in (question, answer)]  # other rows may have what this one lacks
        if not all(isinstance(row.get(key), str | None) for key in more):
            return None
        gets = ", ".join(f"r.get({quoted(key)})" for key in more)
        asked = f'"\\n\\n".join(filter(None, [{asked}, {gets}]))'
        asked = f'[{{"role": "user", "content": {asked}}}]'
    if is_messages(row[answer]):
        reply = _messages(reply, row[answer])
        if "rejected" in row and row[answer][0].get("role") == first:  # it begins with the prompt
            return Shape("a preference", f'{{"messages": {reply}, {_TOOLS}}}')
    else:
        thought = next((key for key in _THOUGHTS if isinstance(row.get(key), str)), None)
        thought = f', "reasoning_content": r.get({quoted(thought)})' if thought else ""
        reply = f'[{{"role": "assistant", "content": {reply}{thought}}}]'
    earlier = ""
    if "history" in row:
        turns = 'for t in r.get("history") or [] for s, c in zip(("user", "assistant"), t)'
        earlier = f'[{{"role": s, "content": c}} {turns}] + '
    return Shape(f'"{question}" and "{answer}"', _row(row, f"{earlier}{asked} + {reply}"))


def _said(value):
    return isinstance(value, str) or is_messages(value)


def _conversation(row, keys):
    """A list of messages under another key: ShareGPT, Gemini, and the like."""
    for key in keys:
        if is_messages(value := row.get(key)) and "systemInstruction" not in row and _has_both_sides(value):
            messages = _messages(f"r[{quoted(key)}]", value)
            return Shape(f"a conversation in {key[:60]!r}", _row(row, messages))
    return None


def _has_both_sides(messages):
    """Returns True if a list of messages has a user's and another one's, and is not half a conversation."""
    roles = {m.get("role", m.get("from")) for m in messages}
    asked = {role for role in roles if ALIASES.get(role, role) == "user"}
    return bool(asked) and len(roles) > 1


def _encoded(row):
    """A conversation that is a string of JSON, as columns of tables often are."""
    for key, value in row.items():
        if isinstance(value, str) and value.lstrip().startswith("[{"):
            with suppress(ValueError, RecursionError):
                if is_messages(json.loads(value)):
                    return Shape(f"a conversation as a string in {key[:60]!r}", decoded(key))
    return None


def _single(row):
    """Nothing but text under another key."""
    texts = [key for key, value in row.items() if isinstance(value, str) and len(value) > 0]
    if len(texts) == 1 and not any(isinstance(value, list | dict) for value in row.values()):
        return Shape(f"a text in {texts[0][:60]!r}", f'{{"text": r[{quoted(texts[0])}]}}')
    return None


def _messages(source, messages):
    """The expression of messages with this project's roles, strings as content, and tool calls."""
    said = [m for m in messages if isinstance(m, dict)]
    role, content = "role", "content"
    if not any("role" in m for m in said):
        role, content = "from", "value"
    elif any("parts" in m for m in said) and not any("content" in m for m in said):
        content = "parts"
    roles = [m.get(role) for m in said if isinstance(m.get(role), str)]
    moved = [key for key in (role, content) if key not in ("role", "content")]
    fields = []
    if role != "role" or any(name in ALIASES for name in roles):
        names = {name: to for name, to in ALIASES.items() if name in roles or name in _ALWAYS}
        fields.append(f'"role": {json.dumps(names)}.get(m["{role}"], m["{role}"])')
    words = f'c := m.get("{content}")'
    if any(isinstance(m.get(content), list) for m in said):
        joined = '"".join(p if isinstance(p, str) else p["text"] for p in c)'
        fields.append(f'"content": {joined} if isinstance({words}, list) else c')
    elif any(not isinstance(m.get(content), str | None) for m in said):
        fields.append(f'"content": c if isinstance({words}, (str, type(None))) else json.dumps(c)')
    elif content != "content":
        fields.append(f'"content": m["{content}"]')
    if any(m.get("function_call") for m in said):
        moved.append("function_call")
        calls = '[{"type": "function", "function": m["function_call"]}]'
        fields.append(f'**({{"tool_calls": {calls}}} if m.get("function_call") else {{}})')
    if not fields:
        return source
    rest = f"**{{k: m[k] for k in m if k not in {json.dumps(moved)}}}" if moved else "**m"
    made = f"{{{rest}, {', '.join(fields)}}}"
    if "function_call" in roles:  # a turn that is nothing but calls, as JSON
        calls = f'{{"role": "assistant", "content": "", "tool_calls": {_CALLS}}}'
        calls = f'(lambda v: {calls})(json.loads(m["{content}"]))'
        made = f'{calls} if m["{role}"] == "function_call" else {made}'
    return f"[{made} for m in {source}]"
