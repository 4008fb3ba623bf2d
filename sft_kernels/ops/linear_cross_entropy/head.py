"""A module as an output head: its weight and bias, if ``x Wᵀ + b`` is all that it computes."""

import torch

from ..._checks import FLOATING
from ..._plain import is_without_values

_Linear, _Module = torch.nn.Linear, torch.nn.Module  # under whose names others may stand later
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def weight_and_bias(head, name, *, hooks=False):
    """Returns ``(weight, bias)`` of module ``head``, the bias perhaps None; ``name`` is that of the argument.

    Weights that ``torch.nn.utils.parametrize`` computes are computed here, so that gradients reach what they are
    computed from. The heads of a patched model and compiled ones count as the layers that they stand for. ``hooks``
    allows a head that has some.

    Raises:
        TypeError: the forward of ``head`` is, or may be, another than that of ``torch.nn.Linear``; the weight is
            quantised or otherwise no plain tensor.
    """
    if reason := why_not_linear(head, hooks):
        raise TypeError(
            f"{name}: expected a torch.nn.Linear that computes x Wᵀ + b and nothing else; {reason}. Call the head and"
            " sft_kernels.cross_entropy on its logits, or hand linear_cross_entropy the weight that is meant; in a"
            " Hugging Face model sft_kernels.integrations.patch(model) spares the logits of any head, adapters included"
        )
    head = getattr(head, "_orig_mod", head)
    weight, bias = head.weight, head.bias
    if type(weight) in _PLAIN and weight.dtype in FLOATING:
        return weight, bias
    if not _is_dtensor(weight) and (reason := why_not_a_matrix(weight)):
        raise TypeError(f"{name}: expected a head with a plain weight, got a {type(head).__name__} with {reason}")
    return weight, bias


def why_not_linear(head, hooks=False):
    """Returns what may make the function of module ``head`` another than ``torch.nn.Linear``'s, in words, or None."""
    if type(head) is _Linear and not _has_hooks(head) and "forward" not in vars(head):
        return None
    if not isinstance(head, _Module):
        return f"got {_kind(head)}"
    head = getattr(head, "_orig_mod", head)  # a compiled module computes the same
    kind = type(head)
    stock = kind.stock if hasattr(head, "_sft_kernels") else kind  # of a head that ``patch`` made lazy
    if isinstance(head, torch.nn.Embedding):
        return f"got {_kind(head)}, which looks up rows"
    if not isinstance(head, _Linear):
        return f"got {_kind(head)}"
    if stock.forward is not _Linear.forward or kind.__call__ is not _Module.__call__:
        return f"got {_kind(head)}, which has a forward of its own"
    own = vars(head).get("forward")
    if own is not None and getattr(own, "__func__", None) is not kind.forward:
        return f"the forward of this {kind.__name__} was replaced"
    if not hooks and _has_hooks(head):
        hook = next(hook for table in _HOOKS for hook in getattr(head, table).values())
        if (getattr(hook, "__module__", None) or "").startswith("torch.distributed"):
            return f"this {kind.__name__} is split over ranks by itself: split the loss, with the head in it, instead"
        return f"this {kind.__name__} has a hook, {_name(hook)}"
    return None


def why_not_a_matrix(weight):
    """Returns what keeps ``weight`` from being a matrix of numbers, in words; None if nothing does.

    ``torch.nn.Linear.forward`` multiplies a tensor subclass by rules of its own, which are lost here.
    """
    plain = type(weight) in _PLAIN or is_without_values(weight)
    if plain and weight.dtype.is_floating_point and weight.dtype.itemsize >= 2:
        return None
    return f"a weight of {type(weight).__name__}, {weight.dtype}; dequantise it"


def _has_hooks(module):
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    )


def _is_dtensor(tensor):
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def _kind(head):
    return "None" if head is None else f"a {type(head).__module__}.{type(head).__qualname__}"


def _name(hook):
    return getattr(hook, "__qualname__", None) or type(hook).__qualname__
