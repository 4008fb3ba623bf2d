"""Which tokens carry loss: labels as labels, not yet shifted, found in what the chat template renders.

A label stands at its own token's place; the one shift, by which the hidden state at t predicts the label at t + 1,
happens in the loss.
"""

from bisect import bisect_left
from typing import NamedTuple

from .endings import Refused, is_failure, refusal_of
from .formats import Unfit
from .left_out import check_rendered
from .messages import check
from .rows import IGNORE, DataError
from .spoken import READ_HERE, switched_off, with_argument_objects
from .templates import ChatTemplate
from .tokens import Tokens
from .turns import find_turns

MODES = ("all", "completion", "completion+eot")


class Example(NamedTuple):
    """One conversation or text as tokens. ``labels[0]`` is always ignored: nothing in the example predicts its first
    token."""

    input_ids: list[int]
    labels: list[int]
    source: str  # file:line

    @property
    def kept(self):
        return sum(label != IGNORE for label in self.labels)


_ALL = ()  # in the place of spans: every token is learned


class _Draft(NamedTuple):
    """An example to be: a text with the spans that are learned, or ``(ids, labels)`` at once."""

    text: str = ""
    spans: list | tuple | None = None
    tokens: tuple | None = None


def _cuts(draft):
    return [cut for span in draft.spans for cut in ((span.start,) if span.end else (span.start, span.stop))]


