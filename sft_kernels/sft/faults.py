"""Counts what may be wrong with the tokens and labels of a data set, file by file."""

import re
from collections import Counter
from contextlib import suppress
from itertools import pairwise

import numpy as np

from .endings import Refused
from .masking import IGNORE
from .templates import ChatTemplate

_BLOCK = 1 << 20  # tokens that are looked at together
_ENOUGH = 4  # labels of which all being the next token is no chance
_NO_LABELS = re.compile(r"(no (token|assistant turn|answer)|nothing) to learn")  # reasons for refusals


class File:
    """The cases that were found in one file.

    Attributes:
        examples: those of the file that were looked at.
        count: the number of cases of each kind. ``"turn"``: runs of labels. ``"no end"``: turns
            whose labels have no token that ends a turn. ``"silent end"``: those of them that such a
            token follows, without a label. The others are of examples: ``"no label"``, of refused
            lines, too; ``"all labels"``; ``"other label"``, a token that is not the one at its
            place; ``"shifted"``, labels that are the next tokens, and ``"surely shifted"`` if there
            are enough of them; ``"begins twice"``, with the beginning-of-text token.
        first: ``file:line`` of the first case of each kind.
        silent: the token of the first silent end.
    """

    def __init__(self, part, examples):
        self.part, self.examples = part, examples
        self.count, self.first, self.silent = Counter(), {}, None

    def add(self, kind, rows):
        """Count a case for each of ``rows``: places in the part's index, in ascending order."""
        if len(rows):
            self.count[kind] += len(rows)
            self.first.setdefault(kind, f"{self.part.path}:{self.part.index[rows[0], 3]}")


def look_at(examples, tokenizer):
    """The :class:`File` s that some :class:`~.examples.Examples` come from.

    The tokens are read once, a block at a time, so that memory stays small.
    """
    chosen = np.zeros(sum(len(part.index) for part in examples.parts), bool)
    chosen[examples.chosen] = True
    ends, closing, files, at = end_tokens(tokenizer), _closing_tokens(tokenizer), [], 0
    for part in examples.parts:
        here = chosen[at : at + len(part.index)]
        at += len(part.index)
        file = File(part, int(here.sum()))
        if file.examples:
            _look_at_tokens(file, here, ends, closing, tokenizer.bos_token_id)
        for error in part.refused() if part.about["refused"] else ():
            if _NO_LABELS.search(error.reason):
                file.count["no label"] += 1
                file.first.setdefault("no label", f"{part.path}:{error.line}")
        files.append(file)
    return files


def end_tokens(tokenizer):
    """The ids of all tokens that end a turn or a text."""
    ends = [tokenizer.eos_token]
    if tokenizer.chat_template:
        with suppress(ValueError, Refused):  # rows of tokens do not need a template that serves
            ends += ChatTemplate(tokenizer, lambda sentence: None).endings.all
    ids = {end: tokenizer.convert_tokens_to_ids(end) for end in ends if end}
    # A token that the vocabulary lacks has the id of the unknown one, or none.
    return sorted({n for end, n in ids.items() if n is not None and tokenizer.convert_ids_to_tokens(n) == end})


def _closing_tokens(tokenizer):
    """The ids of special tokens of which one at the end of a turn's labels ends it.

    A base model's tokenizer often has a token that ends turns, but no chat template that tells which.
    """
    no_end = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted(special - no_end)


def _look_at_tokens(file, chosen, ends, closing, begin):
    ids, labels, index = file.part.arrays()
    _, length, kept, _ = index.T
    file.add("no label", np.flatnonzero(chosen & (kept == 0)))
    file.add("all labels", np.flatnonzero(chosen & (kept == length - 1) & (length > 1)))
    cuts = np.searchsorted(index[:, 0], np.arange(0, len(ids), _BLOCK))
    for first, last in pairwise(np.unique([*cuts, len(index)])):
        if chosen[first:last].any():
            block = _Block(file, first, ids, labels, index[first:last], chosen[first:last])
            block.find_turns(ends, closing)
            block.find_other_labels()
            block.find_beginnings(begin)


class _Block:
    """Examples of a file that lie end to end. ``row`` is the first one's place in the part's index."""

    def __init__(self, file, row, ids, labels, index, chosen):
        self.file, self.row, self.chosen = file, row, chosen
        here = slice(index[0, 0], index[-1, :2].sum())
        self.ids, self.labels = ids[here], labels[here]
        self.start = index[:, 0] - index[0, 0]
        self.stop = self.start + index[:, 1]
        self.kept = self.labels != IGNORE  # never an example's first token

    def find_turns(self, ends, closing):
        """Add each run of labels, and what is missing at its end.

        A run is ended by a label in ``ends``, and by one in ``closing`` that is the last, or the last but
        one, since a newline often stands behind it.
        """
        edges = np.flatnonzero(self.kept[1:] != self.kept[:-1]) + 1
        begins, stops = edges[::2], edges[1::2]
        if len(stops) < len(begins):
            stops = np.append(stops, len(self.kept))
        owner = np.searchsorted(self.start, begins, "right") - 1
        # In front of a run there is a place without a label.
        ended = np.isin(self.labels[stops - 1], closing) | np.isin(self.labels[stops - 2], closing)
        labelled = np.flatnonzero(self.kept & _is_any(self.labels, ends))
        ended[np.searchsorted(begins, labelled, "right") - 1] = True
        followed = np.flatnonzero(~ended & (stops < self.stop[owner]) & self.chosen[owner])
        silent = followed[_is_any(self.ids[stops[followed]], ends)]
        self._add("turn", owner)
        self._add("no end", owner[~ended])
        self._add("silent end", owner[silent])
        if self.file.silent is None and len(silent):
            self.file.silent = int(self.ids[stops[silent[0]]])

    def find_other_labels(self):
        """Add the examples with labels that are not the token at their place but another one.

        Among them are those whose labels are the next tokens.
        """
        other = self.kept & (self.labels != self.ids)
        if not other.any():
            return
        self._add("other label", np.flatnonzero(self._count(other)))
        following = np.append(self.labels[:-1] == self.ids[1:], False)
        inner = self.kept.copy()
        inner[self.stop - 1] = False  # the token behind the last was cut off
        kept, other, following = (self._count(inner & flags) for flags in (inner, other, following))
        shifted = (kept > 0) & (following >= 0.99 * kept) & (2 * other >= kept)
        self._add("shifted", np.flatnonzero(shifted))
        self._add("surely shifted", np.flatnonzero(shifted & (kept >= _ENOUGH)))

    def find_beginnings(self, token):
        """Add the examples that begin with ``token`` twice."""
        if token is not None:
            rows = np.flatnonzero(self.stop - self.start > 1)
            at = self.start[rows]
            self._add("begins twice", rows[(self.ids[at] == token) & (self.ids[at + 1] == token)])

    def _add(self, kind, examples):
        self.file.add(kind, self.row + examples[self.chosen[examples]])

    def _count(self, flags):
        """Count the flags of each example that are set."""
        return np.add.reduceat(flags, self.start, dtype=np.int64)


def _is_any(values, tokens):
    found = np.zeros(len(values), bool)
    for token in tokens:
        found |= values == token
    return found
