"""Checks a data set before the first step, for faults that training itself would not show."""

from typing import Literal, NamedTuple

import numpy as np

from .._terminal import printable
from .faults import look_at
from .masking import IGNORE
from .packing import lengths_of, pack
from .progress import say

_MOST_PADDING = 0.2  # of padded batches; above it the advice is to pack
_MOST_ROW_PADDING = 0.1


class Finding(NamedTuple):
    """The result of one check as a sentence. If it failed, it names the first example's file and line."""

    level: Literal["ok", "advice", "failed"]
    name: str
    text: str


class Audit(NamedTuple):
    """The numbers of a data set, and a finding of each check, in the order of the checks."""

    examples: int
    tokens: int
    longest: int
    kept: int  # labels
    turns: int  # runs of labels: an assistant's turn each, or with mask="all" a whole example
    ended: int  # of them those whose labels have a token that ends a turn
    batch: int  # examples in each padded batch that packing is compared with
    padded: int  # positions of those batches, each filled up to its longest
    rows: int
    row_tokens: int
    findings: list[Finding]
    unlearned: int = 0  # conversations with nothing to learn, refused lines included

    @property
    def packed(self):
        return self.rows * self.row_tokens

    @property
    def kept_share(self):
        return self.kept / self.tokens

    @property
    def padding_share(self):
        return 1 - self.tokens / self.padded

    @property
    def row_padding_share(self):
        return 1 - self.tokens / self.packed

    @property
    def packing_gain(self):
        """The share of the padded positions that packing saves; below 0 if it needs more."""
        return 1 - self.packed / self.padded

    @property
    def failed(self):
        return [finding for finding in self.findings if finding.level == "failed"]


def audit(examples, encoder, row_tokens, batch=8):
    """Returns the :class:`Audit` of some :class:`~.examples.Examples`.

    A check fails only if what it finds is wrong in any training. The :class:`~.masking.Encoder`
    makes no such example of a conversation; rows that bring ``input_ids`` and ``labels`` may be one.

    Args:
        encoder: the one that made the examples; its tokenizer and its mode are read.
        row_tokens: tokens in a packed row.
        batch: examples in each of the padded batches that packing is compared with.
    """
    if not len(examples):
        raise ValueError("examples: expected at least one")
    lengths = lengths_of(examples)
    files = look_at(examples, encoder.tokenizer)
    starts = np.arange(0, len(lengths), batch)
    sizes = np.diff(np.append(starts, len(lengths)))
    turns = _total(files, "turn")
    found = Audit(
        examples=len(lengths),
        tokens=int(lengths.sum()),
        longest=int(lengths.max()),
        kept=int(examples.kept.sum()),
        turns=turns,
        ended=turns - _total(files, "no end"),
        batch=batch,
        padded=int((sizes * np.maximum.reduceat(lengths, starts)).sum()),
        rows=len(pack(lengths, row_tokens)),
        row_tokens=row_tokens,
        findings=[],
        unlearned=_total(files, "no label"),
    )
    checks = {
        "something to learn": _labels(found, files),
        "end of turn": _ends(found, files, encoder),
        "one shift": _shift(files),
        "beginning of text": _beginnings(files, encoder.tokenizer),
        "prompts": _prompts(found, files, encoder.mode),
        "padded batches": _padding(found),
        "packed rows": _rows(found),
    }
    return found._replace(findings=[Finding(level, name, printable(text)) for name, (level, text) in checks.items()])


def check_audit(audit, advise=True):
    """Print the advice of an :class:`Audit`. Raise ``ValueError`` for the first check that failed."""
    for finding in audit.findings if advise else ():
        if finding.level == "advice":
            say(f"{finding.name}: {finding.text}")
    for finding in audit.failed:
        raise ValueError(f"{finding.name}: {finding.text}")


def _labels(found, files):
    if not found.kept:
        return "failed", f"{_first(files, 'no label')}: no token carries loss, here and in all other examples"
    if found.unlearned:
        have = "conversation has" if found.unlearned == 1 else "conversations have"
        return "advice", f"{found.unlearned} {have} nothing to learn, the first is {_first(files, 'no label')}"
    return "ok", "every example has tokens that carry loss"


