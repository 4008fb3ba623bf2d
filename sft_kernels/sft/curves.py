"""``curves.png``: a run on one page, in small panels over its steps."""

import math

import numpy as np

from .progress import duration
from .speed import per_second

_POINTS = 100  # of a line; more are drawn as their means over equal stretches
_FEW = 20  # points that are marked on a line
_BLUE, _ORANGE, _GREEN, _RED, _GRAY = "#3568b8", "#e07b26", "#3a8f5c", "#c23b3b", "#6b7280"
_INK, _FAINT = "#1f2937", "#d9dde3"
_STYLE = {
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GRAY,
    "axes.labelcolor": _GRAY,
    "axes.titlecolor": _INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": _GRAY,
    "ytick.color": _GRAY,
    "text.color": _INK,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
}


def draw(course, file, dpi, trial=False):
    """Write a PNG of ``course``, a :class:`~.course.Course` of one step at least, to ``file``.

    A ``trial`` is the panel of the loss alone, which shows whether anything can be drawn.

    Lines of more than 100 points are thinned out: they join the means of equal stretches, and a
    shade goes from the lowest to the highest number of each. A number that is not finite is a gap.
    """
    # Not pyplot, which would choose a back end for the whole process.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11.5, 6.4))
        FigureCanvasAgg(figure)
        second = "metric" if course.metric else "loss"
        layout = [["loss"]] if trial else [["loss", second, "lr"], ["norm", "kept", "speed"]]
        panels = figure.subplot_mosaic(layout)
        figure.subplots_adjust(left=0.05, right=0.985, bottom=0.075, top=0.85, wspace=0.19, hspace=0.36)
        figure.text(0.05, 0.955, _headline(course), fontsize=13, fontweight="bold", va="center")
        if len(course.steps) > _POINTS:
            note = "lines join the means of so many steps, shaded from the lowest to the highest of them"
            figure.text(0.05, 0.915, note, color=_GRAY, va="center")
        for name, axis in panels.items():
            _PANELS[name](axis, course)
            axis.set_xlim(-0.02 * course.done, max(2, 1.02 * course.done))
            axis.locator_params(axis="x", integer=True, nbins=6)
            axis.xaxis.set_major_formatter(lambda step, _: short(step))
            if name in ("norm", "kept", "speed"):
                axis.set_xlabel("optimiser step")
            if axis.get_legend_handles_labels()[0]:
                axis.legend()
        figure.savefig(file, format="png", dpi=dpi)


def _headline(course):
    of = "" if course.done == course.total else f" of {course.total:,}"
    seconds, _ = course.seconds
    time = f"   ·   {duration(seconds)} of training" if seconds else ""
    tokens, kept = short(course.sum("tokens")), short(course.sum("kept"))
    steps = "step" if course.total == 1 else "steps"
    return f"{course.done:,}{of} {steps}   ·   {tokens} tokens, {kept} kept{time}"


def _loss(axis, course):
    axis.set_title("masked loss, nats a token")
    _line(axis, course.steps, "loss", _BLUE, "train")
    if course.evaluations:
        losses = [row["eval"]["loss"] for row in course.evaluations]
        held_out = [row["step"] for row in course.evaluations], _numbers(losses)
        axis.plot(*held_out, "o-", color=_ORANGE, markersize=4, label="held out")
    if course.best and course.best["by"] == "masked loss":
        _star(axis, course.best)


def _metric(axis, course):
    axis.set_title(f"{course.metric[-40:]}, held out")
    steps, scores = zip(*course.scores(), strict=True)
    axis.plot(steps, scores, "o-", color=_GREEN, markersize=4)
    if min(scores) == max(scores) and 0 <= scores[0] <= 1:  # a share that stays has no range of its own
        axis.set_ylim(-0.02, 1.02)
    if course.best and course.best["by"] == course.metric:
        _star(axis, course.best)


def _star(axis, best):
    label = f"best: {best['value']:.4g} at step {best['step']:,}"
    axis.plot([best["step"]], [best["value"]], "*", color=_RED, markersize=12, label=label, zorder=5)


