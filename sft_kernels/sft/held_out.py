"""Measures a run on held-out data, and keeps the best model by it."""

import math
from contextlib import suppress

from .._terminal import reason_of
from . import model as models
from . import whole
from .answers import answer, prompts_of
from .evaluate import masked_loss
from .metrics import EXACT_MATCH, score
from .out import BEST
from .packing import PackedRows, collate, groups_of
from .precision import autocast
from .progress import say, warn


class HeldOut:
    """The masked loss on held-out examples, and a metric of greedy answers to their prompts.

    Of the models that are measured between the first step and the last, the best one is kept in
    ``best`` in the run's folder: by the metric, of equal ones by the masked loss. Without a prompt,
    or with a metric that fails later on, the masked loss alone is measured.
    """

    def __init__(self, ready):
        self.ready, self.recipe, self.metric = ready, ready.recipe, ready.metric
        self.rows = PackedRows(ready.unseen, self.recipe.row_tokens)
        self.prompts = prompts_of(ready.unseen, self.recipe.metric_prompts, self.recipe.seed)
        if self.rows and self.recipe.metric_prompts and not self.prompts:
            say("metric: no held-out example has a prompt, so only the masked loss is measured")

    def measure(self, stop, step, log):
        """Measure the model after ``step``, and write what is found to ``log``."""
        if not self.rows:
            return
        with log.aside():
            with autocast(self.ready.model.device, self.recipe):
                measured = self.masked_loss(stop.batches)._asdict()
                if self.prompts:
                    measured |= self._answered(stop, step)
            log.evaluation(step, measured)
            if self.recipe.eval_every and step:
                self._keep_best(step, measured, log)

    def masked_loss(self, each=iter):
        """The :class:`~.evaluate.Loss` on all that is held out; ``each`` is asked for every batch."""
        model, recipe = self.ready.model, self.recipe
        packed = (collate(rows, recipe.row_tokens, self.ready.pad_id) for rows in groups_of(recipe.rows, self.rows))
        with models.boundaries_given(model):
            return masked_loss(model, each(packed), model.device)

    def _answered(self, stop, step):
        model, tokenizer, most = self.ready.model, self.ready.tokenizer, self.recipe.max_new_tokens
        answers = answer(model, tokenizer, self.prompts, self.ready.end, most, each=stop.batches)
        try:
            value = score(self.metric, answers)
        except ValueError as error:
            if not step:  # nothing is lost yet
                raise
            warn(str(error))
            value = None
        stopped = sum(answers.stopped) / len(answers.stopped)
        return {"metric": self.metric.name, "score": value, "stopped": stopped, "prompts": len(self.prompts)}

    def _keep_best(self, step, measured, log):
        by, value = ("masked loss", measured["loss"]) if not self.prompts else (self.metric.name, measured["score"])
        found = {"step": step, "by": by, "value": value, "loss": measured["loss"]}
        if value is None or not math.isfinite(measured["loss"]):  # NaN is neither better nor worse
            return
        if log.best is not None and _rank(found) <= _rank(log.best):
            return
        best = log.out / BEST
        try:
            models.save(self.ready.model, self.ready.tokenizer, best, replace=True)
        except Exception as error:  # safetensors and tokenizers have exceptions of their own
            with suppress(OSError):
                whole.clear_up(best)  # a full disk needs the room
            warn(f"the best model so far could not be saved in {best} ({reason_of(error)})")
        else:
            log.best = found


def _rank(found):
    """Larger is better."""
    return (-found["loss"],) if found["by"] == "masked loss" else (found["value"], -found["loss"])


def check(recipe, metric):
    """Raise ``ValueError`` for options that nothing is held out for, and a metric without answers."""
    if recipe.eval_data or recipe.holdout:
        if metric is not EXACT_MATCH and not recipe.metric_prompts:
            raise ValueError("metric: metric_prompts is 0, so there are no answers to score")
        return
    for name, unasked in (("eval_every", not recipe.eval_every), ("metric", metric is EXACT_MATCH)):
        if not unasked:
            raise ValueError(f"{name}: nothing is held out to measure on; give eval_data or holdout")
