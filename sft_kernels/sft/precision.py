"""Chooses the numbers in which a run computes, keeps its parameters, and updates them."""

from contextlib import nullcontext

import torch

from .. import AdamW, decay_groups
from ..ops.adamw.state import HALF


def dtype_of(parameters):
    """The dtype in which a recipe's ``parameters`` are kept."""
    return torch.float32 if parameters == "fp32" else torch.bfloat16


def precision_on(device, recipe):
    """Returns "fp32" or "bf16", the recipe's precision on a device."""
    if recipe.precision != "auto":
        return recipe.precision
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return "bf16" if native else "fp32"


def autocast(device, recipe):
    """The context of a forward. Parameters in bf16 need none."""
    if precision_on(device, recipe) == "fp32" or recipe.parameters != "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def optimizer_of(model, recipe):
    """Returns ``(optimizer, names)``: AdamW as the recipe asks for it, and its parameters' names in its order.

    Parameters in 16 bits have fp32 moments, and the updates that are rounded away are counted.
    """
    groups = decay_groups(model, recipe.weight_decay)
    half = any(p.dtype in HALF for group in groups for p in group["params"])
    if recipe.parameters != "fp32" and not any(p.dtype == torch.bfloat16 for g in groups for p in g["params"]):
        raise ValueError(f"parameters: {recipe.parameters} is for a model in bf16; load the one that is handed in so")
    optimizer = AdamW(
        groups,
        lr=recipe.lr,
        max_grad_norm=recipe.max_grad_norm,
        skip_nonfinite=True,
        master_weights="split" if recipe.parameters == "bf16+master" else None,
        stochastic_rounding=recipe.parameters == "bf16+stochastic",
        state_dtype=torch.float32 if half else None,
        update_stats=half,
    )
    if recipe.parameters == "bf16+stochastic":
        for group in optimizer.param_groups:
            group["seed"] = recipe.seed % 2**32
    name_of = {p: name for name, p in model.named_parameters()}
    return optimizer, [name_of[p] for group in optimizer.param_groups for p in group["params"]]


def decay_of(optimizer):
    """A sentence on what the optimiser's weight decay acts on."""
    decayed = sum(len(group["params"]) for group in optimizer.param_groups if group["weight_decay"])
    spared = sum(len(group["params"]) for group in optimizer.param_groups) - decayed
    decay = max((group["weight_decay"] for group in optimizer.param_groups), default=0.0)
    return f"weight decay {decay:g} on {decayed} matrices, none on {spared} biases, norms and embeddings"


def rounded_away(optimizer):
    """The share of the last step's updates that changed nothing, a 0-d tensor, or None if nothing was counted."""
    statistics = optimizer.update_statistics() if optimizer.update_stats else None
    if statistics is None:
        return None
    sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    share = torch.nan_to_num(statistics.rounded_away)  # of a group without parameters
    return sum(each * size for each, size in zip(share, sizes, strict=True)) / sum(sizes)