class Encoder:
    """Turns records into examples under one masking mode.

    Args:
        tokenizer: a fast Hugging Face tokenizer (one with character offsets); for conversations, with a chat template.
        mode: ``"all"`` labels every token; ``"completion"`` what the assistant says; ``"completion+eot"`` that and the
            token that ends the turn, without which a model never learns to stop. Multi-turn: every assistant turn.
        split_turns: make an example of its own, the conversation up to it, of a turn that the chat template renders
            differently once others follow; False refuses such a conversation.

    The labels of a turn are the tokens that a model has to answer to the turn's rendered prompt: what the template
    puts behind that prompt if the turn is the last, up to its end token. The text that is trained on has to begin with
    this prompt and these words; see :mod:`.turns`. No token reaches across the border between prompt and answer.
    ``weight`` 0, ``train``, ``training`` or ``loss`` false leave a turn without labels.

    Attributes:
        drafting: the record whose chat template is being rendered, if it is.
        topics: each topic that a note was thought about for, and its sentence; none if there is nothing to note.

    Raises:
        ValueError: an unknown mode; no chat template or no offsets when the first conversation comes; with
            ``"completion+eot"``, a template that ends a turn with no special token; ``split_turns`` with ``"all"``.
    """

    def __init__(self, tokenizer, mode="completion+eot", split_turns=False):
        if mode not in MODES:
            raise ValueError(f"mask: expected one of {MODES}, got {mode!r}")
        if split_turns and mode == "all":
            raise ValueError("split_turns: mask='all' labels whole conversations, whose turns are not told apart")
        self.tokenizer = tokenizer
        self.mode = mode
        self.split_turns = split_turns
        self.topics, self.drafting = {}, None
        self._template = self._tokens = None

    @property
    def end_of_turn(self):
        """The id of the token that ends an assistant's turn, None where the template has none."""
        end = self._prepared().endings.token
        return self.tokenizer.convert_tokens_to_ids(end) if end else None

    def __call__(self, record):
        """The one :class:`Example` of a :class:`~.rows.Record`; with ``split_turns`` there may be several, which
        :meth:`examples` returns."""
        found = self.examples(record)
        if len(found) != 1:
            raise ValueError(f"record: {record.path}:{record.line} makes {len(found)} examples; call examples(record)")
        return found[0]

    def examples(self, record):
        """The :class:`Example` s of a :class:`~.rows.Record`, one unless turns are split.

        Raises :class:`~.rows.DataError` if there is nothing to learn from, or if the record cannot be learned.
        """
        (found,) = self.of([record])
        if isinstance(found, DataError):
            raise found
        return found

    def of(self, records):
        """A list with an entry for each of ``records``: what :meth:`examples` returns or raises.

        The tokenizer is called once for all of them, which takes less time.
        """
        drafts = []
        for record in records:
            self.drafting = record
            try:
                drafts.append(self._drafts(record))
            except Refused as error:
                drafts.append(error)
        self.drafting = None
        texts = [draft for found in drafts if isinstance(found, list) for draft in found if draft.spans is not None]
        encoded = iter(self._tokens.of([(draft.text, _cuts(draft)) for draft in texts]) if texts else ())
        results = []
        for record, found in zip(records, drafts, strict=True):
            if isinstance(found, list):
                found = [self._labelled(draft, encoded) for draft in found]
            results.append(self._finished(record, found))
        return results

    def _labelled(self, draft, encoded):
        """``(ids, labels)`` of a draft, or the :class:`Refused` of its tokens, which are the next of ``encoded``."""
        if draft.spans is None:
            return draft.tokens
        found = next(encoded)
        if isinstance(found, Refused):
            return found
        ids, starts = found
        if draft.spans == _ALL:
            return ids, list(ids)
        labels = [IGNORE] * len(ids)
        for span in draft.spans:
            stop = span.stop if self.mode == "completion+eot" else span.stop - span.end
            here = slice(bisect_left(starts, span.start), bisect_left(starts, stop))
            labels[here] = ids[here]
        return ids, labels

    def _finished(self, record, found):
        refused = found if isinstance(found, Refused) else next((f for f in found if isinstance(f, Refused)), None)
        if refused is not None:
            error = record.error(str(refused))
            error.__cause__ = refused
            return error
        for ids, labels in found:
            if ids:
                labels[0] = IGNORE
        examples = [Example(ids, labels, f"{record.path}:{record.line}") for ids, labels in found]
        if not any(example.kept for example in examples):
            return record.error("no token to learn from")
        return examples

    def _drafts(self, record):
        if record.tokens is not None:
            return [_Draft(tokens=self._given(*record.tokens))]
        return [self._text(record)] if record.text is not None else self._conversation(record)

    def _given(self, ids, labels):
        most = len(self.tokenizer)
        if beyond := [token for token in (*ids, *labels) if token >= most]:
            raise Refused(f"token {beyond[0]} is none of the tokenizer's {most}")
        return ids, labels

    def _text(self, record):
        """The text with the tokenizer's own beginning and exactly one end-of-text token behind it."""
        if self.mode != "all":
            raise Refused(f'a "text" has no assistant turn: mask={self.mode!r} leaves nothing to learn from')
        tokenizer, text = self.tokenizer, record.text
        begin, end = tokenizer.bos_token, tokenizer.eos_token
        begins = bool(begin) and text.startswith(begin)
        while begin and text.startswith(begin):
            text = text[len(begin) :]
        while end and text.rstrip().endswith(end):
            text = text.rstrip().removesuffix(end)
        if not text.strip():
            raise Refused('the "text" is empty but for special tokens')
        try:
            ids = list(tokenizer(text)["input_ids"])
        except BaseException as error:  # the tokenizer's own and its library's
            if not is_failure(error):
                raise
            raise refusal_of("the tokenizer", error) from error
        if begins and ids[0] != tokenizer.bos_token_id:
            ids.insert(0, tokenizer.bos_token_id)
        if end:
            while ids[-1] == tokenizer.eos_token_id:
                ids.pop()
            ids.append(tokenizer.eos_token_id)
        return _Draft(tokens=(ids, list(ids)))

    def _conversation(self, record):
        self._prepared()
        try:
            check({"messages": record.messages})  # a record may come from elsewhere than a file
        except Unfit as error:
            raise Refused(error.reason) from error
        messages = self._readable(record)
        if self.mode == "all":
            drafts = [_Draft(self._whole(messages, record.tools), _ALL)]
        else:
            found = find_turns(self._template, messages, record.tools, self.split_turns)
            drafts = [_Draft(text, spans) for text, spans in found]
        self._note_unread(record, messages)
        return drafts

    def _readable(self, record):
        """The messages with calls' arguments as objects, or as the strings that they are if the template wants those.

        A template that joins text refuses objects, and one that prints them writes a Python dict.
        """
        if not any(message.get("tool_calls") for message in record.messages):
            return record.messages
        messages = with_argument_objects(record.messages)
        if messages == record.messages:
            return messages
        if self._template.prints_python:
            return record.messages
        try:
            self._template.render(messages, record.tools)
        except Refused:
            return record.messages
        return messages

    def _whole(self, messages, tools):
        """The text of a conversation every token of which is learned."""
        for i, message in enumerate(messages):
            if switched_off(message):
                raise Refused(f"message {i} asks for no loss, and mask='all' labels every token; use another mask")
        text = self._template.render(messages, tools)
        check_rendered(messages, text, self._template.endings, lambda changed: self._template.render(changed, tools))
        return text

    @property
    def notes(self):
        """Sentences on what was found and is not refused, each of them once."""
        return [sentence for sentence in self.topics.values() if sentence]

    def _note(self, sentence):
        self.topics.setdefault(sentence, sentence)

    def _note_unread(self, record, messages):
        """Note every message key that this conversation is the first to have, and that changes nothing in its text."""
        for key in sorted({key for message in messages for key in message} - {*READ_HERE} - self.topics.keys()):
            without = [{k: v for k, v in message.items() if k != key} for message in messages]
            alike = self._renders_alike(messages, without, record.tools)
            self.topics[key] = alike and (
                f"{record.path}:{record.line}: the chat template does not read the message key {key!r} here; it is "
                "left out of the text"
            )

    def _renders_alike(self, messages, others, tools):
        text = self._template.render(messages, tools)
        try:
            return text == self._template.render(others, tools)
        except Refused:
            return False

    def _prepared(self):
        """The chat template, known once the first conversation comes."""
        if self._template is None:
            template = ChatTemplate(self.tokenizer, self._note)
            if self.mode == "completion+eot" and not template.endings.text:
                raise ValueError(
                    "the chat template ends an assistant's turn with no special token, so a model could not learn to "
                    "stop; mend the template or choose mask='completion'"
                )
            self._template = template
            self._tokens = Tokens(self.tokenizer, template.endings.special)
        return self._template
