"""The assistant's turns in a conversation: texts to train on, and where in them the model speaks.

A turn may be learned in a text that begins with the turn's own prompt, followed by what the model has to say to it
(:class:`~.templates.Turn`). The text of the whole conversation is one such text for all of its turns, unless the
template renders a turn in another way once others follow.
"""

import re

from .spoken import carries_loss
from .templates import Refused, Span

_EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\s*")
_EXACT = 4  # turns at either end of a conversation that are compared with their whole prompt


def find_turns(template, messages, tools, split):
    """The texts to train on, each with the :class:`Span` of every turn that is learned in it.

    Args:
        template: a :class:`~.templates.ChatTemplate`.
        messages: a conversation; every assistant's message that carries loss is a turn to learn.
        tools: for the template.
        split: true gives a turn that the whole conversation renders differently a text of its own, the conversation
            up to that turn. One text serves all turns that are right in it.

    Returns:
        A list of ``(text, spans)``; each turn is in one of them, those of a text in their order.

    Raises:
        Refused: a turn cannot be had, with the number of its message.

    Without ``split`` a turn may lack the empty thinking block with which the template begins a last turn (Qwen3).
    """
    locate = _Locator(template, messages, tools, split)
    wanted = [i for i, message in enumerate(messages) if carries_loss(message)]
    spans, rest = [], []
    for place, i in enumerate(wanted):
        left = len(wanted) - 1 - place
        exact = place < _EXACT or left < _EXACT or left & (left - 1) == 0
        try:
            span, turn = locate(i, exact)
            if span is None and not split:
                raise Refused(f"{locate.difference(turn)}; --split-turns makes it an example of its own")
        except Refused as error:
            raise Refused(f"message {i}: {error}") from error
        if span:
            spans.append(span)
        else:
            rest.append(turn)
    found = [(locate.text, spans)] if spans else []
    while rest:
        text = rest[-1].prompt + rest[-1].said
        here = [turn.options == rest[-1].options and text.startswith(turn.prompt + turn.said) for turn in rest]
        found.append((text, [_span(turn) for turn, right in zip(rest, here, strict=True) if right]))
        rest = [turn for turn, right in zip(rest, here, strict=True) if not right]
    return found


class _Locator:
    """Finds turns in the text of the whole conversation, one after the other."""

    def __init__(self, template, messages, tools, split):
        self.template, self.messages, self.tools, self.split = template, messages, tools, split
        self.roles = [message["role"] for message in messages]
        self.text = template.render(messages, tools)
        self.marks = template.marked(messages, tools) if template.marks_turns else None
        self.known = None  # the turn before: its message, and where in the text its prompt ends

    def __call__(self, i, exact):
        """``(span, turn)`` of message ``i``: a :class:`Span` if the text has the turn, else the turn alone."""
        turn, span = None, None if exact or self.known is None else self._in_window(i)
        if span is None:
            whole = self.text if i == len(self.messages) - 1 else None
            turn = self.template.turn(self.messages[:i], self.messages[i], self.tools, whole)
            if turn.borrowed and whole == (turn.prompt + turn.said).removesuffix(turn.borrowed):
                self.text += turn.borrowed
            if not self.text.startswith(turn.prompt):
                self.known = None
                return None, turn
            self.known = i, len(turn.prompt)
            span = self._at(len(turn.prompt), turn)
            if span is None:
                return None, turn
        self.known = i, span.start
        if self.marks is not None and self.template.unmarked(self.text, self.marks, span):
            return None, turn or self.template.turn(self.messages[:i], self.messages[i], self.tools)
        return span, turn

    def _in_window(self, i):
        """The span of message ``i``, compared with a conversation of the messages around it alone, or None.

        The window begins a few messages before the last turn whose prompt is known to end at some place of the text.
        What the template renders behind that place must be in the text as it is in the window.
        """
        j, start = self.known
        head, first = self._window(j)
        if first is None:
            return None
        messages = self.messages
        try:
            anchor = self.template.render(head + messages[first:j], self.tools, add_generation_prompt=True)
            turn = self.template.turn(head + messages[first:i], messages[i], self.tools)
        except Refused:
            return None
        if turn.options or not turn.prompt.startswith(anchor):
            return None
        if not self.text.startswith(turn.prompt[len(anchor) :], start):
            return None
        return self._at(start + len(turn.prompt) - len(anchor), turn)

    def _at(self, start, turn):
        """The :class:`Span` of ``turn`` at ``start`` of the text, or None if the text goes on otherwise there."""
        if self.text.startswith(turn.said, start):
            return Span(start, start + len(turn.said), len(turn.end))
        thought = _EMPTY_THOUGHT.match(turn.said)
        if self.split or not thought or not self.text.startswith(turn.said[thought.end() :], start):
            return None
        self.template.note(
            "some turns lose their empty thinking block once others follow and are learned without it; --split-turns "
            "learns each as if it were the last"
        )
        return Span(start, start + len(turn.said) - thought.end(), len(turn.end))

    def _window(self, j):
        """``(head, first)``: messages to put in front of the window, and the message with which it begins.

        It begins with the user's message before ``j``; in a long run of tool calls with the assistant's, the user's
        put in front of it.
        """
        roles = self.roles
        user = next((k for k in reversed(range(j)) if roles[k] == "user"), None)
        if user is None:
            return [], None
        first, head = user, []
        if j - user > 4:
            first = next((k for k in range(j - 4, j) if roles[k] == "assistant"), None)
            head = [self.messages[user]]
        system = self.messages[:1] if roles[0] in ("system", "developer") and user > 0 else []
        return system + head, first

    def difference(self, turn):
        """Says in which way the text does not have ``turn``."""
        if not self.text.startswith(turn.prompt):
            return "the chat template renders the messages before it differently once others follow"
        there = self.text[len(turn.prompt) :]
        if there.startswith(turn.said):
            return "the chat template marks it with {% generation %} only if it is the last"
        if turn.end and there.startswith(turn.said[: -len(turn.end)]):
            found = there[len(turn.said) - len(turn.end) :][: len(turn.end)]
            return f"only its end token differs: {turn.end!r} if it is the last, {found!r} once others follow"
        at = next((i for i, (a, b) in enumerate(zip(turn.said, there, strict=False)) if a != b), len(there))
        at = max(0, at - 10)
        return (
            f"the chat template renders it as {there[at : at + 30]!r} once others follow, and as "
            f"{turn.said[at : at + 30]!r} if it is the last"
        )


def _span(turn):
    return Span(len(turn.prompt), len(turn.prompt) + len(turn.said), len(turn.end))
