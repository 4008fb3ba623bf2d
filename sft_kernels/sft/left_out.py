"""Does a chat template render all that an assistant's message has a model say?"""

from .endings import Refused
from .spoken import has_parts, missing_part, printed_as_python, said_by, with_marks


def check_ends(message, endings):
    """Raise :class:`~.endings.Refused` if the message's words would end its turn."""
    for part, text in said_by(message):
        for end in endings:
            if end in text:
                raise Refused(f"the assistant's {part} contain {end}, which ends a turn")


def check_words(message, said, special):
    """Raise :class:`~.endings.Refused` if ``said``, the text of a turn, lacks words of its ``message``.

    ``special`` matches special tokens, which are left out of both.
    """
    if part := missing_part(message, special.sub(" ", said), lambda text: special.sub(" ", text)):
        raise _left_out(part)
    if name := printed_as_python(message, said):
        raise Refused(
            f"the chat template prints the arguments of {name!r} as a Python dict, which is no JSON; give them as a "
            "JSON string"
        )


def check_parts(message, render):
    """Raise :class:`~.endings.Refused` if the template leaves out a part whose words may stand there for another one.

    ``render(changed)`` renders the turn with another message, whose every part is found nowhere else. If the template
    refuses that one (because it looks up a call's name, say) nothing more is asked.
    """
    if has_parts(message):
        changed, marks = with_marks(message)
        _check_marks(marks, lambda: render(changed))


def check_rendered(messages, text, endings, render):
    """All checks of all assistants' messages in ``text``, the conversation; ``render(messages)`` renders another."""
    changed, marks = [], []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            try:
                check_ends(message, endings.all)
                check_words(message, text, endings.special)
            except Refused as error:
                raise Refused(f"message {i}: {error}") from error
            message, more = with_marks(message, first=len(marks)) if has_parts(message) else (message, [])
            marks += more
        changed.append(message)
    if marks:
        _check_marks(marks, lambda: render(changed))


def _check_marks(marks, render):
    try:
        text = render()
    except Refused:
        return
    for part, mark in marks:
        if mark not in text:
            raise _left_out(part)


def _left_out(part):
    return Refused(f"the chat template leaves out {part}, so the model would be taught to leave it out")
