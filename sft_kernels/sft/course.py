"""The course of a run: what was measured in it, from the first step on."""

import math
from pathlib import Path
from typing import NamedTuple


class Course(NamedTuple):
    """A run's measurements in the order of its steps."""

    steps: list[dict]  # rows of train.jsonl with a loss
    evaluations: list[dict]  # rows of train.jsonl with numbers of held-out data
    speed: list[dict]  # rows of speed.jsonl
    out: Path
    total: int  # steps that were planned
    clip: float | None  # the gradient norm that is clipped to
    best: dict | None  # step, by and value of the best model

    @property
    def done(self):
        return self.steps[-1]["step"]

    @property
    def skipped(self):
        return self.steps[-1].get("skipped_steps", 0)

    @property
    def seconds(self):
        """``(seconds, steps)``: the training time of so many of the steps. Of others none is known."""
        return sum(row["seconds"] for row in self.speed), sum(row["steps"] for row in self.speed)

    def sum(self, name):
        """The sum of a count over all steps; 0 if a step's line lacks it."""
        return sum(row.get(name, 0) for row in self.steps)

    def scores(self):
        """``(step, score)`` of each measurement of the metric."""
        return [(row["step"], row["eval"]["score"]) for row in self.evaluations if _measured(row)]

    @property
    def metric(self):
        """The metric's name, None if it was not measured."""
        return next((row["eval"]["metric"] for row in self.evaluations if _measured(row)), None)


def of(history, **more):
    """The :class:`Course` of ``history``, the rows of ``train.jsonl``."""
    steps = [row for row in history if "loss" in row]
    return Course(steps, [row for row in history if "eval" in row], **more)


def mean(rows, name):
    """The mean of the finite numbers ``name`` in ``rows``; NaN if there is none."""
    numbers = [row[name] for row in rows if row[name] is not None and math.isfinite(row[name])]
    return sum(numbers) / len(numbers) if numbers else math.nan


def _measured(row):
    return row["eval"].get("score") is not None


EXAMPLE = Course(
    steps=[{"step": 1, "loss": 2.0, "tokens": 4, "kept": 2}],
    evaluations=[{"step": 1, "eval": {"loss": 2.0}}],
    speed=[],
    out=Path(),
    total=1,
    clip=None,
    best=None,
)
"""Numbers to try whether curves can be drawn."""
