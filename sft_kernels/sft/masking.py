"""Which tokens carry loss: labels as labels, not yet shifted, found in what the chat template renders.

A label stands at its own token's place; the one shift, by which the hidden state at t predicts the label at t + 1,
happens in the loss.
"""

import re
from bisect import bisect_left
from itertools import pairwise
from typing import NamedTuple

from jinja2 import TemplateError

IGNORE = -100
MODES = ("all", "completion", "completion+eot")
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\b")


class Example(NamedTuple):
    """One conversation or text as tokens. ``labels[0]`` is always ignored: nothing in the example predicts its first
    token."""

    input_ids: list[int]
    labels: list[int]
    source: str  # file:line

    @property
    def kept(self):
        return sum(label != IGNORE for label in self.labels)


class Encoder:
    """Turns records into examples under one masking mode.

    Args:
        tokenizer: a fast Hugging Face tokenizer (one with character offsets); for conversations, with a chat template.
        mode: ``"all"`` labels every token; ``"completion"`` the assistant's words; ``"completion+eot"`` these and the
            token that ends the turn, without which a model never learns to stop. Multi-turn: every assistant turn.

    An assistant turn starts where the template's ``{% generation %}`` block does, or, where it has none, at the end of
    the conversation before it rendered with a generation prompt. It ends at the end-of-turn token: the first special
    token that the template puts behind an assistant's words. A turn that some other token ends, or whose words contain
    that token, is refused with its line.

    Raises:
        ValueError: an unknown mode; no chat template or no offsets when the first conversation comes; with
            ``"completion+eot"``, a template that ends a turn with no special token.
    """

    def __init__(self, tokenizer, mode="completion+eot"):
        if mode not in MODES:
            raise ValueError(f"mask: expected one of {MODES}, got {mode!r}")
        self.tokenizer = tokenizer
        self.mode = mode
        self._end_of_turn = None
        self._end_text = None
        self._special = []
        self._marks_turns = False
        self._ready = False

    @property
    def end_of_turn(self):
        """The id of the token that ends an assistant's turn, None where the template has none."""
        self._prepare()
        return self._end_of_turn

    def __call__(self, record):
        """The :class:`Example` of a :class:`~.data.Record`; :class:`~.data.DataError` where there is nothing to learn
        from."""
        if record.text is not None:
            ids, labels = self._text(record)
        else:
            ids, labels = self._conversation(record)
        if ids:
            labels[0] = IGNORE
        example = Example(ids, labels, f"{record.path}:{record.line}")
        if not example.kept:
            raise record.error("no token to learn from")
        return example

    def _text(self, record):
        if self.mode != "all":
            raise record.error(f'a "text" has no assistant turn: mask={self.mode!r} leaves nothing to learn from')
        ids = self.tokenizer(record.text, add_special_tokens=False)["input_ids"]
        if self.tokenizer.eos_token_id is not None:
            ids.append(self.tokenizer.eos_token_id)
        return ids, list(ids)

    def _conversation(self, record):
        self._prepare()
        try:
            if self.mode == "all":
                ids, _ = self._tokenize(self._render(record.messages, record.tools))
                return ids, list(ids)
            ids, spans = self._turns(record.messages, record.tools, record.error)
        except TemplateError as error:
            raise record.error(f"the chat template refuses it: {error}") from error
        labels = [IGNORE] * len(ids)
        for start, end in spans:
            labels[start:end] = ids[start:end]
        return ids, labels

    def _turns(self, messages, tools, error):
        """Token ids, and the [start, end) of every assistant turn's labels under the mode."""
        for i, message in enumerate(messages):
            said = message.get("content") or ""
            if self._end_text and message["role"] == "assistant" and self._end_text in said:
                raise error(f"message {i}: the assistant's words contain the end-of-turn token {self._end_text}")
        text = self._render(messages, tools)
        if self._marks_turns:
            ids, offsets = self._tokenize(text)
            spans = list(_runs(self._assistant_masks(messages, tools, ids, error), offsets))
        else:
            ranges = [
                self._find_turn(text, messages, i, tools, error)
                for i, m in enumerate(messages)
                if m["role"] == "assistant"
            ]
            ids, offsets = self._tokenize(text, [start for start, _ in ranges])
            spans = [(bisect_left(offsets, start), bisect_left(offsets, end)) for start, end in ranges]
        return ids, [self._close(ids, start, end, error) for start, end in spans]

    def _find_turn(self, text, messages, i, tools, error):
        """The characters [start, end) of assistant turn ``i`` and of whatever the template puts behind it."""
        if i == 0:
            raise error("message 0: nothing before the assistant; a template with {% generation %} would mark it")
        prompt = self._render(messages[:i], tools, add_generation_prompt=True)
        if not text.startswith(prompt):
            raise error(
                f"message {i}: the chat template renders the turns before it differently once it follows; "
                "a template with {% generation %} would mark it"
            )
        upto = self._render(messages[: i + 1], tools)
        if self._end_of_turn is not None:
            # A turn that another token ends would run into the next message, and what lies between carry loss.
            end = text.find(self._end_text, len(prompt))
            turn, alone = text[len(prompt) : end], upto[len(prompt) :]
            if end < 0 or any(token in turn and token not in alone for token in self._special):
                raise error(f"message {i}: the chat template does not end this turn with its end-of-turn token")
            return len(prompt), len(text)
        if not text.startswith(upto):
            raise error(f"message {i}: the chat template hides where the turn ends")
        return len(prompt), len(upto)

    def _tokenize(self, text, cuts=()):
        """Ids and first characters of the tokens. No token reaches across a cut, as none does when the model
        answers."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], [start for start, _ in encoded["offset_mapping"]]
        if set(cuts) <= {*offsets, len(text)}:
            return ids, offsets
        ids, offsets = [], []
        for start, end in pairwise([0, *cuts, len(text)]):
            piece_ids, piece_offsets = self._tokenize(text[start:end])
            ids += piece_ids
            offsets += [start + offset for offset in piece_offsets]
        return ids, offsets

    def _close(self, ids, start, end, error):
        """Cut or extend a turn so that it ends before its end-of-turn token, or behind it, as the mode says."""
        if self._end_of_turn is None:
            return start, end
        try:
            # A marked turn may stop short of its end-of-turn token; an unmarked one runs past it.
            stop = ids.index(self._end_of_turn, start)
        except ValueError:
            raise error("an assistant turn without the template's end-of-turn token") from None
        if self._marks_turns and stop > end:
            raise error("the chat template marks an assistant turn that its end-of-turn token does not end")
        return start, stop + (self.mode == "completion+eot")

    def _prepare(self):
        """Learn from a small conversation how the template marks and ends turns."""
        if self._ready:
            return
        tokenizer = self.tokenizer
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError("tokenizer: expected a fast one, whose tokens know their characters")
        if not tokenizer.chat_template:
            raise ValueError("tokenizer: has no chat template (give one with chat_template)")
        self._marks_turns = bool(_GENERATION_TAG.search(tokenizer.get_chat_template()))
        words = "Words of the assistant."
        try:
            text = self._render([{"role": "user", "content": "a"}, {"role": "assistant", "content": words}], None)
        except TemplateError as error:
            raise ValueError(
                f"tokenizer: the chat template refuses a user's and an assistant's turn: {error}"
            ) from error
        if words not in text:
            raise ValueError("tokenizer: the chat template does not render an assistant's words as they are")
        behind = tokenizer(text.rpartition(words)[2], add_special_tokens=False)["input_ids"]
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(tokenizer.all_special_ids)
        self._special = tokenizer.convert_ids_to_tokens(sorted(special))
        self._end_of_turn = next((token for token in behind if token in special), None)
        if self._end_of_turn is not None:
            self._end_text = tokenizer.convert_ids_to_tokens(self._end_of_turn)
        elif self.mode == "completion+eot":
            raise ValueError(
                "the chat template ends an assistant's turn with no special token, so a model could not learn to stop; "
                "mend the template or choose mask='completion'"
            )
        self._ready = True

    def _assistant_masks(self, messages, tools, ids, error):
        encoded = self.tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        if encoded["input_ids"] != ids:
            raise error("the chat template's text and tokens disagree")
        return encoded["assistant_masks"]

    def _render(self, messages, tools, **options):
        return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)


def _runs(marked, offsets):
    """The [start, end) of every run of ones. Of a character of several tokens transformers marks only the first."""
    for i in range(1, len(marked)):
        marked[i] |= marked[i - 1] and offsets[i] == offsets[i - 1]
    edges = [i for i, (a, b) in enumerate(zip([0, *marked], [*marked, 0], strict=True)) if a != b]
    return zip(edges[::2], edges[1::2], strict=True)
