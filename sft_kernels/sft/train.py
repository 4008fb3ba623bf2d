"""The thin reference trainer: masked, packed, one denominator a step."""

import random
from contextlib import nullcontext
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch

from .. import AdamW, decay_groups, linear_cross_entropy
from . import model as models
from .data import stream
from .dataset import end_of_turn, load_examples
from .evaluate import masked_loss
from .files import template
from .finish import saved_at_the_end
from .loading import check_recipe, load_config
from .lr import cosine_factor
from .masking import Encoder
from .packing import PackedRows, collate, groups_of, lengths_of, pack
from .positions import most_positions, without_longer
from .recipe import Recipe as Recipe
from .recipe import check
from .report import RunLog, say
from .saving import check_folder, rehearse
from .sources import Source, check_pipes
from .stock import batch_to_check, check_against_stock, packed_hidden_states


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


def prepare_tokenizer(recipe, sources=None):
    """The recipe's tokenizer; for a bare config one of the config's vocabulary that is trained on the data.

    ``sources`` are the data, if they are open.
    """
    if recipe.tokenizer or not models.is_config(recipe.model):
        folder = recipe.tokenizer or recipe.model
        return models.load_tokenizer(folder, recipe.chat_template, recipe.trust_remote_code)
    vocab_size = load_config(recipe.model, recipe.trust_remote_code).get_text_config().vocab_size
    return train_tokenizer_on(sources or recipe.data, vocab_size, recipe.skip_bad, recipe.chat_template)


def train(recipe, *, model=None, tokenizer=None):
    """Run ``recipe``; returns ``(model, tokenizer, log)``, the log being :class:`~.report.RunLog`.

    Everything that can be wrong with the data or the model is found before the first file is written, and so is all
    that would keep the model from being saved. A model and tokenizer that are handed in are used in place of the
    recipe's; the model is then tuned as it is.

    From the first step on SIGINT and SIGTERM finish the step, save the model and raise :class:`~.finish.Stopped`, a
    ``KeyboardInterrupt``. A model that cannot be saved in ``out`` is saved elsewhere, and :class:`~.saving.NotSaved`,
    an ``OSError``, says where. Both carry what would have been returned as ``result``.
    """
    check(recipe, model is not None)
    check_pipes([*recipe.data, *recipe.eval_data])
    check_folder(recipe.out)
    out = Path(recipe.out).absolute()  # also if the working directory changes
    torch.manual_seed(recipe.seed)
    if model is not None:
        models.check_given(model)
        device = model.device
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = check_recipe(recipe, model is not None, tokenizer is not None)
    sources = [Source(path) for path in recipe.data]
    tokenizer = tokenizer or prepare_tokenizer(recipe, sources)
    encoder = Encoder(tokenizer, recipe.mask, recipe.split_turns)
    load = partial(
        load_examples,
        encoder=encoder,
        row_tokens=recipe.row_tokens,
        skip_bad=recipe.skip_bad,
        cache_folder=recipe.cache,
    )
    examples, held_out, refusals = _data(recipe, sources, load)
    for note in encoder.notes:
        say(note)
    for error in islice(chain(*refusals), 20):
        say(f"skipped {error}")
    if bad := sum(map(len, refusals)):
        say(f"skipped {bad} lines, {len(examples) + len(held_out)} are left")

    if model is None:
        model = models.load_model(recipe.model, device, recipe.trust_remote_code)
    models.check_vocabulary(model, tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def batch(rows, weigh_examples=False):
        return collate(rows, recipe.row_tokens, pad_id or 0, weigh_examples)

    with models.boundaries_given(model):  # as in training, where a window that only a mask holds would be lost
        most = most_positions(model, packed_hidden_states)
        examples, held_out = (without_longer(some, most, recipe.skip_bad) for some in (examples, held_out))
        checked = batch_to_check(model, examples + held_out, recipe.row_tokens, pad_id or 0)
        check_against_stock(model, checked.to(device))
    steps = _Steps(examples, recipe)
    evaluation = PackedRows(held_out, recipe.row_tokens)

    optimizer = AdamW(
        decay_groups(model, recipe.weight_decay), lr=recipe.lr, max_grad_norm=recipe.max_grad_norm, skip_nonfinite=True
    )
    warmup = round(recipe.warmup * steps.total)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: cosine_factor(t, steps.total, warmup))
    rehearse(model, tokenizer, out, end_of_turn(examples) if recipe.mask == "completion+eot" else None)
    log = RunLog(out, steps.total, recipe.log_every)
    evaluate = partial(_evaluate, model, evaluation, batch, device, recipe, log)
    with saved_at_the_end(model, tokenizer, log, evaluate) as stop:
        model.train()
        with models.boundaries_given(model):
            evaluate(stop, 0)
            for step, micro_batches in stop.steps(enumerate(steps, start=1)):
                batches = [batch(rows, recipe.weigh == "examples") for rows in micro_batches]
                # One denominator for the whole step, or micro-batches with few kept tokens would weigh more.
                num_items = sum(b.kept.count if recipe.weigh == "tokens" else b.examples for b in batches)
                loss = torch.zeros((), device=device)
                for b in batches:
                    moved = b.to(device)
                    with _autocast(device, recipe.precision):
                        part = linear_cross_entropy(
                            models.hidden_states(model, moved),
                            **models.head(model),
                            shift=True,
                            kept=moved.kept,
                            token_weight=moved.token_weight,
                            num_items=num_items,
                        )
                    part.backward()
                    loss += part.detach()
                lr = schedule.get_last_lr()[0]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
                log.step(
                    step=step,
                    loss=loss,
                    lr=lr,
                    grad_norm=optimizer.last_grad_norm,
                    examples=sum(b.examples for b in batches),
                    rows=sum(b.rows for b in batches),
                    tokens=sum(b.tokens for b in batches),
                    kept=sum(b.kept.count for b in batches),
                    skipped_steps=optimizer.skipped_steps.clone(),
                )
                if recipe.eval_every and step % recipe.eval_every == 0 and step < steps.total:
                    evaluate(stop, step)
    return model, tokenizer, log


