"""``decay_groups``: the parameters of a model that decay, and those that do not."""

import torch
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm


def decay_groups(model, weight_decay=0.1):
    """Parameter groups of ``model``: matrices with decay; biases, norms and embeddings without.

    Only trainable parameters; a weight that is tied appears once. An embedding is not decayed, nor a head tied to it: a
    batch gives no gradient to the rows of tokens that it lacks, so that decay would only shrink what fine-tuning never
    touches. ``torch.nn.Embedding``, ``EmbeddingBag`` and whatever has ``num_embeddings`` are embeddings, and so is an
    adapter around one. Whatever has fewer than two dimensions, or sits in a module whose class name says ``Norm`` or
    ends in ``Embedding``, is not decayed.

    What ``torch.nn.utils.parametrize`` computes a tensor from counts as the tensor. Of a weight norm the direction is
    decayed and the scale is not.

    Returns:
        ``[{"params": …, "weight_decay": weight_decay}, {"params": …, "weight_decay": 0.0}]``, for any optimiser.

    Raises:
        ValueError: a ``weight_decay`` that is not at least 0, or nothing to train.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay: expected at least 0, got {weight_decay}")
    exempt = {id(p) for module in model.modules() for p in _exempt(module)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("model: no parameter requires a gradient")
    decayed = [p for p in trainable if p.dim() >= 2 and id(p) not in exempt]
    chosen = {id(p) for p in decayed}
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) not in chosen], "weight_decay": 0.0},
    ]


def _exempt(module):
    """The parameters that ``module`` exempts from decay, whatever their dimensions."""
    if _is_embedding(getattr(module, "base_layer", None)):  # an adapter around one
        yield from module.parameters()
    kind = type(module).__name__.lower()
    whole = _is_embedding(module) or "norm" in kind or kind.endswith(("embedding", "embeddings"))
    if whole:
        yield from module.parameters(recurse=False)
    for name, parametrization in _parametrizations(module):
        if whole or "bias" in name:
            yield from parametrization.parameters()
        elif isinstance(parametrization[0], _WeightNorm):
            yield parametrization.original0  # the scale of each row, [out, 1]
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            yield getattr(module, f"{hook.name}_g")


def _is_embedding(module):
    return isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag) or (
        isinstance(module, torch.nn.Module) and isinstance(getattr(module, "num_embeddings", None), int)
    )


def _parametrizations(module):
    """The tensors of ``module`` that are computed from parameters, by name."""
    found = getattr(module, "parametrizations", None)
    if not isinstance(found, torch.nn.ModuleDict):
        return []
    return [(name, each) for name, each in found.items() if isinstance(each, ParametrizationList)]
