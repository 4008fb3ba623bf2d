"""A conversation's messages and tools, checked before a chat template sees them."""

from .formats import Unfit, python
from .shapes import ALIASES, SYSTEM, decoded, mended, with_system, with_tools
from .strict_json import parse

ROLES = ("system", "developer", "user", "assistant", "tool")
_THOUGHTS = {"reasoning_content", "reasoning", "thinking"}
_SWITCHES = {"weight", "train", "training", "loss"}  # whether a turn carries loss


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
    for key in SYSTEM:
        if row.get(key) and isinstance(row[key], str):
            roles = [m.get("role") for m in messages if isinstance(m, dict)]
            if "system" not in roles and "developer" not in roles:
                reason = f'"{key}" beside "messages"; a system prompt is the first message'
                raise Unfit(reason, python(with_system(key)))


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
    return bool(message.get("tool_calls")) or any(message.get(name) for name in _THOUGHTS)


def _extras(i, message, messages):
    """Check what a message holds beside role and content; returns whether it asks for no loss."""
    role, who = message["role"], f"message {i} ({message['role']})"
    if calls := message.get("tool_calls"):
        if role != "assistant":
            raise Unfit(f"{who} has tool calls, which only an assistant makes")
        if not isinstance(calls, list):
            raise Unfit(f"{who}: tool_calls is not a list")
        for j, call in enumerate(calls):
            _call(f"{who}, tool call {j}", call)
    if message.get("function_call"):
        raise _content(i, message, messages)
    for name in [key for key in message if key in _THOUGHTS]:
        if message[name] is not None and not isinstance(message[name], str):
            raise Unfit(f'{who}: "{name}" is not a string')
    asked = None
    for name in [key for key in message if key in _SWITCHES]:
        if (value := message[name]) is None:  # a table's way to say that it is not there
            del message[name]
            continue
        if not isinstance(value, (int, float)) or value not in (0, 1):
            kind = "0 or 1" if name == "weight" else "true or false"
            raise Unfit(f'{who}: "{name}" is not {kind}; nothing else is supported')
        if value and role != "assistant":
            reason = f'{who}: "{name}" asks for loss, which only assistant turns carry'
            raise Unfit(reason)
        if asked is not None and asked != value:
            raise Unfit(f'{who}: "{name}" contradicts another key; keep one of them')
        asked = value
    return asked is not None and not asked


def _call(where, call):
    """Check a tool call: an object with ``"function"``, or name and arguments alone."""
    if not isinstance(call, dict):
        raise Unfit(f'{where} is not an object with a "function"')
    function = call if call.get("function") is None else call["function"]
    if not isinstance(function, dict):
        raise Unfit(f'{where}: "function" is not an object with "name" and "arguments"')
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name.strip():
        raise Unfit(f"{where} has no name")
    if isinstance(arguments, dict) or arguments == "":
        return
    if isinstance(arguments, str):
        try:
            arguments = parse(arguments)
        except Unfit as error:
            raise Unfit(f"{where}: arguments is no JSON object ({error.reason})") from error
        if isinstance(arguments, dict):
            return
        raise Unfit(f"{where}: arguments is a string, but not that of a JSON object")
    if arguments is None:
        raise Unfit(f'{where} has no arguments; write "arguments": {{}} if it takes none')
    raise Unfit(f"{where}: arguments is neither an object nor a JSON object as a string")
