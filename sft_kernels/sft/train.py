"""The thin reference trainer: masked, packed, one denominator a step."""

import random
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch

from .. import linear_cross_entropy
from .._terminal import reason_of
from ..integrations.neftune import neftune
from . import held_out, resume, state
from . import model as models
from .checkpoints import Checkpoints, only_run
from .data import stream
from .dataset import end_of_turn, load_examples
from .endings import Refused
from .files import template
from .finish import saved_at_the_end
from .guards import Guard, Watch, check_learning_rate
from .held_out import HeldOut
from .loading import check_recipe, load_config
from .lr import cosine_factor
from .masking import Encoder
from .metrics import load_metric
from .out import BEST
from .packing import collate
from .positions import most_positions, without_longer
from .precision import autocast, dtype_of, optimizer_of, rounded_away
from .recipe import Recipe as Recipe
from .recipe import check
from .report import RunLog, say, warn
from .saving import check_folder, rehearse
from .sources import Source, check_pipes
from .steps import Steps
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


def train(recipe, *, model=None, tokenizer=None):
    """Run ``recipe``; returns ``(model, tokenizer, log)``, the log being :class:`~.report.RunLog`.

    Everything that can be wrong with the data or the model is found before the first file is written, and so is all
    that would keep the model from being saved. A model and tokenizer that are handed in are used in place of the
    recipe's; the model is then tuned as it is.

    From the first step on SIGINT and SIGTERM finish the step, save a checkpoint and raise :class:`~.finish.Stopped`, a
    ``KeyboardInterrupt``. A model that cannot be saved in ``out`` is saved elsewhere, and :class:`~.saving.NotSaved`,
    an ``OSError``, says where. Both carry what would have been returned as ``result``.

    With ``recipe.resume`` the run in ``out`` goes on, to the bit as if nothing had ended it.

    Raises:
        ValueError: a value of the recipe, or a model or data that cannot be trained on.
        OSError: a file that cannot be read, or a folder that cannot be written to or that another run is in.
        TooManySkips: ``recipe.max_skips`` steps in a row were skipped; a checkpoint is there.
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
        device = model.device
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if recipe.init_from is not None:
        recipe = replace(recipe, model=resume.earlier_model(recipe.init_from))
    recipe = check_recipe(recipe, given, tokenizer is not None, dtype_of(recipe.parameters))
    folder = earlier and earlier.model
    sources = [Source(path) for path in recipe.data]
    tokenizer = tokenizer or prepare_tokenizer(recipe, sources, folder)
    encoder = Encoder(tokenizer, recipe.mask, recipe.split_turns)
    load = partial(
        load_examples,
        encoder=encoder,
        row_tokens=recipe.row_tokens,
        skip_bad=recipe.skip_bad,
        cache_folder=recipe.cache,
    )
    examples, unseen, refusals = _data(recipe, sources, load)
    for note in encoder.notes:
        say(note)
    for error in islice(chain(*refusals), 20):
        say(f"skipped {error}")
    if bad := sum(map(len, refusals)):
        say(f"skipped {bad} lines, {len(examples) + len(unseen)} are left")

    if not given:
        model = models.load_model(
            folder or recipe.model,
            device,
            recipe.trust_remote_code,
            dropout=recipe.dropout,
            dtype=dtype_of(recipe.parameters),
        )
    models.check_vocabulary(model, tokenizer)
    if recipe.activation_checkpointing:
        models.checkpoint_activations(model)
    run = _Run(recipe, asked, model, tokenizer, given)
    with models.boundaries_given(model):  # as in training, where a window that only a mask holds would be lost
        most = most_positions(model, packed_hidden_states)
        examples, unseen = (without_longer(some, most, recipe.skip_bad) for some in (examples, unseen))
        checked = batch_to_check(model, examples + unseen, recipe.row_tokens, run.pad_id)
        check_against_stock(model, checked.to(device))
    run.begin(examples, unseen)
    judge = HeldOut(unseen, recipe, metric, _end_of_answers(examples + unseen, encoder))
    if not earlier:
        check_learning_rate(recipe.lr, model)

    end = end_of_turn(examples) if recipe.mask == "completion+eot" else None
    rehearse(model, tokenizer, out, end, **run.room(out, judge))
    with only_run(out):
        if earlier:
            resume.check_still(out, earlier)
        done = run.go_on(earlier) if folder else 0
        watch = Watch(recipe.max_skips)
        log = RunLog(
            out,
            run.steps.total,
            recipe.log_every,
            watch,
            earlier and earlier.log_bytes,
            done,
            clip=recipe.max_grad_norm,
            tensorboard=recipe.tensorboard,
        )
        run.log, run.checkpoints = log, Checkpoints(out, recipe.keep)
        run.checkpoints.rotate(done)  # a kill may have come before
        log.best = earlier.progress["best"] if folder else None
        watch.go_on(log.history)
        measure = partial(judge.measure, model=model, tokenizer=tokenizer, log=log, batch=run.batch)
        with saved_at_the_end(model, tokenizer, log, measure, run.checkpoint, replace=bool(earlier)) as stop:
            model.train()
            with (
                models.boundaries_given(model),
                neftune(model, recipe.neftune_alpha) if recipe.neftune_alpha else nullcontext(),
            ):
                measured = log.history[-1:] and "eval" in log.history[-1]
                if not done or (_due(recipe.eval_every, done) and not measured):
                    measure(stop, done)
                for step, micro_batches in stop.steps(run.steps.after(done)):
                    run.step(step, micro_batches)
                    watch.check()
                    if step < run.steps.total:
                        if _due(recipe.eval_every, step):
                            measure(stop, step)
                        if _due(recipe.save_every, step):
                            run.save()
                log.flush()
                watch.check()
    return model, tokenizer, log


class _Run:
    """The parts of a run that its steps and its checkpoints share."""

    def __init__(self, recipe, asked, model, tokenizer, given):
        self.recipe, self.asked, self.model, self.tokenizer, self.given = recipe, asked, model, tokenizer, given
        self.device = model.device
        pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
        self.pad_id = (pad if pad is not None else end) or 0

    def begin(self, examples, unseen):
        """Take up the data, and make the optimiser."""
        self.examples, self.unseen = examples, unseen
        self.steps = Steps(examples, self.recipe)
        self.warmup = round(self.recipe.warmup * self.steps.total)
        optimizer, names = optimizer_of(self.model, self.recipe)
        self.guard = Guard(optimizer, self.recipe.spike, self.recipe.max_skips)
        self.parts = state.Parts(optimizer, names, self.guard, self.device, self.given)

    def batch(self, rows, weigh_examples=False):
        return collate(rows, self.recipe.row_tokens, self.pad_id, weigh_examples)

    def step(self, step, micro_batches):
        """One optimiser step, numbered from 1."""
        recipe, optimizer = self.recipe, self.parts.optimizer
        batches = [self.batch(rows, recipe.weigh == "examples") for rows in micro_batches]
        # One denominator for the whole step, or micro-batches with few kept tokens would weigh more.
        num_items = sum(b.kept.count if recipe.weigh == "tokens" else b.examples for b in batches)
        loss = torch.zeros((), device=self.device)
        for b in batches:
            moved = b.to(self.device)
            with autocast(self.device, recipe):
                part = linear_cross_entropy(
                    models.hidden_states(self.model, moved),
                    **models.head(self.model),
                    shift=True,
                    kept=moved.kept,
                    token_weight=moved.token_weight,
                    num_items=num_items,
                )
            part.backward()
            loss += part.detach()
        lr = recipe.lr * cosine_factor(step - 1, self.steps.total, self.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        self.guard.step(step)
        optimizer.zero_grad(set_to_none=True)
        lost = rounded_away(optimizer)
        self.log.step(
            step=step,
            loss=loss,
            lr=lr,
            grad_norm=optimizer.last_grad_norm,
            examples=sum(b.examples for b in batches),
            rows=sum(b.rows for b in batches),
            tokens=(tokens := sum(b.tokens for b in batches)),
            padding=tokens - sum(len(e.input_ids) for rows in micro_batches for row in rows for e in row),
            kept=sum(b.kept.count for b in batches),
            skipped_steps=optimizer.skipped_steps.clone(),
            **({} if lost is None else {"rounded_away": lost}),
            sources=[example.source for rows in micro_batches for row in rows for example in row],
        )

    @cached_property
    def data(self):
        """Digests of the data, by which a run that goes on knows them."""
        return [self.examples.digest(), self.unseen.digest()]

    def checkpoint(self):
        """Write a checkpoint after the last step; returns its folder."""
        log = self.log
        progress = {
            "step": log.done,
            "recipe": asdict(self.asked),
            "data": self.data,
            "log_bytes": log.position(),
            "best": log.best,
        }

        def fill(folder):
            state.write(folder, self.model, self.tokenizer, self.parts, **progress)

        return self.checkpoints.write(log.done, fill)

    def save(self):
        """Write a checkpoint; one that cannot be written costs a warning, and the earlier ones stay."""
        try:
            with self.log.aside():
                self.checkpoint()
        except Exception as error:  # safetensors and tokenizers have exceptions of their own
            warn(f"no checkpoint could be saved after step {self.log.done} ({reason_of(error)})")

    def go_on(self, earlier):
        """Put back the state of a checkpoint; returns its step."""
        if earlier.progress["data"] != self.data:
            raise ValueError(f"resume: {earlier.folder} is of other data; their tokens or labels have changed")
        state.restore(earlier.folder, self.parts, earlier.progress)
        self.guard.try_again()
        return earlier.step

    def room(self, out, judge):
        """Counts the models and the bytes of other files that the run needs room for beside what is there."""
        recipe, best, new = self.recipe, 0, 0
        if recipe.eval_every and judge.rows:
            best = 2 - (out / BEST).exists()
        if recipe.save_every:
            at_once = min(recipe.keep + 1, (self.steps.total - 1) // recipe.save_every)
            new = max(1, at_once - len([*out.glob("checkpoints/step-*")]))
        return {"copies": 1 + best + new, "more": [state.bytes_of(self.parts)] * new}


def _due(every, step):
    return every and step % every == 0


def _end_of_answers(examples, encoder):
    """The token that ends an answer: the one that the data teach, or else the chat template's; None: the model's."""
    end = end_of_turn(examples)
    if end is None and encoder.tokenizer.chat_template is not None:
        with suppress(ValueError, Refused):  # tokens and texts do not need one that serves
            return encoder.end_of_turn
    return end


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