def _ends(found, files, encoder):
    """Fails if no turn of a file trains its end, but the token behind one ends turns.

    Labels that stop short of other tokens may have been cut to a length.
    """
    if found.ended == found.turns:
        return "ok", "every turn trains the token that ends it"
    if encoder.mode == "completion":
        return "advice", "mask 'completion' leaves out the end of a turn, so a model does not learn to stop"
    for file in files:
        if file.count["silent end"] and file.count["no end"] == file.count["turn"]:
            end = encoder.tokenizer.convert_ids_to_tokens(file.silent)
            return "failed", (
                f"{file.first['silent end']}: {end} ends an answer and has the label {IGNORE}, and no "
                "answer of the file trains its end, so the model would not learn to stop (often "
                "because padding is the same token and was masked); label it, or choose mask "
                "'completion' if that is meant"
            )
    if not found.ended:
        return "advice", "no turn trains a token that ends it, so a model does not learn to stop"
    missing, first = found.turns - found.ended, _first(files, "no end")
    return "advice", f"{missing} of {found.turns} turns train no token that ends them, the first is in {first}"


def _shift(files):
    for file in files:
        if file.count["surely shifted"] or 2 * file.count["shifted"] >= max(1, file.examples):
            return "failed", (
                f"{file.first['shifted']}: the labels are those of the next token, so they are "
                "shifted already, and the loss would shift them once more; put each label at its own "
                "token's place"
            )
    if count := _total(files, "other label"):
        return "advice", (
            f"labels are other tokens than the input's in {_of(count)}, the first is "
            f"{_first(files, 'other label')}; the loss shifts labels once, so each belongs at its own "
            "token's place"
        )
    return "ok", "every label is the token at its own place, and the loss shifts it once"


def _beginnings(files, tokenizer):
    if count := _total(files, "begins twice"):
        first = _first(files, "begins twice")
        return "advice", f"{tokenizer.bos_token} stands twice at the beginning of {_of(count)}, the first is {first}"
    return "ok", "no example begins with two beginning-of-text tokens"


def _prompts(found, files, mode):
    if mode == "all":
        return "ok", "mask 'all' trains prompts, too"
    if count := _total(files, "all labels"):
        return "advice", (
            f"every token carries loss, a prompt's as well, in {count} of {found.examples} examples, "
            f"the first is {_first(files, 'all labels')}; the label {IGNORE} takes loss from a token"
        )
    return "ok", "every example has tokens without loss, as a prompt's"


def _padding(found):
    batches = f"batches of {found.batch} in the order given, each filled up to its longest"
    share = f"{batches}, are {found.padding_share:.1%} padding"
    if found.padding_share <= _MOST_PADDING:
        return "ok", f"{share}, no more than {_MOST_PADDING:.0%}"
    gain, pack = found.padded / found.packed, "pack them into shorter rows"
    if gain > 1:
        pack = f"pack them, as train does ({gain:.1f} times fewer positions)"
    return "advice", f"{share}, more than {_MOST_PADDING:.0%}; {pack}, or sort them by length"


def _rows(found):
    share = f"rows of {found.row_tokens} tokens are {found.row_padding_share:.1%} padding"
    if found.row_padding_share <= _MOST_ROW_PADDING:
        return "ok", f"{share}, no more than {_MOST_ROW_PADDING:.0%}"
    if found.packed - found.tokens < found.row_tokens:
        return "advice", (
            f"{share}, since the data fill only {found.tokens / found.row_tokens:.1f} of them; the "
            f"longest example has {found.longest} tokens, so a smaller row_tokens would do"
        )
    mean = found.tokens / found.examples
    return "advice", f"{share}, since few examples (mean {mean:.0f} tokens) fit together; give a larger row_tokens"


def _of(count):
    return "1 example" if count == 1 else f"{count} examples"


def _total(files, kind):
    return sum(file.count[kind] for file in files)


def _first(files, kind):
    return next(file.first[kind] for file in files if kind in file.first)
