"""``AdamW``: torch's, with the defaults of fine-tuning, and clipping and skipping inside the step."""

import torch

from ..._backend import resolve


class AdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` with ``clip_grad_norm_`` and a skip of non-finite steps folded into ``step``.

    Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv:1711.05101). Two defaults differ from torch's:
    ``betas[1]`` is 0.95 and ``weight_decay`` 0.1. Pair it with :func:`decay_groups`, which keeps decay off biases and
    norms.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, capturable, differentiable: as in torch.
        foreach, fused: as in torch; either selects ``impl="torch"``. With neither, the fused path where the parameters
            allow it.
        max_grad_norm: clip the global 2-norm of all gradients to this, as ``torch.nn.utils.clip_grad_norm_`` would
            before the step. ``float("inf")`` clips nothing and still measures. The gradients are left clipped.
        skip_nonfinite: where the norm is not finite, leave parameters, moments and step as they are and count it.
        impl: ``"auto"`` or an implementation's name.

    Attributes:
        last_grad_norm: fp32 0-d tensor on the device, the norm before clipping; None before the first step, and where
            neither ``max_grad_norm`` nor ``skip_nonfinite`` asks for it. Reading it is the only sync.
        skipped_steps: int64 0-d tensor on the device.

    Raises:
        ValueError: an option out of range, a combination that means nothing.
        RuntimeError: sparse gradients, as in torch.
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        amsgrad=False,
        *,
        maximize=False,
        foreach=None,
        capturable=False,
        differentiable=False,
        fused=None,
        max_grad_norm=None,
        skip_nonfinite=False,
        impl="auto",
    ):
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm: expected a positive number or None, got {max_grad_norm}")
        if impl not in ("auto", "torch") and (foreach is not None or fused is not None):
            raise ValueError(f"foreach and fused are options of impl='torch'; got impl={impl!r}")
        if differentiable and (max_grad_norm is not None or skip_nonfinite):
            raise ValueError("differentiable=True takes neither max_grad_norm nor skip_nonfinite")
        if capturable and skip_nonfinite and (foreach or fused is False):
            raise ValueError("skip_nonfinite reads a flag back outside the fused path, which capturable=True forbids")
        self._impl = "torch" if foreach is not None or fused is not None else impl
        resolve("adamw", self._impl)
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self.last_grad_norm = None
        first = next((p for group in self.param_groups for p in group["params"]), torch.empty(0))
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=first.device)

    def add_param_group(self, param_group):
        """As in torch; a group that asks for neither ``foreach`` nor ``fused`` takes the fused path where it can."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["foreach"] is None and group["fused"] is None and not group["differentiable"]:
            group["fused"] = all(map(_fusible, group["params"]))
        # torch.amp.GradScaler then leaves unscaling to the step.
        self._step_supports_amp_scaling = all(group["fused"] for group in self.param_groups)

    def step(self, closure=None):
        """One optimiser step; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        resolve("adamw", self._impl)(self)
        return loss

    def load_state_dict(self, state_dict):
        """As in torch. How a group is computed (``foreach``, ``fused``) is not state: this optimiser's choice stays."""
        groups = state_dict["param_groups"]
        if len(groups) == len(self.param_groups):
            mine = [{key: group[key] for key in ("foreach", "fused")} for group in self.param_groups]
            groups = [{**group, **choice} for group, choice in zip(groups, mine, strict=True)]
        super().load_state_dict({**state_dict, "param_groups": groups})

    def __getstate__(self):
        own = (
            "_impl",
            "max_grad_norm",
            "skip_nonfinite",
            "last_grad_norm",
            "skipped_steps",
            "_step_supports_amp_scaling",
        )
        return super().__getstate__() | {name: getattr(self, name) for name in own}


def _fusible(p):
    """Whether torch's fused kernel updates ``p`` rightly: it walks parameter and moments by address."""
    dense = torch.empty_like(p, device="meta").stride() == p.stride()
    return p.is_floating_point() and p.device.type in ("cpu", "cuda") and dense


def decay_groups(model, weight_decay=0.1):
    """Parameter groups of ``model``: matrices with decay; biases, norms and embeddings without.

    Only trainable parameters; a weight that is tied appears once. An embedding is not decayed, nor a head tied to it: a
    batch gives no gradient to the rows of tokens that it lacks, so that decay would only shrink what fine-tuning never
    touches. Whatever has fewer than two dimensions, or sits in a module whose class name says ``Norm``, is not decayed.

    Returns:
        ``[{"params": …, "weight_decay": weight_decay}, {"params": …, "weight_decay": 0.0}]``, for any optimiser.

    Raises:
        ValueError: a negative ``weight_decay``, or nothing to train.
    """
    if weight_decay < 0:
        raise ValueError(f"weight_decay: expected at least 0, got {weight_decay}")
    exempt = {
        id(p)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding) or "norm" in type(module).__name__.lower()
        for p in module.parameters(recurse=False)
    }
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("model: no parameter requires a gradient")
    decayed = [p for p in trainable if p.dim() >= 2 and id(p) not in exempt]
    chosen = {id(p) for p in decayed}
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) not in chosen], "weight_decay": 0.0},
    ]
