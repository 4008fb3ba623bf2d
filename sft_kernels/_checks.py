"""Checks of tensors that every op makes."""

import torch

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name, value):
    """Raise ``TypeError`` unless ``value`` is a dense tensor; sparse and nested ones are not supported."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if kind := unlike_dense(value):
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")


def unlike_dense(tensor):
    """The kind of ``tensor``, in words, if it is sparse or nested; else None."""
    if tensor.is_nested:
        return "a nested tensor"
    return None if tensor.layout == torch.strided else f"one of layout {tensor.layout}"


def check_floating(name, value):
    """Raise ``TypeError`` unless ``value`` is a dense tensor of a dtype in ``FLOATING``; fp8 is not supported."""
    check_tensor(name, value)
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected floating point (float32, bfloat16, float16 or float64), got {value.dtype}")
