"""The same recipe twice, ours and the plain PyTorch way: the same weights, the same data in the same order."""

import math
import time
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

import torch

from .._terminal import reason_of
from . import memory
from . import model as models
from .checkpoints import only_run
from .compare_report import report
from .held_out import HeldOut
from .out import COMPARISON
from .plain import Padded, Plain
from .precision import autocast, precision_on
from .prepare import prepare
from .progress import say, warn
from .recipe import Recipe
from .report import RunLog
from .run import Run

OURS, PADDED, PLAIN = "ours", "ours, padded", "plain PyTorch"
_SHORT = 20  # steps of ours over padded batches, which is there for its speed
_WARM_UP = 3  # steps that no time is taken of, in runs that are long enough
_APART = {"fp32": 1e-3, "bf16": 0.1}  # relative; rounding stays below for some hundred steps

# Options that one of the two runs has not, and why.
_ALONE = {
    "resume": "a comparison starts anew",
    "save_every": "a comparison keeps no checkpoints",
    "eval_every": "a comparison measures held-out data at the end alone",
    "metric": "a comparison measures the masked loss alone",
    "tensorboard": "a comparison has a page of its own",
    "dropout": "the two runs would draw different numbers",
    "neftune_alpha": "the two runs would draw different numbers",
    "spike": "plain PyTorch does not skip steps",
    "parameters": "torch's AdamW keeps no masters and does not round at random",
}


class Way(NamedTuple):
    """One way to run the recipe, as it was measured."""

    name: str
    seconds: list[float]  # of each step
    inside: list[float]  # of each step: forward, backward and update alone
    kept: list[int]
    tokens: list[int]  # positions, padding among them
    padding: list[int]
    losses: list[float]
    norms: list[float]  # of the gradients
    peak_bytes: int | None
    held_out: float | None  # masked loss after the last step
    failed: str | None = None  # the error that ended it

    def rate(self, steps=None):
        """Kept tokens a second, the median over the first ``steps``, or all, without the very first ones."""
        part = slice(self._warm_up, steps)
        return _median(k / s for k, s in zip(self.kept[part], self.seconds[part], strict=True))

    @property
    def step_seconds(self):
        return _median(self.seconds[self._warm_up :])

    @property
    def overhead(self):
        """The share of a step that is not forward, backward or update."""
        both = zip(self.inside[self._warm_up :], self.seconds[self._warm_up :], strict=True)
        return _median(1 - inside / seconds for inside, seconds in both)

    @property
    def padding_share(self):
        return sum(self.padding) / sum(self.tokens) if self.tokens else None

    @property
    def _warm_up(self):
        return max(0, min(_WARM_UP, len(self.seconds) - 1))


def _median(numbers):
    numbers = list(numbers)
    return median(numbers) if numbers else None


class Comparison(NamedTuple):
    """Holds both ways, and how far apart they are."""

    ways: dict[str, Way]
    losses_apart: list[float]  # of each step, relative to plain PyTorch's
    norms_apart: list[float]  # of the gradients; they show what losses of a fresh model hide
    most_apart: float  # up to which they do not part
    parameters_apart: float | None  # the distance of the last weights, relative to the way that plain PyTorch's went

    @property
    def packing(self):
        """Kept tokens a second of packed rows against those of padded batches, both with our kernels."""
        return self._faster(PADDED)

    @property
    def fused(self):
        """Kept tokens a second of ours against those of plain PyTorch."""
        return self._faster(PLAIN)

    @property
    def parts_at(self):
        """The first step whose losses or gradient norms are too far apart, or None."""
        both = zip(self.losses_apart, self.norms_apart, strict=True)
        return next((i for i, apart in enumerate(both, 1) if not all(d <= self.most_apart for d in apart)), None)

    def _faster(self, name):
        if self.ways[OURS].failed or self.ways[name].failed:
            return None
        steps = len(self.ways[name].seconds)
        return self.ways[OURS].rate(steps) / self.ways[name].rate(steps)


def check_comparable(recipe):
    """Raise ``ValueError`` for an option that one of the two runs has not."""
    defaults = Recipe()
    for name, why in _ALONE.items():
        if getattr(recipe, name) != getattr(defaults, name):
            raise ValueError(f"{name}: {why}; leave it out to compare")


