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
from .packing import PackedRows, groups_of
from .precision import autocast
from .progress import say, warn


class HeldOut:
    """The masked loss on held-out examples, and a metric of greedy answers to their prompts.

    Of the models that are measured between the first step and the last, the best one is kept in
    ``best`` in the run's folder: by the metric, of equal ones by the masked loss. Without a prompt,
    or with a metric that fails later on, the masked loss alone is measured.
    """

    def __init__(self, examples, recipe, metric, end_of_turn):
        self.recipe, self.metric, self.end_of_turn = recipe, metric, end_of_turn
        self.rows = PackedRows(examples, recipe.row_tokens)
        self.prompts = prompts_of(examples, recipe.metric_prompts, recipe.seed)
        if self.rows and recipe.metric_prompts and not self.prompts:
            say("metric: no held-out example has a prompt, so only the masked loss is measured")

    def measure(self, stop, step, model, tokenizer, log, batch):
        """Measure ``model`` after ``step``, and write what is found to ``log``."""
        if not self.rows:
            return
        with log.aside():
            measured = self._measured(stop, step, model, tokenizer, batch)
            log.evaluation(step, measured)
            if self.recipe.eval_every and step:
                self._keep_best(step, measured, model, tokenizer, log)

    def _measured(self, stop, step, model, tokenizer, batch):
        with autocast(model.device, self.recipe):
            with models.boundaries_given(model):
                batches = stop.batches(map(batch, groups_of(self.recipe.rows, self.rows)))
                measured = masked_loss(model, batches, model.device)._asdict()
            if self.prompts:
                measured |= self._answered(stop, step, model, tokenizer)
        return measured

    def _answered(self, stop, step, model, tokenizer):
        answers = answer(
            model, tokenizer, self.prompts, self.end_of_turn, self.recipe.max_new_tokens, each=stop.batches
        )
        try:
            value = score(self.metric, answers)
        except ValueError as error:
            if not step:  # nothing is lost yet
                raise
            warn(str(error))
            value = None
        stopped = sum(answers.stopped) / len(answers.stopped)
        return {"metric": self.metric.name, "score": value, "stopped": stopped, "prompts": len(self.prompts)}

    def _keep_best(self, step, measured, model, tokenizer, log):
        by, value = ("masked loss", measured["loss"]) if not self.prompts else (self.metric.name, measured["score"])
        found = {"step": step, "by": by, "value": value, "loss": measured["loss"]}
        if value is None or not math.isfinite(measured["loss"]):  # NaN is neither better nor worse
            return
        if log.best is not None and _rank(found) <= _rank(log.best):
            return
        best = log.out / BEST
        try:
            models.save(model, tokenizer, best, replace=True)
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
