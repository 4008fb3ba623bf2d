"""Shows examples token by token and the findings of an audit, in colour on a terminal."""

import os
import sys
from contextlib import suppress
from functools import cache
from itertools import zip_longest
from unicodedata import east_asian_width

from .._terminal import coloured, printable
from .masking import IGNORE
from .token_texts import TokenTexts

_WIDTH = 20  # of a column of tokens
_LEVELS = ("failed", "advice", "ok")
_STYLES = {"failed": "1;31", "advice": "33", "ok": "32", "kept": "1;32", "masked": "2", "special": "35"}


def wants_colour(stream):
    """Returns true for a terminal, unless ``TERM=dumb`` or ``NO_COLOR`` asks for none."""
    with suppress(ValueError):  # the stream is closed
        return stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
    return False


def show(make):
    """Print the text that ``make(paint)`` returns.

    ``paint(text, *styles)`` makes a text printable. On a terminal that wants colour it then puts
    control sequences around it. So ``make`` has to paint every text that comes from data.
    """
    with coloured():
        colour = wants_colour(sys.stdout)
    if not colour:
        print(make(plain))
        return
    text = make(_painted)  # by now, since libraries may print what is not painted
    with coloured():
        print(text)


def plain(text, *styles):
    """Returns ``text`` without control characters, and without colour."""
    return printable(text)


def _painted(text, *styles):
    codes = ";".join(_STYLES[style] for style in styles)
    return f"\x1b[{codes}m{printable(text)}\x1b[0m" if codes else printable(text)


def label_table(example, tokenizer, paint=plain):
    """A line per position: the token, the next token, and the label that is trained there.

    It is what the hidden state at that position learns to predict, or · if nothing is trained. A
    label that is not the next token has ``!`` behind it.
    """
    texts = TokenTexts(tokenizer)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}

    @cache
    def words(token):
        text = repr(texts(token)).replace(r"\udc", r"\x")  # of a byte that is part of a character
        return text if text[1:-1].isspace() else text[1:-1]

    def column(token, *styles):
        text = "" if token is None else words(token)
        wide = sum(east_asian_width(character) in "WF" for character in text)
        return paint(f"{text:<{max(0, _WIDTH - wide)}}", *styles, *["special"] * (token in special))

    ids = example.input_ids
    lines = [
        paint(f"{example.source}: {len(ids)} tokens, {example.kept} kept"),
        f"{'':>6} {'token':<{_WIDTH}} {'next token':<{_WIDTH}} label",
    ]
    for place, (token, following, label) in enumerate(zip_longest(ids, ids[1:], example.labels[1:])):
        if label in (None, IGNORE):
            style, shown = "masked", "·"
        elif label == following:
            style, shown = "kept", words(label)
        else:
            style, shown = "failed", f"{words(label)} !"
        row = paint(f"{place:>6}", style), column(token, style), column(following, style), paint(shown, style)
        lines.append(" ".join(row))
    return "\n".join(lines)


def summary(audit):
    """The numbers of an :class:`~.audit.Audit`, as lines."""
    a = audit
    return "\n".join(
        [
            f"examples        {a.examples}",
            f"tokens          {a.tokens} (mean {a.tokens / a.examples:.1f}, longest {a.longest})",
            f"kept            {a.kept} ({a.kept_share:.1%})",
            f"end of turn     trained in {a.ended} of {a.turns} turns",
            f"nothing learned from {a.unlearned} conversations",
            f"padded          {a.padded} tokens in batches of {a.batch}, {a.padding_share:.1%} padding",
            f"packed          {a.packed} tokens in {a.rows} rows of {a.row_tokens}, {a.row_padding_share:.1%} padding",
            _packing(a),
        ]
    )


def _packing(audit):
    if audit.packing_gain < 0:
        return f"packing needs   {audit.packed / audit.padded:.1f} times the padded tokens; shorter rows would save"
    return f"packing saves   {audit.packing_gain:.1%} of the padded tokens"


def findings(audit, paint=plain):
    """A line for each :class:`~.audit.Finding`, the failed ones first, then advice."""
    found = sorted(audit.findings, key=lambda finding: _LEVELS.index(finding.level))
    return "\n".join(f"{paint(f'{each.level:<7}', each.level)} {each.name}: {paint(each.text)}" for each in found)