def _lr(axis, course):
    axis.set_title("learning rate")
    every = -(-len(course.steps) // _POINTS)
    rows = [*course.steps[:-1:every], course.steps[-1]]
    marker = "o" if len(rows) <= _FEW else None
    label = f"one step of {every}" if every > 1 else None
    axis.plot([r["step"] for r in rows], [r["lr"] for r in rows], color=_GRAY, marker=marker, markersize=3, label=label)
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(lambda lr, _: f"{lr:.3g}")


def _norm(axis, course):
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_title("gradient norm")
    _line(axis, course.steps, "grad_norm", _BLUE, None)
    norms = _numbers([row["grad_norm"] for row in course.steps])
    norms = norms[norms > 0]
    if len(norms) and norms.max() > 10 * norms.min():
        axis.set_yscale("log")
        subs = (1, 2, 5) if norms.max() < 100 * norms.min() else (1,)
        axis.yaxis.set_major_locator(LogLocator(subs=subs))
        axis.yaxis.set_major_formatter(lambda norm, _: f"{norm:g}")
        axis.yaxis.set_minor_locator(NullLocator())
    if course.clip and len(norms):
        if norms.min() / 10 < course.clip < norms.max() * 10:
            axis.axhline(course.clip, color=_RED, linestyle="--", linewidth=1, label=f"clipped to {course.clip:g}")
        else:
            axis.plot([], [], color=_RED, linestyle="--", label=f"clipped to {course.clip:g}, off this scale")
    skipped = [row["step"] for row in course.steps if "skipped" in row]
    if skipped:
        place = axis.get_xaxis_transform()
        label = f"{len(skipped):,} skipped"
        axis.plot(skipped, [0.02] * len(skipped), "x", color=_RED, markersize=5, transform=place, label=label)


def _kept(axis, course):
    axis.set_title("share of the tokens")
    rows = [row for row in course.steps if row["tokens"]]
    for name, color, label in (("kept", _GREEN, "carry loss"), ("padding", _GRAY, "padding")):
        shares = [{"step": row["step"], "share": row.get(name, math.nan) / row["tokens"]} for row in rows]
        _line(axis, shares, "share", color, label)
    axis.set_ylim(0, min(1, 1.15 * axis.get_ylim()[1]))
    axis.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")


def _speed(axis, course):
    axis.set_title("tokens per second")
    if not course.speed:
        axis.text(0.5, 0.5, "no times are known", ha="center", va="center", color=_GRAY, transform=axis.transAxes)
        return
    for name, color, label in (("tokens", _GRAY, "all"), ("kept", _GREEN, "kept")):
        rates = [{"step": row["step"], "rate": per_second(row, name)} for row in course.speed]
        _line(axis, rates, "rate", color, label)
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(lambda rate, _: short(rate))


_PANELS = {"loss": _loss, "metric": _metric, "lr": _lr, "norm": _norm, "kept": _kept, "speed": _speed}


def _line(axis, rows, name, color, label):
    """A line of the numbers ``name`` over the steps of ``rows``, thinned out if they are many."""
    steps = np.array([row["step"] for row in rows])
    numbers = _numbers([row[name] for row in rows])
    size = -(-len(rows) // _POINTS)
    if size <= 1:
        marker = "o" if len(rows) <= _FEW else None  # a line through one point is nothing to be seen
        axis.plot(steps, numbers, color=color, label=label, marker=marker, markersize=3)
        return
    starts = np.arange(0, len(rows), size)
    finite = np.isfinite(numbers)
    count = np.add.reduceat(finite, starts, dtype=np.int64)
    means = np.add.reduceat(np.where(finite, numbers, 0.0), starts) / np.where(count, count, math.nan)
    middles = np.add.reduceat(steps, starts) / np.add.reduceat(np.ones(len(rows)), starts)
    low, high = (reduce.reduceat(numbers, starts) for reduce in (np.fmin, np.fmax))
    axis.fill_between(middles, low, high, color=color, alpha=0.18, linewidth=0)
    words = f"means of {size}"
    axis.plot(middles, means, color=color, label=f"{label}, {words}" if label else words)


def _numbers(values):
    """An fp64 array of ``values``, NaN in the place of None and infinities."""
    numbers = np.array([math.nan if value is None else value for value in values], float)
    return np.where(np.isfinite(numbers), numbers, math.nan)


def short(number):
    """A count with three digits at most and a unit: 1.23 M."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
