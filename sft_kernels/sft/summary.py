"""The table that a run ends with on the screen."""

import math
from pathlib import Path

from . import out
from .course import mean
from .progress import duration

_TENTHS = 10  # the first and the last loss are means over such a share of the steps


def table(course):
    """The lines of the table of ``course``, a :class:`~.course.Course` of one step at least."""
    rows = [
        ("steps", _steps(course)),
        ("examples", f"{course.sum('examples'):,}"),
        ("tokens", _tokens(course)),
        ("kept", _kept(course)),
        ("training time", _time(course)),
        ("loss", _loss(course)),
        *_held_out(course),
        *_rounded_away(course),
        *_best(course),
        ("files", f"{', '.join(_there(course.out))} in {course.out}"),
    ]
    width = 2 + max(len(name) for name, _ in rows)
    return [f"{name:<{width}}{text}" for name, text in rows]


def _steps(course):
    planned = "" if course.done == course.total else f" of {course.total:,}"
    skipped = f", of them {course.skipped:,} skipped because of the gradient's norm" if course.skipped else ""
    return f"{course.done:,}{planned}{skipped}"


def _tokens(course):
    tokens = course.sum("tokens")
    return f"{tokens:,}, padding {course.sum('padding') / tokens:.1%}" if tokens else "0"


def _kept(course):
    tokens, kept = course.sum("tokens"), course.sum("kept")
    return f"{kept:,}, {kept / tokens:.1%} of the tokens" if tokens else f"{kept:,}"


def _time(course):
    seconds, steps = course.seconds
    if not seconds:
        return "not known"
    kept = sum(row["kept"] for row in course.speed) / seconds
    known = "" if steps == course.done else f" for the {steps:,} steps whose time is known"
    return f"{duration(seconds)}{known}, {kept:,.0f} kept tokens/s"


def _loss(course):
    steps = course.steps
    size = max(1, len(steps) // _TENTHS)
    first, last = steps[:size], steps[-size:]
    of = f"of step {first[0]['step']:,} → {last[0]['step']:,}"
    if size > 1:
        of = f"means of steps {_span(first)} → {_span(last)}"
    return f"{mean(first, 'loss'):.4f} → {mean(last, 'loss'):.4f}, {of}"


def _span(rows):
    return f"{rows[0]['step']:,}–{rows[-1]['step']:,}"


def _held_out(course):
    """The loss and the metric on held-out data."""
    found = [("loss", [(row["step"], row["eval"]["loss"]) for row in course.evaluations], ".4f")]
    found.append((course.metric, course.scores(), ".4g"))
    for name, points, form in found:
        if points:
            numbers = [math.nan if value is None else value for _, value in points]
            ends = [0] if len(points) == 1 else [0, -1]
            change = " → ".join(f"{numbers[i]:{form}}" for i in ends)
            yield f"{name}, held out", f"{change}, after step {' → '.join(f'{points[i][0]:,}' for i in ends)}"


def _rounded_away(course):
    shares = [row["rounded_away"] for row in course.steps if row.get("rounded_away") is not None]
    if shares:
        yield "rounded away", f"{sum(shares) / len(shares):.2%} of the updates, mean over the steps"


def _best(course):
    if course.best is not None:
        name, value, step = (course.best[key] for key in ("by", "value", "step"))
        yield "best model", f"of step {step:,}, {name} {value:.4g}, in {course.out / out.BEST}"


def _there(folder):
    """The names of what a run wrote in ``folder``."""
    paths = [Path(folder, name) for name in out.WRITTEN]
    return [f"{path.name}/" if path.is_dir() else path.name for path in paths if path.exists()]
