"""One assistant turn as a chat template renders it: the prompt before it, the words after, the token that ends it."""

import re
from bisect import bisect
from typing import NamedTuple

from .spoken import missing_words, reasonings, said_by, with_marks

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\b")
_ASK = {"role": "user", "content": "a"}
_WORDS = "Words of the assistant."
_CALL = {"type": "function", "id": "call00001", "function": {"name": "look", "arguments": {"at": "a"}}}


class Refused(Exception):
    """A conversation that cannot be trained on, with the reason."""


class Span(NamedTuple):
    """A turn in a text: the characters [start, stop), the last ``end`` of which are its end token."""

    start: int
    stop: int
    end: int


class Turn(NamedTuple):
    """An assistant turn as the model has to say it, being the last of its conversation."""

    prompt: str  # the conversation before it, up to where the model begins
    said: str  # from there on, up to and including the end token
    end: str  # the end token, "" if the template has none
    borrowed: str = ""  # the tail of `said` that only a following message would render
    options: tuple = ()  # of the template, if its default prompt does not lead to this turn


class ChatTemplate:
    """A tokenizer's chat template, and what a small conversation tells about it.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a chat template.
        note: called with a sentence for the user, perhaps several times with the same one.

    Attributes:
        end: the special token that ends an assistant's turn, "" if there is none.
        borrowed: true if the next message begins with that token (GLM), so that a last turn lacks it.
        marks_turns: true if the template has ``{% generation %}`` blocks.

    Raises:
        ValueError: the tokenizer is not a fast one or has no template; the template cannot render a user's and an
            assistant's turn.
    """

    def __init__(self, tokenizer, note):
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError("tokenizer: expected a fast one, whose tokens know their characters")
        if not tokenizer.chat_template:
            raise ValueError("tokenizer: has no chat template (give one with chat_template)")
        self.tokenizer = tokenizer
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(tokenizer.all_special_tokens)
        longest_first = sorted((token for token in special if token), key=len, reverse=True)
        self.note = note
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._learn()

    def _learn(self):
        source = self.tokenizer.get_chat_template()
        self.marks_turns = bool(_GENERATION_TAG.search(source))
        switches = [name for name in ("enable_thinking", "thinking") if re.search(rf"\b{name}\b", source)]
        self._options = [(), *(((name, value),) for name in switches for value in (False, True))]
        reply = {"role": "assistant", "content": _WORDS}
        try:
            last = self.render([_ASK, reply], None)
        except Refused as error:
            raise ValueError(f"tokenizer: a user's and an assistant's message: {error}") from error
        if _WORDS not in last:
            raise ValueError(
                "tokenizer: the chat template does not render an assistant's words, given as a string, as they are"
            )
        try:
            followed = self.render([_ASK, reply, _ASK], None)
        except Refused:
            followed = last
        self._tail = last.rpartition(_WORDS)[2]
        common = common_start(self._tail, followed.partition(_WORDS)[2])
        behind = list(self._special.finditer(self._tail))
        stay = [token for token in behind if token.end() <= len(common)]
        # Tokens that go once a message follows end the conversation, not the turn (Phi-3's <|endoftext|>); if none
        # stays, the turn's own end token is replaced (gpt-oss).
        self._closing = {token[0] for token in behind[len(stay) :]} if stay else set()
        self._end_at = (stay[-1] if stay else behind[0]).span() if behind else None
        self._followers = {}
        self.borrowed = self._end_at is None
        if self.borrowed:
            self.end = self._follower(reply)[1]
        else:
            self.end = self._tail[slice(*self._end_at)]
        self._ends = {self.end, self.tokenizer.eos_token or "", *self._closing}

    def render(self, messages, tools, **options):
        """The conversation as text. Whatever the template raises becomes :class:`Refused`."""
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
        except Exception as error:  # templates are programs: they raise anything
            raise Refused(f"the chat template refuses it: {first_line(error)}") from error

    def marked(self, messages, tools, options=()):
        """The [start, end) of what ``{% generation %}`` encloses, in characters of :meth:`render`'s text."""
        from transformers.utils.chat_template_utils import render_jinja_template

        # As apply_chat_template does, which gives the spans only in tokens of the whole text.
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        source = self.tokenizer.get_chat_template(tools=tools)
        variables = {**self.tokenizer.special_tokens_map, **dict(options)}
        try:
            (_,), (spans,) = render_jinja_template(
                [plain], tools=tools, chat_template=source, return_assistant_tokens_mask=True, **variables
            )
        except Exception as error:
            raise Refused(f"the chat template refuses it: {first_line(error)}") from error
        return [tuple(span) for span in spans]

    def turn(self, before, message, tools, whole=None):
        """The :class:`Turn` of the assistant's ``message`` behind the messages ``before``.

        Its prompt is the one that the template renders for generation, and what it says is what the template renders
        behind that prompt. If the turn does not begin as that prompt does, the prompt with thinking switched on or off
        is tried. Next, if the template renders the messages before differently once the turn follows, what it says
        begins behind the last message and the generation prompt, and follows the prompt all the same. Last, in a
        template that marks turns, the prompt is the text in front of the mark. Marks that begin behind the prompt move
        it to there, unless a part of the message lies between. ``whole`` is the rendered text, if it is known.

        Raises :class:`Refused` if there is no such prompt, if the template ends the turn with no special token, or if
        it leaves out a part of the message.
        """
        upto = [*before, message]
        whole, start, prompt, options = self._begin(before, upto, tools, whole)
        stop, end, borrowed = self._stop(whole, start, message)
        if self.marks_turns:
            marks = self.marked(upto, tools, options)
            marked = next((max(left, start) for left, right in marks if start < right and left < stop), start)
            prompt, start = prompt + whole[start:marked], marked
            if piece := self.unmarked(whole, marks, Span(start, stop, 0 if borrowed else len(end))):
                raise Refused(
                    f"the chat template's {{% generation %}} leaves out {piece[:40]!r} of this turn; mend the marks or "
                    "take them out"
                )
        turn = Turn(prompt, whole[start:stop] + borrowed, end, borrowed, options)
        self._check_parts(upto, tools, turn, start)
        if options:
            switch = ", ".join(f"{name}={value}" for name, value in options)
            self.note(f"some turns follow the chat template's prompt with {switch}, not its default prompt")
        return turn

    def _begin(self, before, upto, tools, whole):
        """``(whole, start, prompt, options)``: the text up to the turn, where in it the model begins, its prompt."""
        whole = default = whole or self.render(upto, tools)
        prompted = stem = ""
        if before:
            for options in self._options:
                try:
                    if options:
                        whole = self.render(upto, tools, **dict(options))
                    prompt = self.render(before, tools, add_generation_prompt=True, **dict(options))
                except Refused:
                    if options:
                        continue
                    raise
                if whole.startswith(prompt):
                    return whole, len(prompt), prompt, options
                prompted = prompted or prompt
            stem = self.render(before, tools)
            if start := _behind_last(before[-1], prompted, default):
                return default, start, prompted, ()
            if not default.startswith(stem):
                raise Refused("the chat template renders the messages before this turn differently once it follows")
        elif not self.marks_turns:
            raise Refused("nothing before the assistant; a template with {% generation %} would mark it")
        spans = self.marked(upto, tools) if self.marks_turns else ()
        start = next((start for start, end in spans if start >= len(stem)), None)
        if start is None:
            raise Refused(
                f"only the generation prompt differs: the chat template prompts with {prompted[len(stem) :]!r}, but "
                f"begins this turn with {default[len(stem) : len(stem) + 40]!r}; marks ({{% generation %}}) in the "
                "template would say where the turn begins"
            )
        shared = len(common_start(prompted, default))
        while (token := self._special.match(default, start)) and token.end() <= shared:
            start = token.end()  # of the header, which the model is given
        return default, start, default[:start], ()

    def _stop(self, whole, start, message):
        """``(stop, end, borrowed)``: where the turn ends, its end token, and that token again if ``whole`` lacks it."""
        if self._end_at and whole.endswith(self._tail) and len(whole) - len(self._tail) >= start:
            return len(whole) - len(self._tail) + self._end_at[1], self.end, ""
        gap, end = self._follower(message) if self.borrowed else ("", "")
        if end:
            return len(whole), end, gap + end
        tokens = self._trailing(whole, start)
        while tokens and tokens[-1][0] in self._closing:
            tokens.pop()
        if tokens:
            return tokens[-1].end(), tokens[-1][0], ""
        if not self.end:
            return len(whole), "", ""
        raise Refused("the chat template does not end this turn with a special token, so nothing would teach to stop")

    def _trailing(self, text, start):
        """The special tokens at the end of ``text`` with nothing but space around them."""
        found, stop = list(self._special.finditer(text, start)), len(text)
        for i in reversed(range(len(found))):
            if text[found[i].end() : stop].strip():
                return found[i + 1 :]
            stop = found[i].start()
        return found

    def _follower(self, message):
        """``(space, token)`` at the beginning of the message that follows one like ``message``; two "" if no special
        token is there."""
        calls = bool(message.get("tool_calls"))
        if calls not in self._followers:
            self._followers[calls] = "", ""
            reply = {"role": "assistant", "content": _WORDS, **({"tool_calls": [_CALL]} if calls else {})}
            after = {"role": "tool", "content": "a", "tool_call_id": "call00001"} if calls else _ASK
            try:
                last, followed = self.render([_ASK, reply], None), self.render([_ASK, reply, after], None)
            except Refused:
                last = followed = ""
            token = self._special.search(followed, len(last)) if followed.startswith(last) else None
            if token and not followed[len(last) : token.start()].strip():
                self._followers[calls] = followed[len(last) : token.start()], token[0]
        return self._followers[calls]

    def unmarked(self, text, spans, span):
        """The first part of ``span``, its end token apart, that neither ``spans`` nor special tokens cover; or ""."""
        start, stop = span.start, span.stop - span.end
        for left, right in spans[max(0, bisect(spans, (start,)) - 1) :]:
            if piece := self._special.sub("", text[start : min(left, stop)]).strip():
                return piece
            start = max(start, right)
            if start >= stop:
                return ""
        return self._special.sub("", text[start:stop]).strip()

    def _check_parts(self, upto, tools, turn, start):
        message = upto[-1]
        for part, text in said_by(message):
            for end in {turn.end, *self._ends} - {""}:
                if end in text:
                    raise Refused(f"the assistant's {part} contain {end}, which ends a turn")
        if part := missing_words(message, turn.said):
            raise _left_out(f"the message's {part}, or a part of it")
        if _has_parts(message):
            changed, marks = with_marks(message)
            text = self.render([*upto[:-1], changed], tools, **dict(turn.options))
            _check_marks(marks, text[start:])

    def check_rendered(self, messages, tools, text):
        """Raises :class:`Refused` if ``text``, the rendered conversation, leaves out something that the assistant
        says."""
        changed, marks, ambiguous = [], [], False
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                if part := missing_words(message, text):
                    raise _left_out(f"{part} of message {i}, or a part of it")
                ambiguous |= _has_parts(message)
                message, more = with_marks(message, first=len(marks))
                marks += more
            changed.append(message)
        if ambiguous:
            _check_marks(marks, self.render(changed, tools))


def _behind_last(message, prompt, whole):
    """Where ``whole`` goes on behind its last part like the end of ``prompt``: ``message`` and what follows it there.

    Returns None if ``whole`` has no such part, or if ``message`` cannot be found in ``prompt``.
    """
    content = message.get("content")
    at = prompt.rfind(content.strip()) if isinstance(content, str) and content.strip() else -1
    found = whole.rfind(prompt[at:]) if at >= 0 else -1
    return found + len(prompt) - at if found >= 0 else None


def _has_parts(message):
    """True if one part of the message could be taken for another, or its words for the template's."""
    return bool(message.get("tool_calls") or reasonings(message))


def _check_marks(marks, text):
    for part, mark in marks:
        if mark not in text:
            raise _left_out(part)


def _left_out(part):
    return Refused(f"the chat template leaves out {part}, so the model would be taught to leave it out")


def common_start(a, b):
    """The longest text with which both ``a`` and ``b`` begin."""
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]


def first_line(error):
    """The first line of an exception's message, or its name."""
    return (str(error).splitlines() or [""])[0].strip() or type(error).__name__