def compare(recipe):
    """Run ``recipe`` both ways; returns the :class:`Comparison`.

    Plain PyTorch gets the examples of each of our micro-batches as one padded batch, transformers' own attention, the
    logits of every position, ``cross_entropy``, ``clip_grad_norm_`` and ``torch.optim.AdamW``. Labels, schedule and the
    one denominator of a step are the same. A third, short run has padded batches and our kernels.

    The folder ``compare`` in ``recipe.out`` gets the logs, ``compare.json`` and ``compare.png``. No model is kept.
    Held-out data are measured at the end, the masked loss alone. On a GPU the host waits after each part of a step.

    Raises:
        ValueError: as :func:`~.train.train`; also for options that only one of the two ways has.
        OSError: as :func:`~.train.train`.
    """
    check_comparable(recipe)
    ready = prepare(recipe)
    model = ready.model
    start = _weights(model)
    ways, ends = {}, {}
    folder = ready.out / COMPARISON
    ready.out.mkdir(parents=True, exist_ok=True)
    with only_run(ready.out):
        for name, log_in, kind, most in (
            (OURS, "ours", Run, None),
            (PADDED, "padded", Padded, _SHORT),
            (PLAIN, "plain", Plain, None),
        ):
            model.load_state_dict(start)
            say(f"\n{name}")
            copies = 0 if model.device.type == "cuda" else sum(map(_bytes, (start, *ends.values())))
            ways[name] = _measured(name, folder / log_in, kind, ready, most, copies)
            if most is None and not ways[name].failed:
                ends[name] = _weights(model)
    losses, norms, distance = [], [], None
    if len(ends) == 2:
        losses, norms = (_apart(getattr(ways[OURS], what), getattr(ways[PLAIN], what)) for what in ("losses", "norms"))
        went = _distance(start, ends[PLAIN])
        distance = _distance(ends[OURS], ends[PLAIN]) / went if went else None  # a learning rate of 0
    found = Comparison(ways, losses, norms, _APART[precision_on(model.device, ready.recipe)], distance)
    report(found, folder)
    return found


def _apart(ours, plain):
    return [0.0 if a == b else abs(a - b) / abs(b) if b else math.inf for a, b in zip(ours, plain, strict=True)]


def _weights(model):
    return {name: tensor.detach().clone().cpu() for name, tensor in model.state_dict().items()}


def _bytes(weights):
    return sum(tensor.nbytes for tensor in weights.values())


def _distance(a, b):
    return math.sqrt(sum(float((a[name].double() - b[name].double()).square().sum()) for name in a))


def _measured(name, folder, kind, ready, most, copies):
    """Run one :class:`Way`. ``copies``: bytes of weights kept to compare, in the memory that is measured."""
    device, clock = ready.model.device, Clock(ready.model.device)
    measurable = memory.forget_peak(device)
    run = kind(ready, phase=clock)
    total = min(run.steps.total, most or run.steps.total)
    run.log = log = RunLog(folder, total, ready.recipe.log_every, curves=False)
    attention = models.boundaries_given if kind is Run else models.stock_attention
    failed = None
    try:
        with attention(ready.model):
            ready.model.train()
            clock.start()
            for step, micro_batches in run.steps.after(0):
                run.step(step, micro_batches)
                clock.lap()
                if step == total:
                    break
    except torch.OutOfMemoryError as error:
        failed = reason_of(error)
        run.parts.optimizer.zero_grad(set_to_none=True)
        warn(f"{name}: {failed}")
    finally:
        log.close()
    peak = memory.peak(device) if measurable else None
    if peak is not None:
        peak -= copies
    rows = log.history[: len(clock.seconds)]
    held_out = None
    if most is None and not failed and ready.unseen:
        with autocast(device, ready.recipe):
            held_out = HeldOut(ready).masked_loss().loss
    columns = {key: [row[key] for row in rows] for key in ("kept", "tokens", "padding")}
    losses = [row["loss"] for row in rows]
    return Way(
        name,
        clock.seconds,
        clock.inside,
        **columns,
        losses=losses,
        norms=[row["grad_norm"] for row in rows],
        peak_bytes=peak,
        held_out=held_out,
        failed=failed,
    )


class Clock:
    """Measures each step, and the share of it that is inside of the parts that it is called for."""

    def __init__(self, device):
        self.device, self.seconds, self.inside = device, [], []

    def start(self):
        self._began, self._within = self._now(), 0.0

    def lap(self):
        now = self._now()
        self.seconds.append(now - self._began)
        self.inside.append(self._within)
        self._began, self._within = now, 0.0

    @contextmanager
    def __call__(self, name):
        began = self._now()
        yield
        self._within += self._now() - began

    def _now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
