"""The assistant's turns in a conversation: texts to train on, and where in them the model speaks.

A turn may be learned in a text that begins with the turn's own prompt, followed by what the model has to say to it
(:class:`~.templates.Turn`). The text of the whole conversation is one such text for all of its turns, unless the
template renders a turn in another way once others follow.
"""

import re

from .endings import Refused
from .spoken import carries_loss
from .templates import Span

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
        try:
            span, turn = locate(i, exact=min(place, len(wanted) - 1 - place) < _EXACT)
        except Refused as error:
            raise Refused(f"message {i}: {error}") from error
        if span:
            spans.append(span)
        elif split:
            rest.append(turn)
        elif not locate.text.startswith(turn.prompt + turn.said) and (
            found := _in_last(template, messages, tools, wanted)
        ):
            return found
        else:
            raise Refused(f"message {i}: {locate.difference(turn)}; --split-turns makes it an example of its own")
    found = [(locate.text, spans)] if spans else []
    while rest:
        text, here = _shared(rest)
        found.append((text, [_span(turn) for turn, right in zip(rest, here, strict=True) if right]))
        rest = [turn for turn, right in zip(rest, here, strict=True) if not right]
    return found


def _shared(turns):
    """The text of the last of ``turns``, and for each of them whether it is right in it."""
    last = turns[-1]
    text = last.prompt + last.said
    return text, [turn.options == last.options and text.startswith(turn.prompt + turn.said) for turn in turns]


def _in_last(template, messages, tools, wanted):
    """The one text of :func:`find_turns` if the last turn's own prompt and words have all other turns, else None.

    That is so if the template changes a prompt only once it is answered.
    """
    turns = []
    for i in (wanted[-1], *wanted[:-1]):
        try:
            turns.append(template.turn(messages[:i], messages[i], tools))
        except Refused:
            return None
        text, here = _shared([*turns[1:], turns[0]])
        if not all(here):
            return None
    return [(text, [_span(turn) for turn in (*turns[1:], turns[0])])]


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
            known = (self.text, self.marks) if i == len(self.messages) - 1 else ()
            turn = self.template.turn(self.messages[:i], self.messages[i], self.tools, *known)
            if turn.borrowed and known and self.text == (turn.prompt + turn.said).removesuffix(turn.borrowed):
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
        messages = self.messages
        known = head + messages[first:j]
        try:
            turn = self.template.turn(head + messages[first:i], messages[i], self.tools)
            anchor = self.template.render(known, self.tools, add_generation_prompt=True) if known else None
            if anchor is None or not turn.prompt.startswith(anchor):
                anchor = self.template.turn(known, messages[j], self.tools).prompt
        except Refused:
            return None
        if not turn.prompt.startswith(anchor) or not self.text.startswith(turn.prompt[len(anchor) :], start):
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
        first, head = user, []
        if user is None or j - user > 4:
            first = next((k for k in range(max(0, j - 4), j) if roles[k] == "assistant"), j)
            head = [] if user is None else [self.messages[user]]
        system = self.messages[:1] if roles[0] in ("system", "developer") and first > 0 else []
        return system + head, first

    def difference(self, turn):
        """Says in which way the text does not have ``turn``."""
        if not self.text.startswith(turn.prompt):
            if turn.options:
                prompt = f"the one with {turn.switches}"
                return f"only the generation prompt differs: this turn follows {prompt}, the others do not"
            return "the chat template renders the messages before it differently once others follow"
        there = self.text[len(turn.prompt) :]
        if there.startswith(turn.said):
            return "the chat template marks it with {% generation %} only if it is the last"
        words = turn.said[: len(turn.said) - len(turn.end)]
        other = self.template.endings.special.match(there, len(words))
        if turn.end and other and there.startswith(words):
            return f"only its end token differs: {turn.end!r} if it is the last, {other[0]!r} once others follow"
        at = next((i for i, (a, b) in enumerate(zip(turn.said, there, strict=False)) if a != b), len(there))
        at = max(0, at - 10)
        return (
            f"the chat template renders it as {there[at : at + 30]!r} once others follow, and as "
            f"{turn.said[at : at + 30]!r} if it is the last"
        )


def _span(turn):
    return Span(len(turn.prompt), len(turn.prompt) + len(turn.said), len(turn.end))