class _Steps:
    """The optimiser steps of a run: each a list of micro-batches, each a list of rows, each a list of examples.

    Every epoch packs the examples anew from another order; how many rows that makes depends on the lengths alone.
    """

    def __init__(self, examples, recipe):
        self.examples, self.recipe = examples, recipe
        rows = len(pack(lengths_of(examples), recipe.row_tokens))
        per_epoch = -(-rows // (recipe.rows * recipe.accumulate))
        self.total = recipe.steps if recipe.steps is not None else max(1, round(recipe.epochs * per_epoch))

    def __iter__(self):
        done = epoch = 0
        while done < self.total:
            shuffle = random.Random(f"{self.recipe.seed}/{epoch}").shuffle
            order = np.arange(len(self.examples))
            shuffle(order)
            rows = PackedRows(self.examples, self.recipe.row_tokens, order)
            shuffle(rows.rows)
            for first in range(0, len(rows), self.recipe.rows * self.recipe.accumulate):
                if done == self.total:
                    return
                step = rows[first : first + self.recipe.rows * self.recipe.accumulate]
                yield [*groups_of(self.recipe.rows, step)]
                done += 1
            epoch += 1


def _data(recipe, sources, load):
    """``(examples, held_out, refusals)``; held out are files of their own, and a share of the conversations."""
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
    return examples, held_out, refusals


def _evaluate(model, rows, batch, device, recipe, log, stop, step):
    if rows:
        with _autocast(device, recipe.precision), models.boundaries_given(model):
            batches = map(batch, groups_of(recipe.rows, rows))
            log.evaluation(step, masked_loss(model, stop.batches(batches), device))


def _autocast(device, precision):
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        precision = "bf16" if native else "fp32"
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
