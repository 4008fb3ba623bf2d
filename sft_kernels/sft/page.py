"""Writes one page of HTML that shows what a run would train on: tokens, schedule, first step."""

import html
import math
import os
import secrets
from contextlib import suppress
from pathlib import Path

from .. import __version__
from .._terminal import printable, reason_of
from . import page_figures as figures
from .masking import IGNORE
from .page_data import first_step, schedule_of, shown_examples
from .page_style import CSS
from .steps import Steps
from .token_texts import TokenTexts, plain, visible
from .whole import sync

_MOST_TOKENS = 4000  # of an example
_LEVELS = {"ok": "✓ ok", "advice": "! advice", "failed": "✕ failed"}


def write_page(path, recipe, sources, examples, tokenizer, audit, *, shown=1, model=None):
    """Write one HTML file that needs no other and no network; it is there in whole or not at all.

    Args:
        path: of the file. A file that is there is replaced; see :func:`check_page`.
        recipe: a :class:`~.recipe.Recipe`.
        sources: the :class:`~.sources.Source` s of the data, from which shown lines are read again.
        examples: their :class:`~.examples.Examples` under ``recipe.mask``.
        tokenizer: of the examples.
        audit: the :class:`~.audit.Audit` of the examples.
        shown: how many examples to show token by token.
        model: a causal LM, which gives each token's loss; None shows no losses.

    Raises:
        ValueError, OSError: a path that cannot be written, with "html" as its name; a negative
            ``shown``; a line that is no longer in ``sources``; a model that does not fit.
    """
    path = check_page(path, [source.path for source in sources])
    if shown < 0:
        raise ValueError(f"shown: expected 0 or more, got {shown}")
    steps = Steps(examples, recipe)
    found = shown_examples(recipe, sources, examples[:shown], tokenizer, model)
    parts = [
        _head(sources, audit),
        _tokens(found, recipe.mask, tokenizer),
        _schedule(schedule_of(steps, recipe)),
        _rows(first_step(steps), audit),
    ]
    names = ", ".join(_text(os.path.basename(source.path)) for source in sources)
    _write(path, _document(f"{names} · sft-kernels inspect", "\n".join(parts)))


def check_page(path, data=()):
    """The path of a page, if one may be written there.

    Refuses a folder, a link, a device, a path in a folder that is missing or cannot be written to,
    and one of the files ``data``.
    """
    name = printable(os.fspath(path))
    if not name or "\0" in os.fspath(path):
        raise ValueError(f"html: expected a file, got {name!r}")
    path = Path(path)
    if path.is_symlink():
        raise FileExistsError(f"html: {name} is a link, through which nothing is written")
    if path.is_dir():
        raise IsADirectoryError(f"html: {name} is a folder; give a file")
    if not path.parent.is_dir():
        parent = printable(str(path.parent))
        raise FileNotFoundError(f"html: {parent} is no folder, so {name} cannot be written")
    if path.exists():
        if not path.is_file():
            raise FileExistsError(f"html: {name} is no file; give a new path")
        if any(os.path.exists(file) and path.samefile(file) for file in data):
            raise FileExistsError(f"html: {name} is the data; give another path")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"html: {name} cannot be written to (no permission)")
    return path


def _write(path, text):
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "xb") as file:
            file.write(text.encode())
        sync(partial)
        partial.replace(path)
    except OSError as error:
        reason = f"cannot be written ({reason_of(error)})"
        raise type(error)(f"html: {printable(str(path))} {reason}") from error
    finally:
        with suppress(OSError):
            partial.unlink()  # it is there only if something failed


def _document(title, body):
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{CSS}</style>
</head>
<body>
<main>
{body}
</main>
<footer>Written by <code>sft-kernels inspect</code> {_text(__version__)}. It needs no
network.</footer>
</body>
</html>
"""


def _text(value):
    return html.escape(printable(str(value)))


def _numbers(*pairs):
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in pairs)
    return f'<dl class="numbers">{items}</dl>'


def _head(sources, audit):
    files = "".join(f"<code>{_text(source.path)}</code> " for source in sources)
    filled = f'<span style="width:{audit.kept_share:.2%}"></span>'
    kept = f"{audit.kept_share:.1%}<small>{audit.kept:,} tokens carry loss</small>"
    mean = audit.tokens / audit.examples
    lengths = f"{mean:,.1f} an example, longest {audit.longest:,}"
    numbers = _numbers(
        ("Files", f"{len(sources):,}"),
        ("Examples", f"{audit.examples:,}"),
        ("Tokens", f"{audit.tokens:,}<small>{lengths}</small>"),
        ("Kept", f'{kept}<span class="share" aria-hidden="true">{filled}</span>'),
    )
    findings = "".join(
        f'<li><span class="level {finding.level}">{_LEVELS[finding.level]}</span>'
        f"<div><h3>{_text(finding.name)}</h3><p>{_text(finding.text)}</p></div></li>"
        for finding in audit.findings
    )
    level, verdict = _verdict(audit)
    return (
        f"<header><h1>What this run trains on</h1><p>{files}</p></header>"
        f'<div class="card">{numbers}</div>'
        "<h2>Checks before the first step</h2>"
        f'<div class="card"><p class="verdict {level}">{verdict}</p>'
        f'<ul class="findings">{findings}</ul></div>'
    )


def _verdict(audit):
    failed = len(audit.failed)
    if failed:
        return "failed", f"{_count(failed, 'check')} failed: training refuses to start."
    advised = sum(finding.level == "advice" for finding in audit.findings)
    if advised:
        return "advice", f"Training may start; {_count(advised, 'check')} gave advice."
    return "ok", "Training may start; every check passed."


def _count(number, one, several=None):
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def _tokens(found, chosen, tokenizer):
    if not found:
        return ""
    texts = TokenTexts(tokenizer)
    blocks = "".join(_example(number, each, chosen, texts) for number, each in enumerate(found, 1))
    return f"""<h2>Which tokens carry loss</h2>
