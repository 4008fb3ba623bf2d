"""Says once if gradients were clipped before they came to a step that clips, too.

The step measures the norm of the gradients that it is handed. If something else has clipped them to B, that norm is
B n / (n + 1e-6), as ``torch.nn.utils.clip_grad_norm_`` computes it from a larger n: it lies between B − 1e-6 and B.
"""

import math
import warnings
import weakref

import torch

from .sharding import is_sharded
from .state import HALF

STEPS = 100  # that are watched
ROUNDING = 1e-5  # relative, of two sums of squares in fp32
# Norms at one bound before anything is said. In half precision a norm lies there by chance, too. Norms that nobody
# clips lie as often in the stretch of the same width below, so that one there counts against several at the bound.
ENOUGH, ENOUGH_IN_HALF, MISS = 3, 12, 4


class DoubleClip:
    """Watches the first steps of an optimiser that clips, and warns if their norms pile up at a bound.

    Norms that pile up reach the bound, never exceed it and are not all the same. The bound is ``max_grad_norm`` or,
    with gradients in fp32, a number of one digit (0.5, 1, 2). A step counts only if its first gradient is new and was
    written to after it was made, as clipping does; of a DTensor nobody knows if it was. So a benchmark that repeats the
    step on the same gradients counts nothing.

    Nothing waits for a GPU: there a norm is copied to the host, and looked at in a later step.
    """

    def __init__(self):
        self._steps_left = STEPS
        self._last = _nothing, 0  # the first gradient after the last step, and its version
        self._counts = False
        self._largest, self._bound, self._norms, self._score = 0.0, None, set(), 0
        self._tolerance, self._enough = None, ENOUGH
        self._host = self._event = None  # of a norm that is on its way from a GPU
        self._under_way = False

    def before(self, optimizer):
        """Returns the first parameter that has a gradient; to be called before the step writes to it."""
        p = next((p for group in optimizer.param_groups for p in group["params"] if p.grad is not None), None)
        if p is None or p.grad.is_inference():  # which has no version
            return None
        gradient, version = p.grad, p.grad._version
        last, last_version = self._last
        written = version > 0 or is_sharded(gradient)
        self._counts = written and (last() is not gradient or last_version != version)
        return p

    def after(self, optimizer, p):
        """Look at the norm of the step that was just taken; returns True if there is nothing left to watch for."""
        self._last = weakref.ref(p.grad), p.grad._version
        self._steps_left -= 1
        return self._is_told(optimizer) or self._steps_left == 0

    def _is_told(self, optimizer):
        own = optimizer.max_grad_norm
        if not self._counts or own in (None, math.inf) or any(group["capturable"] for group in optimizer.param_groups):
            return False
        if self._tolerance is None:
            self._tolerance, self._enough = _tolerance(optimizer)
        norm = self._read(optimizer.last_grad_norm)
        return norm is not None and math.isfinite(norm) and self._pile_up(norm, own)

    def _read(self, norm):
        """Returns ``norm`` as a number, on a GPU that of an earlier step; None if there is none yet."""
        if type(norm) is torch.Tensor and norm.device.type == "cpu":
            return norm.item()
        return self._arrived(norm) if type(norm) is torch.Tensor and norm.device.type == "cuda" else None

    def _arrived(self, norm):
        """Send ``norm`` to the host, unless one is on its way; returns the one that has arrived there, or None."""
        from .tables import is_capturing

        if is_capturing(norm.device) or (self._under_way and not self._event.query()):
            return None  # a capture forbids to ask an event
        if self._host is None:
            self._host, self._event = torch.empty((), dtype=norm.dtype, pin_memory=True), torch.cuda.Event()
        arrived = self._host.item() if self._under_way else None
        self._host.copy_(norm, non_blocking=True)
        self._event.record(torch.cuda.current_stream(norm.device))
        self._under_way = True
        return arrived

    def _pile_up(self, norm, own):
        self._largest = max(self._largest, norm)
        bound = next((bound for bound in self._bounds(norm, own) if self._nears(norm, bound)), None)
        if bound is None or self._largest > bound * (1 + self._tolerance):
            return False
        if bound != self._bound:
            self._bound, self._norms, self._score = bound, set(), 0
        if norm < bound - 1e-6 - bound * self._tolerance:
            self._score -= MISS
            return False
        self._score += 1
        self._norms.add(norm)
        if self._score < self._enough or len(self._norms) == 1:
            return False
        warnings.warn(
            f"AdamW(max_grad_norm={own}): the gradients come clipped to {bound} already, by a trainer or by "
            "clip_grad_norm_, and AdamW clips them again; last_grad_norm is the norm after the first clip. Clip once: "
            "leave out AdamW's max_grad_norm, or switch off the other clip with TrainingArguments(max_grad_norm=0) in "
            "transformers, without gradient_clip_val in Lightning's Trainer, or without clip_grad_norm_ in a loop",
            UserWarning,
            stacklevel=6,  # the caller of torch's wrapper around ``step``
        )
        return True

    def _bounds(self, norm, own):
        """Bounds that ``norm`` may have been clipped to: our own, and ``norm`` rounded to one digit."""
        return (own,) if self._enough == ENOUGH_IN_HALF else (own, float(f"{norm:.0e}"))

    def _nears(self, norm, bound):
        """Returns True if ``norm`` lies where a clip to ``bound`` would leave it, or a little below."""
        return bound - 3 * (1e-6 + bound * self._tolerance) <= norm <= bound * (1 + self._tolerance)


def _tolerance(optimizer):
    """Returns ``(relative error of a clipped norm, how many such norms are enough)``.

    In half precision torch rounds the norm of each tensor, the norm of all, and the factor.
    """
    dtypes = {p.grad.dtype for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
    half = [torch.finfo(dtype).eps for dtype in dtypes.intersection(HALF)]
    return (1.5 * max(half), ENOUGH_IN_HALF) if half else (ROUNDING, ENOUGH)


def _nothing():
    """Stands in for a weak reference before the first step."""
