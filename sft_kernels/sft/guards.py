"""Guard rails of a run: steps that are skipped, the learning rate, and a loss that is too good."""

import torch

from .._terminal import ForTheUser
from ..ops.adamw.sharding import Ranks
from ..ops.adamw.torch_impl import global_norm
from .progress import warn

_WINDOW = 64  # norms that the running median is of
_ENOUGH = 8  # norms before which nothing is a spike
_SHOWN = 5  # examples of a skipped step on the screen; train.jsonl has all
_FEW_STEPS, _LOW_LOSS = 20, 0.5

# Full fine-tuning: model parameters up to, then the usual learning rates from and to. After Llama 2 (arXiv:2307.09288),
# Tülu 2 (arXiv:2311.10702), Tülu 3 (arXiv:2411.15124), SmolLM2 (arXiv:2502.02737).
LEARNING_RATES = (
    (1e9, 1e-5, 1e-3),
    (4e9, 5e-6, 3e-4),
    (2e10, 2e-6, 3e-5),
    (float("inf"), 1e-6, 2e-5),
)
_SMALLEST = 1e8  # parameters of a model that the table speaks of
_ADAPTERS = 10  # their usual learning rates are so many times as large


class TooManySkips(ForTheUser, RuntimeError):
    """So many steps in a row were skipped that the run has stopped. The message is one line."""


class Guard:
    """Steps an optimiser, or skips the step, by what is known on the device alone.

    A step is skipped if its gradient norm is not finite; with ``spike``, if the norm is above
    ``spike`` times the median of the last 64 steps' norms above zero (a skipped step leaves an older
    norm in its place); and after ``most`` skips in a row, so that the weights stay as they are until the
    host has read of it.
    """

    def __init__(self, optimizer, spike, most):
        device = optimizer.skipped_steps.device
        self.optimizer, self.spike, self.most = optimizer, spike, most
        self.tensors = {
            "norms": torch.full((_WINDOW,), float("nan"), device=device),
            "in_a_row": torch.zeros((), dtype=torch.int64, device=device),
        }

    @torch.no_grad()
    def step(self, number):
        """The optimiser's step ``number``, or none. Nothing here waits for the device."""
        optimizer, (norms, in_a_row) = self.optimizer, self.tensors.values()
        skip, before = in_a_row >= self.most, optimizer.skipped_steps.clone()
        if self.spike:
            skip = skip | self._is_spike(norms)
        optimizer.found_inf = skip.float()
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf
        skipped = optimizer.skipped_steps != before
        in_a_row.copy_(torch.where(skipped, in_a_row + 1, 0))
        place = norms[number % _WINDOW]
        place.copy_(torch.where(skipped, place, optimizer.last_grad_norm))

    def try_again(self):
        """Let a run that stopped after too many skips go on."""
        in_a_row = self.tensors["in_a_row"]
        in_a_row.copy_(torch.where(in_a_row >= self.most, 0, in_a_row))

    def _is_spike(self, norms):
        grads = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = global_norm(grads, Ranks(grads)).to(norms.device)
        known = (norms > 0).sum() >= _ENOUGH  # above a median of 0 every norm would be a spike, for ever
        return known & (norm > self.spike * norms.where(norms > 0, float("nan")).nanmedian())


class Watch:
    """Reads each step's line before it is written, and says what is wrong with it."""

    def __init__(self, most):
        self.most, self.skipped, self.in_a_row, self.asked = most, 0, 0, False

    def go_on(self, rows):
        """Take up the lines of a run that is resumed."""
        for row in rows:
            if "skipped_steps" in row:
                self._count(row)
                self.asked = self.asked or _is_low(row)
        self.in_a_row = 0 if self.in_a_row >= self.most else self.in_a_row

    def __call__(self, row, sources):
        """``row`` gets the ``sources`` of its examples if its step was skipped, and has no updates."""
        if self._count(row):
            row["skipped"] = sources
            row.pop("rounded_away", None)  # the optimiser's is that of the step before
        if 0 < self.in_a_row <= self.most:  # later ones are skipped whatever their norm
            norm = row["grad_norm"]
            finite = norm is not None and abs(norm) < float("inf")
            why = f"norm {norm:.4g} is a spike" if finite else "norm is not finite"
            more = f" and {len(sources) - _SHOWN} more" if len(sources) > _SHOWN else ""
            warn(f"step {row['step']} is skipped: its gradient {why}; examples {', '.join(sources[:_SHOWN])}{more}")
        if not self.asked and _is_low(row):
            self.asked = True
            warn(
                f"the loss is {row['loss']:.3f} after {row['step']} steps, which is low so early: is the mask right? "
                "sft-kernels inspect shows which tokens carry loss; a model that knows the data already is fine"
            )

    def check(self):
        """Raise :class:`TooManySkips` once there were too many in a row."""
        if self.in_a_row >= self.most:
            raise TooManySkips(f"the last {self.in_a_row} steps were skipped, because of their gradients' norms")

    def _count(self, row):
        skipped = row["skipped_steps"] > self.skipped
        self.skipped = row["skipped_steps"]
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        return skipped


def _is_low(row):
    loss = row["loss"]
    return loss is not None and loss < _LOW_LOSS and 1 < row["step"] <= _FEW_STEPS


def check_learning_rate(lr, model):
    """Warn of a learning rate that is unusual for a model of this size."""
    size = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if size < _SMALLEST or not lr:
        return
    times = _ADAPTERS if trained < size / 10 else 1
    rates = next(rates for upper, *rates in LEARNING_RATES if size <= upper)
    least, most = (round(rate * times, 12) for rate in rates)  # 3e-4 times 10 is less than 3e-3
    if not least <= lr <= most:
        kind = f"adapters on a model of {size / 1e9:.2g} B" if times > 1 else f"a model of {size / 1e9:.2g} B"
        table = "; ".join(_row(upper, *rates) for upper, *rates in LEARNING_RATES)
        usual = f"{least:.0e} to {most:.0e}"
        warn(f"lr: {lr:.3g} is unusual for {kind} parameters, {usual} is usual ({table}; adapters ten times that)")


def _row(upper, least, most):
    size = "larger" if upper == float("inf") else f"up to {upper / 1e9:.0f} B"
    return f"{size}: {least:.0e} to {most:.0e}"
