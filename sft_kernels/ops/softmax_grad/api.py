"""Which implementation of the core a loss gets."""

from typing import Any, NamedTuple

import torch

from ..._backend import resolve


class Core(NamedTuple):
    """One implementation of the core, handed to the losses as a value."""

    softmax_grad: Any
    scale_: Any  # multiplies a gradient in place by a scalar on the device

    @classmethod
    def resolve(cls, impl, device, dtype, options, composed=False, return_stats=False, plain=None):
        """The implementation ``impl`` for logits of ``dtype`` on ``device``, :class:`LossOptions` and ``return_stats``.

        ``composed`` losses, float64 and ``plain`` calls (:func:`~sft_kernels._plain.why_plain`) are torch's own code:
        ``"auto"`` takes it, another name raises :class:`Unavailable`.
        """
        needs_torch = plain
        if plain:
            pass
        elif composed:
            needs_torch = "probabilities, class weights with label smoothing, and heads of more than two dimensions"
        elif dtype == torch.float64:
            needs_torch = "float64"
        asked = {"logit_scale": options.logit_scale is not None, "z_loss": options.z_loss != 0}
        asked["return_stats='tokens'"] = return_stats == "tokens"
        needs_triton = " and no ".join(name for name, given in asked.items() if given)
        return cls(*(resolve(op, impl, device, needs_torch, needs_triton) for op in ("softmax_grad", "scale_")))
