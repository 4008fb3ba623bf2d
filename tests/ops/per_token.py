"""Gradients of any function of a row's loss, log-probability, logsumexp and entropy: what asks for one, the oracle, and
the plain code.

With g the upstream gradients of the four, the coefficients of a row are those of
:func:`sft_kernels.ops.softmax_grad.torch_impl.softmax_grad`.
"""

import numpy as np
import torch

from sft_kernels.ops.softmax_grad.options import LossOptions

OPTIONS = {"label_smoothing": 0.1, "softcap": 6.0, "logit_scale": 0.7, "z_loss": 0.01}


class Case:
    """Rows of ``logits``, their upstream gradients ``g`` [4, N] and all that follows from them in float64."""

    def __init__(self, logits, target, g=None, **options):
        N, self.V = logits.shape
        self.logits, self.target = logits, target
        self.options = LossOptions(self.V, **options)
        self.g = torch.randn(4, N, dtype=torch.float64) if g is None else g
        self.u, self.slope = _shaped(logits.double().numpy(), self.options)
        largest = self.u.max(1)
        self.lse = largest + np.log(np.exp(self.u - largest[:, None]).sum(1))
        self.p = np.exp(self.u - self.lse[:, None])
        below = np.where(self.p > 0, self.lse[:, None] - self.u, 0)  # a logit of -inf contributes nothing
        self.spread = self.p * below
        entropy = self.spread.sum(1)
        g_loss, g_logprob, g_lse, g_entropy = self.g.numpy()
        smoothing, z_loss = self.options.label_smoothing, self.options.z_loss
        self.exact = np.stack(
            (
                g_loss * (1 + 2 * z_loss * self.lse) - g_logprob + g_lse - g_entropy * entropy,
                -g_loss * (1 - smoothing) + g_logprob,
                g_entropy,
                g_loss * smoothing / self.V,
            ),
            1,
        )

    @property
    def coefficients(self):
        return torch.from_numpy(self.exact).to(torch.float64 if self.logits.dtype == torch.float64 else torch.float32)

    @property
    def given(self):
        """The keyword arguments of the core."""
        return {"lse": torch.from_numpy(self.lse), "coefficients": self.coefficients}

    def oracle(self, coefficients=None):
        """dlogits in NumPy and float64, term by term."""
        A, B, C, E = (self.exact if coefficients is None else coefficients.double().numpy()).T[:, :, None]
        hit = np.arange(self.V) == self.target.numpy()[:, None]
        # At the target A p + B as A (p − 1) + (A + B): so it keeps its digits where p is near 1.
        by_p = np.where(hit, A * np.expm1(self.u - self.lse[:, None]) + (A + B), A * self.p)
        return (by_p + C * self.spread - E) * self.slope

    def autograd(self, dtype=None):
        """dlogits by autograd of plain expressions in ``dtype``, that of the logits if None."""
        leaf = self.logits.to(dtype or self.logits.dtype).requires_grad_()
        o = self.options
        u = leaf if o.logit_scale is None else leaf * o.logit_scale
        u = u if o.softcap is None else o.softcap * torch.tanh(u / o.softcap)
        lse, log_p = u.logsumexp(1), u.log_softmax(1)
        logprob = log_p.gather(1, self.target[:, None])[:, 0]
        entropy = -(log_p.exp() * log_p.masked_fill(log_p == float("-inf"), 0)).sum(1)
        loss = -(1 - o.label_smoothing) * logprob + o.z_loss * lse.square()
        if o.label_smoothing:
            loss = loss - o.label_smoothing * log_p.mean(1)
        values = torch.stack((loss, logprob, lse, entropy))
        (gradient,) = torch.autograd.grad(values, leaf, self.g.to(values.dtype))
        return gradient


def _shaped(x, options):
    """u of logits ``x`` and ∂u/∂x."""
    s = options.logit_scale or 1.0
    if options.softcap is None:
        return s * x, s
    e = np.exp(-2 * np.abs(s * x / options.softcap))
    return options.softcap * np.tanh(s * x / options.softcap), s * 4 * e / (1 + e) ** 2
