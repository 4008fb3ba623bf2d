"""The token that ends an assistant's turn, learned from what a chat template makes of a small conversation."""

import re
from contextlib import suppress

from .._terminal import LONGEST
from .spoken import words_end

ASK = {"role": "user", "content": "Words of the user."}
REPLY = {"role": "assistant", "content": "Words of the assistant."}
CALL = {"type": "function", "id": "call00001", "function": {"name": "look", "arguments": {"at": {"there": True}}}}
CALLING = {**REPLY, "tool_calls": [CALL]}
_RESULT = {"role": "tool", "content": "a", "tool_call_id": "call00001"}


class Refused(Exception):
    """A conversation that cannot be trained on, with the reason."""


def refusal_of(what, error):
    """The :class:`Refused` of something that raised ``error``, with the first line of its message, or its name.

    A ``MemoryError`` is raised again: it says nothing of a conversation.
    """
    if isinstance(error, MemoryError):
        raise error
    reason = (str(error)[:LONGEST].splitlines() or [""])[0].strip() or type(error).__name__
    return Refused(f"{what} refuses it: {reason}")


def is_failure(error):
    """Returns true for errors, and for panics of tokenizers, which are no ``Exception``."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


class Endings:
    """How a chat template ends assistants' turns.

    Attributes:
        text: the special tokens that end a turn, one or several next to each other; "" if there are none.
        token: the last of them.
        borrowed: true if the next message begins with it (GLM), so that a last turn lacks it.
        special: matches each of the tokenizer's special tokens.
        all: the tokens that end a turn, a call, a user's message or the text: an assistant's words must not have them.
    """

    def __init__(self, tokenizer, render):
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special = sorted({*special, *tokenizer.all_special_tokens} - {""}, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self._render = render
        self._followers = {}
        last = render([ASK, REPLY], None)
        if REPLY["content"] not in last:
            raise Refused("the chat template does not render an assistant's words, given as a string, as they are")
        question, followed = self.attempt([ASK]), self.attempt([ASK, REPLY, ASK]) or last
        self._learn(question, _behind(last, REPLY), _behind(followed, REPLY))
        self.borrowed = not self.text
        if self.borrowed:
            self.text = self.token = self._follower(REPLY)[1]
        self.all = self._all(tokenizer, question)

    def _learn(self, question, tail, followed):
        """Find the end token in ``tail``, the text behind a last turn's words, and ``followed``, that behind others."""
        shared = len(common_start(tail, followed))
        headers = set(self.special.findall(question.partition(ASK["content"])[0]))
        tokens, run = list(self.special.finditer(tail)), []
        for token in tokens:
            if run and (token.start() != run[-1].end() or token[0] in headers):
                break
            run.append(token)
        # If none stays once a message follows, it is replaced by another (gpt-oss).
        run = [token for token in run if token.end() <= shared] or run[:1]
        stop = run[-1].end() if run else 0
        # What goes once a message follows ends the conversation, not the turn (Phi-3's <|endoftext|>).
        self._closing = {token[0] for token in tokens if token.start() >= stop and token.end() > shared}
        self.text, self.token = (tail[run[0].start() : stop], run[-1][0]) if run else ("", "")

    def _all(self, tokenizer, question):
        found = {tokenizer.eos_token, *self._closing, *self.special.findall(self.text)}
        found |= {self._follower(message)[1] for message in (REPLY, CALLING) if self.borrowed}
        found |= set(self.special.findall(_behind(question, ASK))[:1])
        if calling := self.attempt([ASK, CALLING]):
            with suppress(Refused):
                found.add(self.stop(calling, len(calling.partition(ASK["content"])[0]), CALLING)[1])
        return sorted(found - {None, ""})

    def stop(self, whole, start, message):
        """``(stop, end, borrowed)`` of the turn that says ``message`` from ``start`` of ``whole`` on, being the last.

        ``end`` is the text of its end tokens, the last thing in front of ``stop``. If ``whole`` lacks it, ``borrowed``
        is the text to add: space and ``end``.
        """
        at = words_end(message, whole, start)
        if self.text and not self.borrowed and (found := whole.find(self.text, at)) >= 0:
            return found + len(self.text), self.text, ""
        gap, end = self._follower(message) if self.borrowed else ("", "")
        if end:
            return len(whole), end, gap + end
        tokens = self._trailing(whole, start)
        while tokens and tokens[-1][0] in self._closing:
            tokens.pop()
        if tokens:
            return tokens[-1].end(), tokens[-1][0], ""
        if not self.text:
            return len(whole), "", ""
        raise Refused("the chat template does not end this turn with a special token, so nothing would teach to stop")

    def _trailing(self, text, start):
        """The special tokens at the end of ``text`` with nothing but space around them."""
        found, stop = list(self.special.finditer(text, start)), len(text)
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
            reply, after = (CALLING, _RESULT) if calls else (REPLY, ASK)
            last, followed = self.attempt([ASK, reply]), self.attempt([ASK, reply, after])
            token = self.special.search(followed, len(last)) if last and followed.startswith(last) else None
            if token and not followed[len(last) : token.start()].strip():
                self._followers[calls] = followed[len(last) : token.start()], token[0]
        return self._followers[calls]

    def attempt(self, messages, **options):
        """The rendered messages; "" if the template refuses them."""
        try:
            return self._render(messages, None, **options)
        except Refused:
            return ""


def _behind(text, message):
    return text.partition(message["content"])[2]


def common_start(a, b):
    """The longest text with which both ``a`` and ``b`` begin."""
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]
