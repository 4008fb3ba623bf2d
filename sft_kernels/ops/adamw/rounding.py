"""How a bf16 parameter keeps more, or on average more, than its 16 bits: in plain torch, as the README writes it."""

import torch

from .sharding import local, placement_in_whole

_LOW = 0xFFFFFFFF


def decode(weight, remainder):
    """The fp32 master of a bf16 ``weight`` and what :func:`encode` left of it."""
    lower = remainder.view(torch.int16).int()
    return ((weight.view(torch.int16).int() << 16) + lower).view(torch.float32)


def encode(master):
    """``(weight, remainder)`` of an fp32 ``master``, so that nothing is lost: its upper half, rounded, halves away from
    zero, and the bits of the lower.

    Both are bf16, though the remainder's value means nothing: collectives know no int16, and torch casts what it loads
    to the parameter's dtype.
    """
    bits = master.contiguous().view(torch.int32)
    nan = master.isnan()
    weight = _low_half((bits + 0x8000) >> 16).where(~nan, 0x7FC0)
    return weight.view(torch.bfloat16), _low_half(bits).where(~nan, 0).view(torch.bfloat16)


def round_stochastically(values, *, seed, t, p, index):
    """fp32 ``values`` of what lies here of ``p``, the ``index``-th parameter, rounded to bf16 in step ``t``.

    ``t`` is a 0-d tensor: that a step counts is known on the device alone.
    """
    offset, maps = placement_in_whole(p)
    i = torch.arange(values.numel(), device=values.device)
    for L, G in maps:
        i = i // L * G + i % L
    noise = random_bits(i + offset, seed=seed, t=t, index=index).view(values.shape) >> 16
    rounded = _low_half((values.contiguous().view(torch.int32).long() + noise) >> 16).view(torch.bfloat16)
    return rounded.where(values.isfinite(), values.to(torch.bfloat16))


def random_bits(i, *, seed, t, index):
    """32 random bits for each int64 element index ``i``, as int64."""
    key = _mix(torch.full((), seed + 0x9E3779B9 & _LOW, device=i.device))
    key = _mix(_mix(key ^ t.long()) ^ index)
    return _mix((i & _LOW) ^ ((i >> 32) * 0x9E3779B1 & _LOW) ^ key)


def _mix(x):
    """Multiplied in int64, whose overflow leaves the low half right."""
    x = x ^ x >> 16
    x = x * 0x7FEB352D & _LOW
    x = x ^ x >> 15
    x = x * 0x846CA68B & _LOW
    return x ^ x >> 16


def _low_half(bits):
    """The low 16 bits as int16."""
    return (((bits & 0xFFFF) ^ 0x8000) - 0x8000).to(torch.int16)


def lies_row_major(p):
    """Whether the order of elements in memory is that by which they are counted."""
    return local(p).is_contiguous()
