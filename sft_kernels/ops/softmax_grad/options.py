"""What a row's loss is beside the negative log-likelihood of its target."""

import math
import numbers
from typing import NamedTuple

import torch

_FP32 = torch.finfo(torch.float32)


class LossOptions(NamedTuple):
    """The scalar options of both losses.

    For the logits x of a row, s = ``logit_scale``, c = ``softcap``, ε = ``label_smoothing``, ζ = ``z_loss``, V =
    ``classes``::

        u = c · tanh(s x / c)         loss = (1 − ε) (lse − u_y) + ε (lse − Σ_v u_v / V) + ζ lse²
    """

    classes: int  # V; the logits at hand may be a slice of the vocabulary
    label_smoothing: float = 0.0
    softcap: float | None = None
    logit_scale: float | None = None
    z_loss: float = 0.0

    @classmethod
    def checked(cls, classes, label_smoothing, softcap, logit_scale, z_loss):
        """The options; raises ``TypeError`` for one that is no number, ``ValueError`` for one out of range, by name.

        A tensor is no number: the gradient that it might ask for would be lost.
        """
        given = {"label_smoothing": label_smoothing, "softcap": softcap, "logit_scale": logit_scale, "z_loss": z_loss}
        for name, value in given.items():
            if not isinstance(value, numbers.Real) and not (value is None and name in ("softcap", "logit_scale")):
                raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        given = {name: value and _as_float(name, value) for name, value in given.items()}
        label_smoothing, softcap, logit_scale, z_loss = given.values()
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
        for name, value in (("softcap", softcap), ("logit_scale", logit_scale)):
            if value is not None and not _FP32.tiny <= value <= _FP32.max:
                raise ValueError(f"{name}: expected a positive number that fp32 can hold, or None, got {value}")
        if not 0 <= z_loss < math.inf:
            raise ValueError(f"z_loss: expected a number of at least 0, got {z_loss}")
        return cls(classes, *given.values())

    @property
    def tanh_scale(self):
        """s / c, which multiplies a logit in tanh, so that fp32 holds its double; None without a ``softcap``."""
        return None if self.softcap is None else min((self.logit_scale or 1.0) / self.softcap, _FP32.max / 2)

    @property
    def steepest(self):
        """A bound on |∂loss/∂x| over logits that fp16 can hold."""
        slope = self.logit_scale or 1.0
        largest = 65504 * slope if self.softcap is None else self.softcap
        return slope * (1 + 2 * self.z_loss * (largest + math.log(self.classes)))

    def shape(self, x):
        """u of logits ``x``: scaled, then capped; ``x`` itself where neither is asked for."""
        if self.logit_scale is not None:
            x = x * self.logit_scale
        return x if self.softcap is None else torch.tanh(x / self.softcap) * self.softcap

    def slope(self, x):
        """∂u/∂x of logits ``x`` for a ``softcap``, but for the factor ``logit_scale``.

        1 − tanh² is 4 e / (1 + e)² with e = exp(−2 |s x / c|), which keeps its digits where the cap is reached.
        """
        e = torch.exp(x.abs() * (-2 * self.tanh_scale))
        return 4 * e / (1 + e).square_()


def _as_float(name, value):
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name}: expected a number that a float can hold") from error
