"""All that comes before the first step: data, tokenizer and model of a recipe, read and checked."""

import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from . import held_out, resume, state
from . import model as models
from .audit import audit, check_audit
from .data import stream
from .dataset import end_of_turn, load_examples
from .endings import Refused
from .examples import Examples
from .files import template
from .loading import check_recipe, load_config
from .masking import Encoder
from .metrics import load_metric
from .positions import most_positions, without_longer
from .precision import dtype_of
from .progress import say
from .recipe import Recipe, check
from .saving import check_folder
from .sources import Source, check_pipes
from .stock import batch_to_check, check_against_stock, packed_hidden_states


class Prepared(NamedTuple):
    """Everything that a run starts from."""

    recipe: Recipe  # with the model that is to be loaded
    asked: Recipe  # as it was given
    out: Path  # absolute
    given: bool  # the model was handed in
    earlier: resume.Earlier | None  # the run that goes on
    model: torch.nn.Module
    tokenizer: Any
    examples: Examples  # to train on
    unseen: Examples  # held out
    end: int | None  # the token that ends an answer; None: the model's own
    metric: Callable

    @property
    def pad_id(self):
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return (pad if pad is not None else end) or 0


def prepare(recipe, model=None, tokenizer=None):
    """The :class:`Prepared` of a recipe. Nothing is written but the cache of tokenised data.

    The loss and the gradients of one packed row have been compared with the model's own.

    Raises:
        ValueError: a value of the recipe, or a model or data that cannot be trained on, which fail the audit, say.
        OSError: a file that cannot be read, or a folder that cannot be written to.
    """
    given = model is not None
    check(recipe, given)
    metric = load_metric(recipe.metric)
    held_out.check(recipe, metric)
    check_pipes([*recipe.data, *recipe.eval_data])
    asked, earlier = recipe, resume.find(recipe) if recipe.resume else None
    if earlier is None:
        check_folder(recipe.out)
    out = Path(recipe.out).absolute()  # also if the working directory changes
    state.seed(recipe.seed)
    if given:
        models.check_given(model)
    if recipe.init_from is not None:
        recipe = replace(recipe, model=resume.earlier_model(recipe.init_from))
    recipe = check_recipe(recipe, given, tokenizer is not None, dtype_of(recipe.parameters))
    folder = earlier and earlier.model
    sources = [Source(path) for path in recipe.data]
    tokenizer = tokenizer or prepare_tokenizer(recipe, sources, folder)
    encoder = Encoder(tokenizer, recipe.mask, recipe.split_turns)
    examples, unseen = read(recipe, sources, encoder)
    check_audit(audit(examples, encoder, recipe.row_tokens))
    if len(unseen):
        check_audit(audit(unseen, encoder, recipe.row_tokens), advise=False)
    if not given:
        model = prepare_model(recipe, folder)
    models.check_vocabulary(model, tokenizer)
    if recipe.activation_checkpointing:
        models.checkpoint_activations(model)
    end = _end_of_answers(encoder, examples, unseen)
    ready = Prepared(recipe, asked, out, given, earlier, model, tokenizer, examples, unseen, end, metric)
    with models.boundaries_given(model):  # as in training, where a window that only a mask holds would be lost
        most = most_positions(model, packed_hidden_states)
        examples, unseen = (without_longer(some, most, recipe.skip_bad) for some in (examples, unseen))
        checked = batch_to_check(model, examples + unseen, recipe.row_tokens, ready.pad_id)
        check_against_stock(model, checked.to(model.device))
    return ready._replace(examples=examples, unseen=unseen)


def train_tokenizer_on(paths, vocab_size, skip_bad=False, chat_template=None):
    """A byte-level BPE of at most ``vocab_size`` tokens, trained on what the conversations in ``paths`` say.

    ``paths`` may be :class:`~.sources.Source` s, as for :func:`~.dataset.load_examples`.
    """
    sources = [path if isinstance(path, Source) else Source(path) for path in paths]
    refuse = (lambda error: None) if skip_bad else None
    records = (record for source in sources for record in stream(source, refuse))
    tokenizer = models.train_tokenizer(filter(None, map(_words, records)), vocab_size)
    if chat_template:
        tokenizer.chat_template = template(chat_template)
    return tokenizer


def _words(record):
    return record.text or "\n".join(str(m.get("content") or m.get("tool_calls")) for m in record.messages or ())


def prepare_model(recipe, folder=None):
    """The recipe's model, or the one in ``folder``, on the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, code = dtype_of(recipe.parameters), recipe.trust_remote_code
    return models.load_model(folder or recipe.model, device, code, dropout=recipe.dropout, dtype=dtype)


def prepare_tokenizer(recipe, sources=None, earlier=None):
    """The recipe's tokenizer; for a bare config one of the config's vocabulary that is trained on the data.

    ``sources`` are the data, if they are open. ``earlier`` is a folder with the one that was trained before.
    """
    if recipe.tokenizer or not models.is_config(recipe.model):
        folder = recipe.tokenizer or recipe.model
        return models.load_tokenizer(folder, recipe.chat_template, recipe.trust_remote_code)
    if earlier is not None:
        return models.load_tokenizer(earlier)
    vocab_size = load_config(recipe.model, recipe.trust_remote_code).get_text_config().vocab_size
    return train_tokenizer_on(sources or recipe.data, vocab_size, recipe.skip_bad, recipe.chat_template)


def read(recipe, sources, encoder):
    """``(examples, held_out)``; held out are files of their own, and a share of the conversations.

    Says what was noticed, and which lines were left out.
    """
    load = partial(
        load_examples,
        encoder=encoder,
        row_tokens=recipe.row_tokens,
        skip_bad=recipe.skip_bad,
        cache_folder=recipe.cache,
    )
    examples, bad = load(sources)
    refusals, held_out = [bad], examples.choose(slice(0, 0))
    if recipe.eval_data:
        held_out, bad = load(recipe.eval_data, desc="reading held-out", name="eval_data")
        refusals.append(bad)
    if recipe.holdout:
        order = np.arange(len(examples))
        random.Random(f"{recipe.seed}/holdout").shuffle(order)
        examples = examples.choose(order)
        of_line = examples.sources()  # a split conversation stays together
        lines, first = np.unique(of_line, return_index=True)
        count = max(1, round(recipe.holdout * len(lines)))
        if count >= len(lines):
            raise ValueError(f"holdout: {recipe.holdout} of {len(lines)} conversations leaves none to train on")
        chosen = np.isin(of_line, lines[np.argsort(first)[:count]])
        held_out += examples.choose(np.flatnonzero(chosen))
        examples = examples.choose(np.flatnonzero(~chosen))
    for note in encoder.notes:
        say(note)
    for error in islice(chain(*refusals), 20):
        say(f"skipped {error}")
    if bad := sum(map(len, refusals)):
        say(f"skipped {bad} lines, {len(examples) + len(held_out)} are left")
    return examples, held_out


def _end_of_answers(encoder, *data):
    """The token that ends an answer: the one that the data teach, or else the chat template's; None: the model's."""
    end = next((end for examples in data if (end := end_of_turn(examples)) is not None), None)
    if end is None and encoder.tokenizer.chat_template is not None:
        with suppress(ValueError, Refused):  # tokens and texts do not need one that serves
            return encoder.end_of_turn
    return end
