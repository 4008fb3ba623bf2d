"""A conversation's messages and tools, checked before a chat template sees them."""

from .formats import Unfit, python
from .shapes import ALIASES, SYSTEM, decoded, mended, with_system, with_tools
from .spoken import REASONING, SWITCHES
from .strict_json import parse

ROLES = ("system", "developer", "user", "assistant", "tool")
_QUESTIONS = ("prompt", "instruction", "question", "context", "input")  # that rows have beside their messages


def check(row):
    """Check ``row["messages"]`` and return them; :class:`~.formats.Unfit` names the bad one."""
    messages = row["messages"]
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        raise Unfit('"messages" is a string, not a list', python(decoded("messages")))
    if not isinstance(messages, list) or not messages:
        raise Unfit('"messages" is empty or not a list')
    _beside(row, messages)
    learns = switched_off = False
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise Unfit(f"message {i} is not an object")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise _unknown_role(i, message, messages)
        off = len(message) > 2 and _extras(i, message, messages)
        if not isinstance(content, str) and (content is not None or not message.get("tool_calls")):
            raise _content(i, message, messages)
        if role == "assistant" and (content or (len(message) > 2 and _acts(message))):
            learns, switched_off = learns or not off, switched_off or off
    if not learns:
        off = ": every one of them is switched off" if switched_off else ""
        raise Unfit(f"no assistant turn to learn from{off}")
    return messages


def check_tools(tools):
    """Return the list of a row's ``"tools"``, or None; the list may come as a JSON string."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = parse(tools)
        except Unfit as error:
            raise Unfit(f'"tools" is a string but not a JSON list ({error.reason})') from error
    if tools is None or tools == "" or (isinstance(tools, str) and not tools.strip()):
        return None
    if not isinstance(tools, list):
        raise Unfit('"tools" is not a list')
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise Unfit(f'"tools": entry {i} is not an object with a name and parameters')
    return tools


def _beside(row, messages):
    """Refuse what stands beside the messages and would be lost."""
    if row.get("chat_template_kwargs"):
        reason = '"chat_template_kwargs" is not supported; write them into the chat template'
        raise Unfit(reason)
    if row.get("functions"):
        raise Unfit('"functions" is OpenAI\'s old name for "tools"', python(with_tools()))
    if row.get("documents"):
        raise Unfit('"documents" beside "messages" is not supported; write them into a message')
    words = [m.get("content") for m in messages if isinstance(m, dict)]
    for key in _QUESTIONS:
        text = row.get(key)
        if isinstance(text, str) and text.strip() and not any(isinstance(w, str) and text.strip() in w for w in words):
            raise Unfit(f'"{key}" beside "messages" says what no message says; put it into one, or take it out')
    for key in SYSTEM:
        if row.get(key) and not isinstance(row[key], str):
            raise Unfit(f'"{key}" beside "messages" is not a string; a system prompt is the first message')
        if row.get(key):
            roles = [m.get("role") for m in messages if isinstance(m, dict)]
            if "system" not in roles and "developer" not in roles:
                reason = f'"{key}" beside "messages"; a system prompt is the first message'
                raise Unfit(reason, python(with_system(key)))
            if not any(isinstance(w, str) and row[key].strip() in w for w in words):
                raise Unfit(f'"{key}" says what no message says, beside a system message; take one of them out')


def _unknown_role(i, message, messages):
    if "from" in message and "value" in message and "role" not in message:
        reason = f'message {i} has "from" and "value" for "role" and "content"'
        return Unfit(reason, _mend(messages))
    role = message.get("role")
    known = isinstance(role, str) and (role in ALIASES or role == "function_call")
    if role is not None and not isinstance(role, str):
        return Unfit(f"message {i}: role is not a string")
    shown = repr(role and role[:60])
    reason = f"message {i} has unknown role {shown}; expected one of {', '.join(ROLES)}"
    return Unfit(reason, _mend(messages) if known else None)


def _content(i, message, messages):
    """The refusal of content that is no string."""
    role, content = message["role"], message.get("content")
    who = f"message {i} ({role})"
    if message.get("function_call"):
        reason = f'{who}: "function_call" is OpenAI\'s old name for one of "tool_calls"'
        return Unfit(reason, _mend(messages))
    if content is None:
        return Unfit(f"{who} has neither a string as content nor tool calls")
    if isinstance(content, list):
        if not all(map(_is_text, content)):
            return Unfit(f"{who} has neither a string as content nor text parts alone")
        return Unfit(f"{who} has parts as content; join their text", _mend(messages))
    kind = "an object" if isinstance(content, dict) else "a number or a boolean"
    reason = f"{who} has neither a string as content nor null but {kind}; write it as a string"
    return Unfit(reason, _mend(messages))


def _is_text(part):
    return isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("text"), str))


def _mend(messages):
    expression = mended(messages)
    return expression and python(expression)


def _acts(message):
    return bool(message.get("tool_calls")) or any(message.get(name) for name in REASONING)


def _extras(i, message, messages):
    """Check what a message holds beside role and content; returns whether it asks for no loss."""
    role = message["role"]

    def fail(reason):
        raise Unfit(f"message {i} ({role}){reason}")

    if calls := message.get("tool_calls"):
        if role != "assistant":
            fail(" has tool calls, which only an assistant makes")
        if not isinstance(calls, list):
            fail(": tool_calls is not a list")
        for j, call in enumerate(calls):
            if fault := _fault(call):
                fail(f": tool call {j} {fault}")
    if message.get("function_call"):
        raise _content(i, message, messages)
    asked = None
    for name in [key for key in message if key in REASONING or key in SWITCHES]:
        value = message[name]
        if name in REASONING:
            if value is not None and not isinstance(value, str):
                fail(f': "{name}" is not a string')
        elif value is None:  # a table's way to say that it is not there
            del message[name]
        elif not isinstance(value, (int, float)) or value not in (0, 1):
            kind = "0 or 1" if name == "weight" else "true or false"
            fail(f': "{name}" is not {kind}; nothing else is supported')
        elif value and role != "assistant":
            fail(f': "{name}" asks for loss, which only assistant turns carry')
        elif asked is not None and asked != value:
            fail(f': "{name}" contradicts another key; keep one of them')
        else:
            asked = value
    return asked is not None and not asked


def _fault(call):
    """A tool call's fault. It is an object with ``"function"``, or name and arguments alone."""
    if not isinstance(call, dict):
        return 'is not an object with a "function"'
    function = call if call.get("function") is None else call["function"]
    if not isinstance(function, dict):
        return 'has a "function" that is not an object with "name" and "arguments"'
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name.strip():
        return 'has no "name" that is a string'
    if isinstance(arguments, dict) or arguments == "":
        return None
    if arguments is None:
        return 'has no "arguments"; write {} if it takes none'
    if not isinstance(arguments, str):
        return 'has "arguments" that are not an object'
    try:
        return None if isinstance(parse(arguments), dict) else _NOT_OBJECT
    except Unfit as error:
        return f"{_NOT_OBJECT} ({error.reason})"


_NOT_OBJECT = 'has "arguments" in a string that is not a JSON object'
