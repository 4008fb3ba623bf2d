"""The oracle of ``linear_cross_entropy``: NumPy, float64.

::

    logits = X Wᵀ + b          dX = dlogits W          dW = dlogitsᵀ X          db = Σ_i dlogits_i
"""

from typing import NamedTuple

import numpy as np

from ..softmax_grad.reference import Loss, masked_loss


class LinearLoss(NamedTuple):
    """The loss over the logits, and its gradients."""

    logits: Loss
    dinput: np.ndarray  # [N, D]
    dweight: np.ndarray  # [V, D]
    dbias: np.ndarray  # [V]

    @property
    def loss(self):
        return self.logits.loss


def linear_cross_entropy(input, linear_weight, target, *, linear_bias=0.0, shift=0, ignore_index=-100, **options):
    """:class:`LinearLoss` of ``input`` [N, D], ``linear_weight`` [V, D], ``target`` [N], one sequence if there is a
    ``shift``.

    The row at t is judged by the label, and its weight, at t + ``shift``. ``options`` go to ``masked_loss``.
    """
    x, w = np.asarray(input, np.float64), np.asarray(linear_weight, np.float64)
    target, shift = np.asarray(target), int(shift)
    if shift:
        target = np.append(target, np.full(shift, ignore_index))[shift:]
        if options.get("token_weight") is not None:
            options["token_weight"] = np.append(options["token_weight"], np.zeros(shift))[shift:]
    out = masked_loss(x @ w.T + linear_bias, target, ignore_index=ignore_index, **options)
    d = out.dlogits
    return LinearLoss(out, d @ w, d.T @ x, d.sum(0))
