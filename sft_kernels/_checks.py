"""What every op asks of its tensors."""

import torch

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name, value):
    """Raise ``TypeError`` unless ``value`` is a dense tensor; sparse and nested ones are not supported."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.is_nested or value.layout != torch.strided:
        kind = "a nested tensor" if value.is_nested else f"one of layout {value.layout}"
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")


def check_floating(name, value):
    """Raise ``TypeError`` unless ``value`` is a dense tensor of a dtype in ``FLOATING``; fp8 is not supported."""
    check_tensor(name, value)
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected floating point (float32, bfloat16, float16 or float64), got {value.dtype}")