<p>A coloured, underlined token carries loss: the token before it has to predict it. Point at a
token for its id, its label and its loss.</p>
{blocks}"""


def _example(number, shown, chosen, texts):
    name, switch, views, own_labels = f"example-{number}", [], [], ""
    if shown.own_labels:
        own_labels = '<p class="soft small">This line brings its own labels, whatever the mask.</p>'
    for view in shown.views:
        checked, own = (" checked", " (this recipe)") if view.mode == chosen else ("", "")
        switch.append(
            f'<input type="radio" name="{name}" id="{name}-{view.mode}"{checked}>'
            f'<label for="{name}-{view.mode}"><code>{view.mode}</code>'
            f"<span>{_short(view)}{own}</span></label>"
        )
        views.append(f'<div class="view">{_view(view, shown, texts)}</div>')
    source = f'<code class="soft">{_text(shown.example.source)}</code>'
    return (
        f'<section class="card example"><h3>Example {number} {source}</h3>{own_labels}'
        f"<fieldset><legend>Mask</legend>{''.join(switch)}{''.join(views)}</fieldset></section>"
    )


def _short(view):
    if view.refused is not None:
        return "refused"
    loss = "" if view.losses is None else f", loss {view.loss:.4f}"
    return f"{view.example.kept:,} kept{loss}"


def _view(view, shown, texts):
    if view.refused is not None:
        return f'<p class="refused failed">Refused under this mask: {_text(view.refused)}</p>'
    ids, kept = view.example.input_ids, view.example.kept
    loss = _text(shown.no_loss)
    if view.losses is not None:
        loss = f"Their mean loss is <strong>{view.loss:.4f}</strong> nats a token."
    cut = ""
    if len(ids) > _MOST_TOKENS:
        words = f"The first {_MOST_TOKENS:,} tokens are shown. The numbers are of all."
        cut = f'<p class="small soft">{words}</p>'
    tokens = "".join(_token(view, i, texts) for i in range(min(len(ids), _MOST_TOKENS)))
    return (
        f"<p><strong>{kept:,}</strong> of {len(ids):,} tokens carry loss. {loss}</p>{cut}"
        f'<div class="tokens" tabindex="0" role="region" aria-label="Tokens under {view.mode}">'
        f"{tokens}</div>"
    )


def _token(view, i, texts):
    token, label = view.example.input_ids[i], view.example.labels[i]
    about = f"position {i}, id {token}, "
    if label == IGNORE:
        about += "no loss" if i else "no loss: nothing stands before it"
    elif label == token:
        about += "trained: predicted from the token before"
    else:
        about += f"trained: the token before predicts id {label}, “{plain(texts(label))}”"
    if view.losses is not None and not math.isnan(view.losses[i]):
        about += f", loss {view.losses[i]:.2f}"
    kinds = " ".join(["k"] * (label != IGNORE) + ["s"] * (token in texts.special))
    kinds = f' class="{kinds}"' if kinds else ""
    shown = visible(texts(token))
    inside = shown.removesuffix("\n")  # or an end of this token would begin the next line
    return f'<bdi{kinds} title="{html.escape(about)}">{inside}</bdi>{shown[len(inside) :]}'


def _schedule(schedule):
    share = f"{schedule.floor / schedule.peak:.0%} of the peak" if schedule.peak else "as the peak"
    numbers = _numbers(
        ("Steps in all", f"{schedule.total:,}"),
        ("Warm-up", _count(schedule.warmup, "step")),
        ("Peak", f"{schedule.peak:.3g}"),
        ("Floor", f"{schedule.floor:.3g}<small>{share}</small>"),
    )
    rises = "It rises from above zero, then falls" if schedule.warmup else "It falls"
    return f"""<h2>Learning rate</h2>
<p>{rises} along a cosine. The first and the last step are marked.</p>
<div class="card">{numbers}{figures.curve(schedule)}</div>"""


def _rows(step, audit):
    examples = sum(map(len, step.lines))
    batches = _count(len(step.micro_batches), "micro-batch", "micro-batches")
    rows = sum(map(len, step.micro_batches))
    one = "One example a line, filled up to the longest of its micro-batch."
    several = f"{_count(rows, 'row')} of {step.row_tokens:,} tokens."

    def card(name, about, positions, figure):
        numbers = _numbers(
            ("Padding", f"{1 - step.tokens / positions:.1%}"),
            ("Positions", f"{positions:,}"),
        )
        return f'<div class="card"><h3>{name}</h3><p class="soft">{about}</p>{numbers}{figure}</div>'

    return f"""<h2>The rows of the first step</h2>
<p>{_count(examples, "example")}, {step.tokens:,} tokens, in {batches}: padded
as plain batches are, and packed as this run packs them. Each drawing has a scale of its own, so its
dashed part is its share of padding.</p>
<div class="two">
{card("Padded", one, step.padded, figures.padded(step))}
{card("Packed", several, step.packed, figures.packed(step))}
</div>
<p class="key small soft">
<span><span class="swatch tokens-of"></span>tokens, examples in two tones in turn</span>
<span><span class="swatch filled"></span>padding</span></p>
<p class="soft">Packing often puts examples of like lengths into a row, so a batch of just these
pads little. Of the whole data, batches of {audit.batch:,} in its order are
{audit.padding_share:.1%} padding, packed rows {audit.row_padding_share:.1%}.</p>"""
