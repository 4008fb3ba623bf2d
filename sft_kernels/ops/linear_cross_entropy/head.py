"""A module as an output head: its weight and bias, if ``x Wᵀ + b`` is all that it computes."""

import sys

import torch
from torch.nn.modules import module as _everywhere

from ..._checks import FLOATING
from ..._plain import is_without_values

_Linear, _Module = torch.nn.Linear, torch.nn.Module  # under whose names others may stand later
# Kept here, since these may be replaced on their classes later.
_FORWARD, _CALL, _CALL_IMPL = _Linear.forward, _Module.__call__, _Module._call_impl
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
    while _is_compiled(head):
        head = head._orig_mod
    weight, bias = head.weight, head.bias
    for kind, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None or (type(tensor) in _PLAIN and tensor.dtype in FLOATING):
            continue
        if not _is_dtensor(tensor) and (reason := why_not_a_matrix(tensor, kind)):
            raise TypeError(f"{name}: expected a head with a plain {kind}, got a {type(head).__name__} with {reason}")
    return weight, bias


def why_not_linear(head, hooks=False):
    """Returns what may make the function of module ``head`` another than ``torch.nn.Linear``'s, in words, or None."""
    if _Module.__call__ is not _CALL or _Module._call_impl is not _CALL_IMPL or _Linear.forward is not _FORWARD:
        return "torch.nn.Linear.forward or torch.nn.Module.__call__ was replaced"
    if not hooks and _has_hooks_everywhere() and (hook := _foreign_hook()):
        return f"every module has a hook, {_name(hook)}"
    if type(head) is _Linear and not _has_hooks(head) and not _has_calls_of_its_own(head):
        return None
    while _is_compiled(head):  # a compiled module computes the same, unless something was done to the wrapper
        run = getattr(vars(head).get("forward"), "_torchdynamo_orig_callable", None)
        if getattr(run, "__self__", getattr(run, "__wrapped__", None)) is not head._orig_mod:
            return "the forward of this compiled module was replaced"
        if reason := _why_hooks(head, hooks):
            return reason
        head = head._orig_mod
    if not isinstance(head, _Module):
        return f"got {_kind(head)}"
    kind = type(head)
    stock = kind.stock if hasattr(head, "_sft_kernels") else kind  # of a head that ``patch`` made lazy
    if isinstance(head, torch.nn.Embedding):
        return f"got {_kind(head)}, which looks up rows"
    if not isinstance(head, _Linear):
        return f"got {_kind(head)}"
    if stock.forward is not _FORWARD or kind.__call__ is not _CALL or kind._call_impl is not _CALL_IMPL:
        return f"got {_kind(head)}, which has a forward of its own"
    own = vars(head).get("forward")
    if "_call_impl" in vars(head) or (own is not None and getattr(own, "__func__", None) is not kind.forward):
        return f"the forward of this {kind.__name__} was replaced"
    return _why_hooks(head, hooks)


def _why_hooks(head, allowed):
    """Returns which hook of ``head`` may change its function, in words; None for none, or if they are ``allowed``."""
    tables = _HOOKS[:1] if allowed else _HOOKS  # a hook that runs before may compute the weight
    hook = next((hook for table in tables for hook in getattr(head, table).values()), None)
    if hook is None:
        return None
    kind = type(head).__name__
    if (getattr(hook, "__module__", None) or "").startswith("torch.distributed"):
        return f"this {kind} is split over ranks by itself: split the loss, with the head in it, instead"
    return f"this {kind} has a hook, {_name(hook)}"


def _foreign_hook():
    """Returns a hook on every module; None for none but torch's own, with which it counts and tracks."""
    hooks = (hook for table in _HOOKS for hook in getattr(_everywhere, f"_global{table}").values())
    return next((hook for hook in hooks if not (getattr(hook, "__module__", None) or "").startswith("torch.")), None)


def _has_calls_of_its_own(head):
    return "forward" in vars(head) or "_call_impl" in vars(head)


def _is_compiled(head):
    """Returns True for what ``torch.compile(module)`` gives. The compiler is not imported to find out."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and isinstance(head, compiler.OptimizedModule)


def why_not_a_matrix(weight, kind="weight"):
    """Returns what keeps ``weight`` from being an array of numbers, in words; None if nothing does.

    ``torch.nn.Linear.forward`` multiplies a tensor subclass by rules of its own, which are lost here.
    """
    plain = type(weight) in _PLAIN or is_without_values(weight)
    if plain and weight.dtype.is_floating_point and weight.dtype.itemsize >= 2:
        return None
    return f"a {kind} of {type(weight).__name__}, {weight.dtype}; dequantise it"


def _has_hooks(module):
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    )


def _has_hooks_everywhere():
    return bool(
        _everywhere._global_forward_pre_hooks
        or _everywhere._global_forward_hooks
        or _everywhere._global_backward_pre_hooks
        or _everywhere._global_backward_hooks
    )


def _is_dtensor(tensor):
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def _kind(head):
    return "None" if head is None else f"a {type(head).__module__}.{type(head).__qualname__}"


def _name(hook):
    return getattr(hook, "__qualname__", None) or type(hook).__qualname__
