"""``decay_groups``: the parameters of a model that decay, and those that do not."""

import torch
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm

# Scales of rows or ranks in PEFT's adapters (DoRA, IA3, BOFT, AdaLoRA): their dimensions may be those of a matrix.
_SCALES = {"lora_magnitude_vector", "ia3_l", "boft_s", "lora_E"}


def decay_groups(model, weight_decay=0.1):
    """Parameter groups of ``model``: matrices with decay; biases, norms and embeddings without.

    Only trainable parameters; a weight that is tied appears once. An embedding is not decayed, nor a head tied to it: a
    batch gives no gradient to the rows of tokens that it lacks, so that decay would only shrink what fine-tuning never
    touches. ``torch.nn.Embedding``, ``EmbeddingBag`` and whatever has ``num_embeddings`` are embeddings, and so is an
    adapter around one. Whatever has fewer than two dimensions, or sits in a module whose class name says ``Norm`` or
    ends in ``Embedding`` (except linear layers and convolutions), is not decayed. Nor are parameters whose name begins
    with ``bias``, and the scales of PEFT's adapters: DoRA's, IA3's, BOFT's and AdaLoRA's.

    What ``torch.nn.utils.parametrize`` computes a tensor from counts as the tensor. Of a weight norm the direction is
    decayed and the scale is not.

    Returns:
        ``[{"params": …, "weight_decay": weight_decay}, {"params": …, "weight_decay": 0.0}]``, for any optimiser.

    Raises:
        ValueError: a ``weight_decay`` that is not at least 0, or nothing to train.
        TypeError: a ``weight_decay`` that is no number.
    """
    try:
        fits = bool(weight_decay >= 0)
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"weight_decay: expected a number of at least 0, got {weight_decay!r}") from error
    if not fits:
        raise ValueError(f"weight_decay: expected at least 0, got {weight_decay}")
    exempt = {id(p) for module in model.modules() for p in _exempt(module)}
    exempt |= {id(p) for name, p in model.named_parameters(remove_duplicate=False) if _is_bias_or_scale(name)}
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
    # A layer that multiplies is none, whatever its name: one that makes embeddings of patches, say.
    table = kind.endswith(("embedding", "embeddings")) and not isinstance(module, torch.nn.Linear | _ConvNd)
    whole = _is_embedding(module) or "norm" in kind or table
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


def _is_bias_or_scale(name):
    """Returns True if the ``name`` of a parameter in its model says that it is added, or that it scales an adapter."""
    *modules, own = name.split(".")
    return own.startswith("bias") or not _SCALES.isdisjoint((*modules, own))


def _is_embedding(module):
    if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag):
        return True
    if not isinstance(module, torch.nn.Module):
        return False
    try:
        return isinstance(getattr(module, "num_embeddings", None), int)
    except Exception:  # a property that has no value here
        return False


def _parametrizations(module):
    """The tensors of ``module`` that are computed from parameters, by name."""
    found = getattr(module, "parametrizations", None)
    if not isinstance(found, torch.nn.ModuleDict):
        return []
    return [(name, each) for name, each in found.items() if isinstance(each, ParametrizationList)]
