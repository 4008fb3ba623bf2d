"""One run: its optimiser steps, and the checkpoints between them."""

from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property

import torch

from .. import linear_cross_entropy
from .._terminal import reason_of
from . import model as models
from . import state
from .guards import Guard
from .out import BEST
from .packing import collate
from .precision import autocast, optimizer_of, rounded_away
from .progress import warn
from .steps import Steps


def _untimed(name):
    """The context of one part of a step, of which nobody measures the time."""
    return nullcontext()


class Run:
    """The parts of a run that its steps and its checkpoints share.

    Args:
        ready: the :class:`~.prepare.Prepared` that it starts from.
        phase: ``phase(name)`` is the context of each ``"forward"``, ``"backward"`` and ``"update"`` of a step.
    """

    def __init__(self, ready, phase=_untimed):
        self.ready, self.recipe, self.model, self.phase = ready, ready.recipe, ready.model, phase
        self.device = self.model.device
        self.steps = Steps(ready.examples, self.recipe)
        optimizer, names = optimizer_of(self.model, self.recipe)
        self.guard = Guard(optimizer, self.recipe.spike, self.recipe.max_skips)
        self.parts = state.Parts(optimizer, names, self.guard, self.device, ready.given)

    def batch(self, rows):
        """The rows as one packed :class:`~.packing.Batch`, on the host."""
        return collate(rows, self.recipe.row_tokens, self.ready.pad_id, self.recipe.weigh == "examples")

    def loss(self, batch, num_items):
        """The masked loss of a batch, a share of the step's."""
        return linear_cross_entropy(
            models.hidden_states(self.model, batch),
            **models.head(self.model),
            shift=True,
            kept=batch.kept,
            token_weight=batch.token_weight,
            num_items=num_items,
        )

    def update(self, step):
        """Clip the gradients, and update the weights by them; returns what the log says of that."""
        self.guard.step(step)
        optimizer = self.parts.optimizer
        lost = rounded_away(optimizer)
        return {
            "grad_norm": optimizer.last_grad_norm,
            "skipped_steps": optimizer.skipped_steps.clone(),
            **({} if lost is None else {"rounded_away": lost}),
        }

    def step(self, step, micro_batches):
        """One optimiser step, numbered from 1; writes it to the log."""
        recipe, optimizer = self.recipe, self.parts.optimizer
        batches = [self.batch(rows) for rows in micro_batches]
        # One denominator for the whole step, or micro-batches with few kept tokens would weigh more.
        num_items = sum(b.kept.count if recipe.weigh == "tokens" else b.examples for b in batches)
        loss = torch.zeros((), device=self.device)
        for batch in batches:
            moved = batch.to(self.device)
            with self.phase("forward"), autocast(self.device, recipe):
                part = self.loss(moved, num_items)
            with self.phase("backward"):
                part.backward()
            loss += part.detach()
        tokens = sum(b.tokens for b in batches)
        lr = self.steps.lr(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with self.phase("update"):
            updated = self.update(step)
            optimizer.zero_grad(set_to_none=True)
        self.log.step(
            step=step,
            loss=loss,
            lr=lr,
            examples=sum(b.examples for b in batches),
            rows=sum(b.rows for b in batches),
            tokens=tokens,
            padding=tokens - sum(len(e.input_ids) for rows in micro_batches for row in rows for e in row),
            kept=sum(b.kept.count for b in batches),
            **updated,
            sources=[example.source for rows in micro_batches for row in rows for example in row],
        )

    @cached_property
    def data(self):
        """Digests of the data, by which a run that goes on knows them."""
        return [self.ready.examples.digest(), self.ready.unseen.digest()]

    def checkpoint(self):
        """Write a checkpoint after the last step; returns its folder."""
        log = self.log
        progress = {
            "step": log.done,
            "recipe": asdict(self.ready.asked),
            "data": self.data,
            "log_bytes": log.position(),
            "best": log.best,
        }

        def fill(folder):
            state.write(folder, self.model, self.ready.tokenizer, self.parts, **progress)

        return self.checkpoints.write(log.done, fill)

    def save(self):
        """Write a checkpoint; one that cannot be written costs a warning, and the earlier ones stay."""
        try:
            with self.log.aside():
                self.checkpoint()
        except Exception as error:  # safetensors and tokenizers have exceptions of their own
            warn(f"no checkpoint could be saved after step {self.log.done} ({reason_of(error)})")

    def go_on(self):
        """Put back the state of the checkpoint that the run goes on from; returns its step."""
        earlier = self.ready.earlier
        if earlier.progress["data"] != self.data:
            raise ValueError(f"resume: {earlier.folder} is of other data; their tokens or labels have changed")
        state.restore(earlier.folder, self.parts, earlier.progress)
        self.guard.try_again()
        return earlier.step

    def room(self):
        """Counts the models and the bytes of other files that the run needs room for beside what is there."""
        recipe, out, best, new = self.recipe, self.ready.out, 0, 0
        if recipe.eval_every and len(self.ready.unseen):
            best = 2 - (out / BEST).exists()
        if recipe.save_every:
            at_once = min(recipe.keep + 1, (self.steps.total - 1) // recipe.save_every)
            new = max(1, at_once - len([*out.glob("checkpoints/step-*")]))
        return {"copies": 1 + best + new, "more": [state.bytes_of(self.parts)] * new}
