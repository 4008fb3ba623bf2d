"""A text as tokens none of which reaches across given places, as none does where a model begins to speak."""

from bisect import bisect_left
from itertools import pairwise

from .endings import Refused, is_failure, refusal_of

_CONTEXT = 64  # characters in front of a piece, if no special token is near
_JOINTS = ("\n", "a", ".")  # what a piece can stand behind, since alone it may get a space in front


class Tokens:
    """The tokens of texts.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        special: matches each of its special tokens.
    """

    def __init__(self, tokenizer, special):
        self.tokenizer, self.special = tokenizer, special

    def __call__(self, text, cuts=()):
        """``(ids, starts)``: the tokens of ``text`` and their first characters; no token reaches across a cut.

        The text in front of the first cut has the tokens that it has alone, as a prompt has. What is behind a cut has
        those that it has behind the text before it, or, if they would reach across, those that it has by itself. Raises
        :class:`~.endings.Refused` if the tokenizer has none (because it puts a space in front of every text, say).
        """
        (found,) = self.of([(text, cuts)])
        if isinstance(found, Refused):
            raise found
        return found

    def of(self, asked):
        """The tokens of several ``(text, cuts)`` at once, which takes less time than one after the other.

        Returns a list. An entry is what a call returns, or the :class:`~.endings.Refused` that it raises.
        """
        plans = [self._pieces(text, cuts) for text, cuts in asked]
        try:
            encoded = iter(self._encode([text for pieces in plans for text, _ in pieces]))
        except Refused as error:
            return [error] if len(asked) == 1 else [self.of([one])[0] for one in asked]
        return [self._joined([(next(encoded), span) for _, span in pieces]) for pieces in plans]

    def _pieces(self, text, cuts):
        """``(piece, (context, start, stop))`` of each stretch between cuts; its piece begins at ``context``."""
        places = [0, *sorted({cut for cut in cuts if 0 < cut < len(text)}), len(text)]
        spans = [(self._context(text, start), start, stop) for start, stop in pairwise(places)]
        return [(text[context:stop], (context, start, stop)) for context, start, stop in spans]

    def _joined(self, pieces):
        ids, starts = [], []
        for (text, *encoded), (context, start, stop) in pieces:
            found = _behind(encoded, start - context)
            try:
                found = found or self._alone(text[start - context :])
            except Refused as error:
                return error
            ids += found[0]
            starts += [min(start + at, stop - 1) for at in found[1]]
        return ids, starts

    def _context(self, text, start):
        """Returns the place to begin at, so that the text behind ``start`` is no beginning: the last special token."""
        near = max(0, start - _CONTEXT)
        tokens = list(self.special.finditer(text, near, start))
        return tokens[-1].start() if tokens else near

    def _alone(self, piece):
        """Ids and first characters of a piece by itself, without the space that some tokenizers put before a text."""
        for joint in _JOINTS:
            if found := _behind(self._encode([joint + piece])[0][1:], len(joint)):
                return found
        raise Refused(f"the tokenizer has no tokens that begin with the turn, {piece[:20]!r}")

    def _encode(self, texts):
        """``(text, ids, offsets)`` of each text."""
        try:
            encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        except BaseException as error:  # the tokenizer's own and its library's
            if not is_failure(error):
                raise
            raise refusal_of("the tokenizer", error) from error
        return list(zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True))


def _behind(encoded, start):
    """Ids and first characters, from ``start`` on, of the tokens there; None if one may reach across ``start``.

    Some tokenizers leave space out of the offsets, so the token before must end at ``start`` itself.
    """
    ids, offsets = encoded
    first = bisect_left([begin for begin, _ in offsets], start)
    if first and offsets[first - 1][1] != start:
        return None
    if not first and start:
        return None
    return ids[first:], [begin - start for begin, _ in offsets[first:]]
