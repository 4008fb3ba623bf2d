"""The thin reference trainer: masked, packed, one denominator a step."""

import random
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from .. import AdamW, decay_groups, linear_cross_entropy
from . import model as models
from .data import DataError, check_pipes, first_of, read_all
from .evaluate import masked_loss
from .files import template
from .finish import saved_at_the_end
from .loading import check_recipe, load_config
from .lr import cosine_factor
from .masking import Encoder
from .packing import collate, groups_of, pack_rows
from .positions import most_positions, without_longer
from .recipe import Recipe as Recipe
from .recipe import check
from .report import RunLog
from .saving import check_folder, rehearse
from .stock import batch_to_check, check_against_stock, packed_hidden_states


def load_examples(paths, encoder, row_tokens, skip_bad=False, desc="reading", name="data"):
    """All examples of some JSONL files, and the :class:`~.data.DataError` of each line left out (``skip_bad``).

    Instead of paths, :class:`~.data.Lines` may be given, as :func:`~.data.read_all` returns them.
    """
    records, bad = read_all(paths, skip_bad)
    bad, examples = list(bad), []
    for record in tqdm(records, desc=desc, unit="line", leave=False, disable=len(records) < 1000):
        try:
            found = encoder.examples(record)
            longest = max(len(example.input_ids) for example in found)
            if longest > row_tokens:
                raise record.error(f"{longest} tokens, longer than the row of {row_tokens}")
            examples += found
        except DataError as error:
            if not skip_bad:
                raise
            bad.append(error)
    if not examples:
        files = ", ".join(dict.fromkeys(record.path for record in records))
        raise ValueError(f"{name}: no usable conversation in {files}; {first_of(bad)}")
    return examples, bad


def train_tokenizer_on(paths, vocab_size, skip_bad=False, chat_template=None):
    """A byte-level BPE of at most ``vocab_size`` tokens, trained on what the conversations in ``paths`` say.

    ``paths`` may be :class:`~.data.Lines`, as for :func:`load_examples`.
    """
    records = read_all(paths, skip_bad).records
    texts = (r.text or "\n".join(str(m.get("content") or m.get("tool_calls")) for m in r.messages) for r in records)
    tokenizer = models.train_tokenizer(texts, vocab_size)
    if chat_template:
        tokenizer.chat_template = template(chat_template)
    return tokenizer


def prepare_tokenizer(recipe, lines=None):
    """The recipe's tokenizer; for a bare config one of the config's vocabulary that is trained on the data.

    ``lines`` are the data, if they have been read.
    """
    if recipe.tokenizer or not models.is_config(recipe.model):
        folder = recipe.tokenizer or recipe.model
        return models.load_tokenizer(folder, recipe.chat_template, recipe.trust_remote_code)
    vocab_size = load_config(recipe.model, recipe.trust_remote_code).get_text_config().vocab_size
    return train_tokenizer_on(lines or recipe.data, vocab_size, recipe.skip_bad, recipe.chat_template)


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
    recipe = check_recipe(recipe, model is not None, tokenizer is not None)
    out = Path(recipe.out).absolute()  # also if the working directory changes
    torch.manual_seed(recipe.seed)
    if model is not None:
        models.check_given(model)
        device = model.device
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = read_all(recipe.data, recipe.skip_bad)
    tokenizer = tokenizer or prepare_tokenizer(recipe, lines)
    encoder = Encoder(tokenizer, recipe.mask, recipe.split_turns)
    examples, bad = load_examples(lines, encoder, recipe.row_tokens, recipe.skip_bad)
    del lines
    held_out, more_bad = _held_out(recipe, encoder, examples)
    for note in encoder.notes:
        print(note)
    for error in (bad := bad + more_bad)[:20]:
        print(f"skipped {error}")
    if bad:
        print(f"skipped {len(bad)} lines, {len(examples) + len(held_out)} are left")

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
    evaluation = [batch(rows) for rows in groups_of(recipe.rows, pack_rows(held_out, recipe.row_tokens))]

    optimizer = AdamW(
        decay_groups(model, recipe.weight_decay), lr=recipe.lr, max_grad_norm=recipe.max_grad_norm, skip_nonfinite=True
    )
    warmup = round(recipe.warmup * steps.total)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: cosine_factor(t, steps.total, warmup))
    rehearse(model, tokenizer, out, encoder.end_of_turn if recipe.mask == "completion+eot" else None)
    log = RunLog(out, steps.total, recipe.log_every)
    evaluate = partial(_evaluate, model, evaluation, device, recipe, log)
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
        rows = len(pack_rows(examples, recipe.row_tokens))
        per_epoch = -(-rows // (recipe.rows * recipe.accumulate))
        self.total = recipe.steps if recipe.steps is not None else max(1, round(recipe.epochs * per_epoch))

    def __iter__(self):
        done = epoch = 0
        while done < self.total:
            shuffle = random.Random(f"{self.recipe.seed}/{epoch}").shuffle
            examples = list(self.examples)
            shuffle(examples)
            rows = pack_rows(examples, self.recipe.row_tokens)
            shuffle(rows)
            for step in groups_of(self.recipe.accumulate, groups_of(self.recipe.rows, rows)):
                if done == self.total:
                    return
                yield step
                done += 1
            epoch += 1


def _held_out(recipe, encoder, examples):
    """Examples to measure on: files of their own, and a share that is taken out of ``examples``, in place."""
    held_out, bad = [], []
    if recipe.eval_data:
        desc, name = "reading held-out", "eval_data"
        held_out, bad = load_examples(recipe.eval_data, encoder, recipe.row_tokens, recipe.skip_bad, desc, name)
    if recipe.holdout:
        random.Random(f"{recipe.seed}/holdout").shuffle(examples)
        lines = list(dict.fromkeys(example.source for example in examples))  # a split conversation stays together
        count = max(1, round(recipe.holdout * len(lines)))
        if count >= len(lines):
            raise ValueError(f"holdout: {recipe.holdout} of {len(lines)} conversations leaves none to train on")
        chosen = set(lines[:count])
        held_out += [example for example in examples if example.source in chosen]
        examples[:] = [example for example in examples if example.source not in chosen]
    return held_out, bad


def _evaluate(model, batches, device, recipe, log, stop, step):
    if batches:
        with _autocast(device, recipe.precision), models.boundaries_given(model):
            log.evaluation(step, masked_loss(model, stop.batches(batches), device))


def _autocast(device, precision):
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        precision = "bf16" if native else "fp32"
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
