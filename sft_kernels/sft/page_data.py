"""The numbers of the page that ``inspect`` writes: an example under each mask, the schedule, the
rows of the first step."""

import math
from typing import NamedTuple

import torch

from .. import linear_cross_entropy
from .._terminal import printable
from .data import stream
from .lr import cosine_factor
from .masking import IGNORE, MODES, Encoder, Example
from .model import boundaries_given, check_vocabulary, head
from .packing import collate
from .positions import most_positions
from .precision import autocast
from .stock import packed_hidden_states

_POINTS = 400  # of a curve, at most


class View(NamedTuple):
    """An example under one mask. Either ``example`` or ``refused`` is None."""

    mode: str
    example: Example | None
    refused: str | None  # the reason
    losses: list[float] | None = None  # nats, NaN for a token without loss; None without a model

    @property
    def loss(self):
        """The mean over the tokens that carry loss, in nats a token; None without a model."""
        if self.losses is None:
            return None
        labels = self.example.labels
        kept = [loss for loss, label in zip(self.losses, labels, strict=True) if label != IGNORE]
        return math.fsum(kept) / len(kept)


class Shown(NamedTuple):
    """An example of the data with its view under each mask."""

    example: Example
    views: list[View]
    own_labels: bool  # the line brings its labels, whatever the mask
    no_loss: str = ""  # a sentence that says why its views have no losses


def shown_examples(recipe, sources, examples, tokenizer, model=None):
    """A list of :class:`Shown`: each of ``examples`` encoded again under every mask.

    Under the recipe's own mask the example itself is taken. ``examples`` are few; their lines are
    read from ``sources`` again. ``model`` gives the loss of each token, as it would be in training.
    """
    examples = [*examples]
    records = _records(sources, {example.source for example in examples})
    split = recipe.split_turns
    encoders = {mode: Encoder(tokenizer, mode, split and mode != "all") for mode in MODES}
    found = []
    for example in examples:
        record = records[example.source]
        views = []
        for mode, encoder in encoders.items():
            own = mode == recipe.mask
            views.append(View(mode, example, None) if own else _encoded(encoder, record, example))
        own_labels = record.tokens is not None
        found.append(Shown(example, views, own_labels, "With --model their loss is here."))
    return found if model is None else _with_losses(model, tokenizer, recipe, found)


def _records(sources, wanted):
    """The :class:`~.rows.Record` s of the lines in ``wanted``, by their ``file:line``."""
    records, missing = {}, set(wanted)
    for source in sources:
        prefix = f"{source.path}:"
        if not any(name.startswith(prefix) for name in missing):
            continue
        for record in stream(source, lambda error: None):
            name = prefix + str(record.line)
            if name in missing:
                missing.remove(name)
                records[name] = record
                if not missing:
                    return records
    if missing:
        raise ValueError(printable(f"sources: {min(missing)} is not there; has the file changed?"))
    return records


def _encoded(encoder, record, shown):
    """The :class:`View` of a record: of its examples the one with the tokens of ``shown``."""
    try:
        found = encoder.examples(record)
    except ValueError as error:
        return View(encoder.mode, None, printable(getattr(error, "reason", str(error))))
    same = next((example for example in found if example.input_ids == shown.input_ids), None)
    if same is None and len(found) > 1:
        return View(encoder.mode, None, "the chat template renders this line differently each time")
    return View(encoder.mode, same or found[0], None)


@torch.no_grad()
def _with_losses(model, tokenizer, recipe, found):
    check_vocabulary(model, tokenizer)
    was_training = model.training
    with boundaries_given(model), autocast(model.device, recipe):
        most = most_positions(model, packed_hidden_states)
        model.eval()
        try:
            return [_with_loss(model, shown, most) for shown in found]
        finally:
            model.train(was_training)


def _with_loss(model, shown, most):
    if most is not None and len(shown.example.input_ids) > most:
        return shown._replace(no_loss=f"The model has no more than {most} positions.")
    hidden, views = {}, []  # masks mostly share their tokens
    for view in shown.views:
        if view.example is not None:
            ids = view.example.input_ids
            batch = collate([[view.example]], len(ids), 0).to(model.device)
            if (known := hidden.get(tuple(ids))) is None:
                known = hidden[tuple(ids)] = packed_hidden_states(model, batch)
            losses = linear_cross_entropy(known, **head(model), shift=True, kept=batch.kept, reduction="none")
            by_label = [math.nan, *losses[0, :-1].tolist()]  # they stand where they are predicted
            labels = view.example.labels
            losses = [math.nan if b == IGNORE else a for a, b in zip(by_label, labels, strict=True)]
            view = view._replace(losses=losses)
        views.append(view)
    return shown._replace(views=views)


class Schedule(NamedTuple):
    """The learning rates of a run. ``points`` are ``(step, rate)``, steps counted from 1."""

    total: int
    warmup: int
    peak: float
    floor: float
    points: list[tuple[int, float]]


def schedule_of(steps, recipe):
    """The :class:`Schedule` of a recipe's :class:`~.steps.Steps`.

    Of a long run there are 400 points or a few more, the first and the last step among them.
    """
    total, warmup = steps.total, steps.warmup

    chosen = {warmup, warmup + 1, total} - {0, total + 1}
    chosen |= {1 + i * (total - 1) // _POINTS for i in range(_POINTS)}
    floor = recipe.lr * cosine_factor(total, total, warmup)
    return Schedule(total, warmup, recipe.lr, floor, [(step, steps.lr(step)) for step in sorted(chosen)])


class FirstStep(NamedTuple):
    """The lengths of the examples of the first step: of each micro-batch, of each row."""

    micro_batches: list[list[list[int]]]
    row_tokens: int

    @property
    def lines(self):
        """The lengths of each micro-batch, an example a line."""
        return [[length for row in rows for length in row] for rows in self.micro_batches]

    @property
    def tokens(self):
        return sum(map(sum, self.lines))

    @property
    def padded(self):
        """Positions with an example a line, each filled up to the longest of its micro-batch."""
        return sum(len(lengths) * max(lengths) for lengths in self.lines)

    @property
    def packed(self):
        """Positions of the packed rows."""
        return sum(map(len, self.micro_batches)) * self.row_tokens


def first_step(steps):
    """The :class:`FirstStep` of :class:`~.steps.Steps`."""
    _, micro_batches = next(steps.after(0))
    lengths = [[[len(e.input_ids) for e in row] for row in rows] for rows in micro_batches]
    return FirstStep(lengths, steps.recipe.row_tokens)
