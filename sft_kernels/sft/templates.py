"""One assistant turn as a chat template renders it: the prompt before it, the words after, the token that ends it."""

import re
from bisect import bisect
from typing import NamedTuple

from .endings import ASK, CALL, CALLING, Endings, Refused, common_start, refusal_of
from .left_out import check_ends, check_parts, check_words
from .spoken import missing_part

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\b")


class Span(NamedTuple):
    """A turn in a text: the characters [start, stop), the last ``end`` of which are its end tokens."""

    start: int
    stop: int
    end: int


class Turn(NamedTuple):
    """An assistant turn as the model has to say it, being the last of its conversation."""

    prompt: str  # the conversation before it, up to where the model begins
    said: str  # from there on, up to and including the end tokens
    end: str  # the end tokens, "" if the template has none
    borrowed: str = ""  # the tail of `said` that only a following message would render
    options: tuple = ()  # of the template, if its default prompt does not lead to this turn

    @property
    def switches(self):
        """``options`` in words."""
        return ", ".join(f"{name}={value}" for name, value in self.options)


class ChatTemplate:
    """A tokenizer's chat template, and what a small conversation tells about it.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a chat template.
        note: called with a sentence for the user, perhaps several times with the same one.

    Attributes:
        endings: :class:`~.endings.Endings` of its turns.
        marks_turns: true if the template has ``{% generation %}`` blocks.
        prints_python: true if it prints a call's arguments, given as an object, as a Python dict.

    Raises:
        ValueError: the tokenizer is not a fast one or has no template; the template cannot render a user's and an
            assistant's message.
    """

    def __init__(self, tokenizer, note):
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError("tokenizer: expected a fast one, whose tokens know their characters")
        if not tokenizer.chat_template:
            raise ValueError("tokenizer: has no chat template (give one with chat_template)")
        self.tokenizer, self.note = tokenizer, note
        try:
            source = tokenizer.get_chat_template()
        except ValueError as error:  # several templates, none of them the default
            raise ValueError(f"tokenizer: {error}") from error
        self.marks_turns = bool(_GENERATION_TAG.search(source))
        switches = [name for name in ("enable_thinking", "thinking") if re.search(rf"\b{name}\b", source)]
        self._options = [(), *(((name, value),) for name in switches for value in (False, True))]
        try:
            self.endings = Endings(tokenizer, self.render)
        except Refused as error:
            raise ValueError(f"tokenizer: a user's and an assistant's message: {error}") from error
        attempt = self.endings.attempt
        self._header = attempt([ASK], add_generation_prompt=True).removeprefix(attempt([ASK]))
        self.prints_python = str(CALL["function"]["arguments"]) in attempt([ASK, CALLING])

    def render(self, messages, tools, **options):
        """The conversation as text. Whatever the template raises becomes :class:`~.endings.Refused`."""
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
        except Exception as error:  # templates are programs: they raise anything
            raise refusal_of("the chat template", error) from error

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
            raise refusal_of("the chat template", error) from error
        return [tuple(span) for span in spans]

    def turn(self, before, message, tools, whole=None, marks=None):
        """The :class:`Turn` of the assistant's ``message`` behind the messages ``before``.

        Its prompt is the one that the template renders for generation, and what it says is what the template renders
        behind that prompt. If the turn does not begin as that prompt does, the prompt with thinking switched on or off
        is tried. Next, if the template renders the messages before differently once the turn follows, what it says
        begins behind the last message and the generation prompt, and follows the prompt all the same. Last, in a
        template that marks turns, the prompt is the text in front of the mark. ``whole`` is the rendered text and
        ``marks`` is what :meth:`marked` returns for it, if they are known.

        Raises :class:`~.endings.Refused` if there is no such prompt, if the template ends the turn with no special
        token, if it leaves out a part of the message or does not mark it, or if the message has an end token in it.
        """
        upto = [*before, message]
        check_ends(message, self.endings.all)
        whole, start, prompt, options = self._begin(before, upto, tools, whole)
        stop, end, borrowed = self.endings.stop(whole, start, message)
        end_here = 0 if borrowed else len(end)
        turn = Turn(prompt, whole[start:stop] + borrowed, end, borrowed, options)
        check_words(message, whole[start : stop - end_here], self.endings.special)
        rest = whole[stop:]

        def said(changed):
            text = self.render([*before, changed], tools, **dict(options))
            return text[start:].removesuffix(rest)

        check_parts(message, said)
        if self.marks_turns:
            spans = self.marked(upto, tools, options) if options or marks is None else marks
            self._check_marks(spans, whole, message, Span(start, stop, end_here))
        if options:
            self.note(f"some turns follow the chat template's prompt with {turn.switches}, not its default prompt")
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
        if before:
            self.note(
                "some turns begin where the chat template marks them ({% generation %}); its prompt for generation "
                "does not lead to them"
            )
        start = self._behind_header(default, start, prompted)
        return default, start, default[:start], ()

    def _behind_header(self, whole, start, prompted):
        """Move ``start``, where a mark begins, behind the header that the model is given and does not say."""
        if not prompted:  # the assistant comes first
            at = whole.find(self._header) if self._header else -1
            return at + len(self._header) if 0 <= at <= start < at + len(self._header) else start
        shared = len(common_start(prompted, whole))
        while (token := self.endings.special.match(whole, start)) and token.end() <= shared:
            start = token.end()
        return max(start, whole.rfind("\n", start, shared) + 1)

    def _check_marks(self, spans, whole, message, span):
        piece = self.unmarked(whole, spans, span)
        first = next((left for left, right in spans if span.start < right), span.start)
        if first > span.start and not piece and missing_part(message, whole[first : span.stop]):
            piece = whole[span.start : first]
        if piece:
            raise Refused(
                f"the chat template's {{% generation %}} leaves out {piece[:40]!r} of this turn; mend the marks or "
                "take them out"
            )

    def unmarked(self, text, spans, span):
        """The first words of ``span`` of ``text`` behind its first mark, end tokens apart, that no mark covers; or "".

        Text in front of the first mark is not asked for: the model has to say it, too, since its prompt ends before.
        """
        at = max(0, bisect(spans, (span.start,)) - 1)
        inside = [mark for mark in spans[at:] if span.start < mark[1]]
        start, stop = span.start, span.stop - span.end
        if inside and inside[0][0] < stop:
            start = max(start, inside[0][0])
        for left, right in inside:
            if piece := self.endings.special.sub("", text[start : min(left, stop)]).strip():
                return piece
            start = max(start, right)
            if start >= stop:
                return ""
        return self.endings.special.sub("", text[start:stop]).strip()


def _behind_last(message, prompt, whole):
    """Returns the place in ``whole`` behind its last part like the end of ``prompt``: ``message`` and what follows.

    Returns None if ``whole`` has no such part, or if ``message`` cannot be found in ``prompt``.
    """
    content = message.get("content")
    at = prompt.rfind(content.strip()) if isinstance(content, str) and content.strip() else -1
    found = whole.rfind(prompt[at:]) if at >= 0 else -1
    return found + len(prompt) - at if found >= 0 else None
