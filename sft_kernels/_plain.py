"""Tells the calls that only plain torch can serve: transforms of ``torch.func``, and tensors without values."""

from contextlib import nullcontext

import torch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_WITHOUT_VALUES = (FakeTensor, FunctionalTensor)
_functorch = torch._C._functorch
_FAKE, _PROXY = torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY


def is_transformed():
    """Returns True inside ``torch.func`` and ``vmap``, with forward-mode derivatives, and while torch traces."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or _is_traced()


def _is_traced():
    proxy = torch._C._len_torch_dispatch_stack() and torch._C._get_dispatch_mode(_PROXY) is not None
    return proxy or torch._C._get_tracing_state() is not None


is_transformed._dynamo_marked_constant = True  # a compiler guards on the transforms itself


def why_plain(*tensors):
    """Returns the kind of call that kernels and counted rows cannot serve, in words; None for an ordinary call.

    ``tensors`` may contain None, and whatever else is still to be refused.
    """
    if is_transformed():
        return "torch.func, vmap, forward-mode derivatives and traces"
    if torch.compiler._is_exporting_flag:  # up to torch 2.12 Dynamo takes is_exporting() for True
        return "torch.export"
    for tensor in tensors:
        kind = type(tensor)
        if tensor.is_meta if kind in _PLAIN else isinstance(tensor, _WITHOUT_VALUES):
            return "meta and fake tensors"
    return None


def is_without_values(tensor):
    """Returns True for a tensor on the meta device, a fake one, and one of a trace."""
    return tensor.is_meta or isinstance(tensor, _WITHOUT_VALUES)


def values_of(tensor):
    """Returns ``(values, batched)``: the tensor inside the wrappers of ``torch.func``, and if one of them is a batch.

    The dimensions of batches come first. ``values`` is None if nothing may read them: on the meta device, of fake
    tensors, and while torch traces. Read it inside :func:`untransformed`.
    """
    batches = []
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            batches.append(_functorch.maybe_get_bdim(tensor))
        tensor = _functorch.get_unwrapped(tensor)
    if is_without_values(tensor) or _is_traced():
        return None, bool(batches)
    if batches:
        with untransformed():
            for i, dimension in enumerate(reversed(batches)):  # each counts those dimensions that are left
                tensor = tensor.movedim(i + dimension, 0)
    return tensor, bool(batches)


def is_differentiated(tensor):
    """Returns True for a tensor that a derivative is asked by, in reverse or in forward mode."""
    if tensor.requires_grad:
        return True
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return _has_tangent(tensor)


def _has_tangent(tensor):
    """Returns True if a transform, from the innermost to the outermost, or ``torch`` itself has a tangent for it."""
    if not torch._C._are_functorch_transforms_active():
        return forward_ad.unpack_dual(tensor).tangent is not None
    transform = _functorch.peek_interpreter_stack()
    if transform.key() == _functorch.TransformType.Jvp and forward_ad.unpack_dual(tensor).tangent is not None:
        return True
    if _functorch.maybe_get_level(tensor) == transform.level():
        tensor = _functorch.get_unwrapped(tensor)
    with temporarily_pop_interpreter_stack():
        return _has_tangent(tensor)


def is_batch_of_gradients(gradient):
    """Returns True for what ``is_grads_batched=True`` hands to a backward."""
    return _functorch.is_legacy_batchedtensor(gradient) or _functorch.is_batchedtensor(gradient)


def untransformed():
    """A context in which operations are not transformed by ``torch.func``."""
    return torch._C._DisableFuncTorch() if torch._C._are_functorch_transforms_active() else nullcontext()


def mode_of_fakes(plain, tensor):
    """A context in which what a ``plain`` call makes is fake if ``tensor`` is, as inside the mode that made it."""
    if not plain or torch.compiler.is_compiling() or torch._C._get_dispatch_mode(_FAKE) is not None or _is_traced():
        return nullcontext()
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor.fake_mode if isinstance(tensor, FakeTensor) else nullcontext()


def masked(tensor, mask, value, plain):
    """``tensor`` with ``value`` where ``mask``, in place unless ``plain``: a batch may stand in the way."""
    return tensor.masked_fill(mask, value) if plain else tensor.masked_fill_(mask, value)


def autocast_on(device):
    """Returns True if autocast is on for ``device``."""
    # torch 2.11 cannot trace is_autocast_available, so the devices that are compiled for are not asked about.
    available = device.type in ("cpu", "cuda") or torch.amp.is_autocast_available(device.type)
    return available and torch.is_autocast_enabled(device.type)


def without_autocast(device):
    """A context without autocast for ``device``."""
    available = device.type in ("cpu", "cuda") or torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()
