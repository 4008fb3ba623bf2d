"""The attention mask of ``attn_implementation="sft_kernels"``: a mark that only our attention reads.

transformers describes a mask as a function of positions before it builds one. A row that our attention computes gets a
:class:`PackedMask` instead of a tensor. A model that reads its mask itself meets an error, not a mask of None.
"""

import functools
import types
from typing import NamedTuple

import torch

from . import calls
from .calls import NAME


class UnreadableMask(AttributeError, ValueError):
    """Raised by :class:`PackedMask`; ``hasattr`` and ``getattr`` with a default still work on it."""


def _refuse(*args, **kwargs):
    raise UnreadableMask(
        f"attention_mask: attn_implementation={NAME!r} does not support this model, which reads its attention "
        "mask itself; use attn_implementation='sdpa' or 'eager'"
    )


class PackedMask:
    """The mask of a row without padding, as a description.

    ``shape`` and ``ndim`` are those of the mask that it describes. Anything else that a model asks of it raises.

    Attributes:
        left, right: how many tokens before and after a token it sees, None for all.
        reason: None, or what the mask says that packed attention does not compute.
        call: the model's :class:`~.calls.Call`, which has the boundaries; None under ``torch.compile``.
    """

    ndim = 4

    def __init__(self, T, pattern, call):
        self.shape = (1, 1, T, T)
        self.left, self.right, self.reason = pattern.left, pattern.right, pattern.reason
        self.call = call

    def __getattr__(self, name):
        _refuse()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        _refuse()


# Anything else that can be done to a tensor.
_BINARY = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift"
_NAMES = [f"{prefix}{name}" for name in _BINARY.split() for prefix in ("", "r", "i")]
_NAMES += "neg pos invert abs bool int float len iter getitem setitem contains eq ne lt le gt ge".split()
for _name in _NAMES:
    setattr(PackedMask, f"__{_name}__", _refuse)
PackedMask.__hash__ = object.__hash__  # setting __eq__ afterwards leaves it, this says so


class _Pattern(NamedTuple):
    """Keys that a query sees: from ``left`` before it to ``right`` after it, None for all, within its segment."""

    left: int | None = None
    right: int | None = None
    segments: torch.Tensor | None = None
    reason: str | None = None  # if it is not such a pattern


# What the factories of transformers make of their argument. Gemma 3 and Step 3.7 have one of their own.
_PATTERNS = {
    "causal_mask_function": lambda: _Pattern(right=0),
    "bidirectional_mask_function": lambda: _Pattern(),
    "sliding_window_overlay": lambda sliding_window: _Pattern(left=sliding_window - 1),  # which counts the token itself
    "sliding_window_bidirectional_overlay": lambda sliding_window: _Pattern(sliding_window, sliding_window),
    "_bidirectional_window_overlay": lambda sliding_window: _Pattern(sliding_window - 1, sliding_window - 1),
    "packed_sequence_mask_function": lambda packed_sequence_mask: _Pattern(segments=packed_sequence_mask),
}


def _pattern(function):
    """Returns the :class:`_Pattern` of a mask function of transformers, from the values that it holds."""
    if not isinstance(function, types.FunctionType):
        return _Pattern(reason=repr(function))
    held = dict(zip(function.__code__.co_freevars, (c.cell_contents for c in function.__closure__ or ()), strict=True))
    factory = function.__qualname__.partition(".")[0]
    if function.__module__.startswith("transformers."):
        if factory in _PATTERNS:
            return _PATTERNS[factory](**held)
        if factory == "and_masks":
            return functools.reduce(_both, map(_pattern, held["mask_functions"]))
        if factory == "or_masks":
            return functools.reduce(_either, map(_pattern, filter(_allows_some, held["mask_functions"])))
        if factory == "remap_positions_for_packed_sequence":
            return _pattern(held["mask_function"])  # positions go on by one within a segment, as tokens do
    if _allows_all(function):
        return _Pattern()
    return _Pattern(reason=factory if function.__module__ == "transformers.masking_utils" else function.__qualname__)


def _both(a, b):
    if a.segments is not None and b.segments is not None:
        return _Pattern(reason="two kinds of segments")
    return _Pattern(
        _least(a.left, b.left),
        _least(a.right, b.right),
        b.segments if a.segments is None else a.segments,
        a.reason or b.reason,
    )


def _either(a, b):
    """Both patterns hold the query itself, so that together they are one again."""
    reason = a.reason or b.reason
    if a.segments is not None or b.segments is not None:
        reason = reason or "segments in a union"
    left = None if None in (a.left, b.left) else max(a.left, b.left)
    right = None if None in (a.right, b.right) else max(a.right, b.right)
    return _Pattern(left, right, None, reason)


def _least(a, b):
    return min((x for x in (a, b) if x is not None), default=None)


def _allows_some(function):
    """Returns False for the mask of blocks (images, for example) of a row that has none; waits for the device."""
    if not function.__qualname__.startswith("blockwise_overlay."):
        return True
    held = dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))
    return bool((held["block_sequence_ids"].cell_contents >= 0).any())


def _allows_all(function):
    """Returns True for a function that is True without looking at its arguments."""
    try:
        return bool(function(None, None, None, None))
    except Exception:
        return False


def packed_mask(
    batch_size,
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    mask_function=None,
    attention_mask=None,
    local_size=None,
    use_vmap=False,
    config=None,
    **options,
):
    """The mask function of transformers' ``AttentionMaskInterface`` for our attention.

    Returns:
        A :class:`PackedMask` for a packed row. For any other call, the mask that transformers builds for ``sdpa``: a
        [B, 1, q, kv] bool tensor, or None.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    if isinstance(attention_mask, PackedMask):  # a model that hands the mask to the model inside
        return attention_mask
    mask_function = causal_mask_function if mask_function is None else mask_function
    row = batch_size == 1 and type(q_offset) is int and q_length == kv_length and q_offset == kv_offset == 0
    if torch.compiler.is_compiling():  # a mask function cannot be taken apart in a graph, but its description tells
        if row and attention_mask is None:
            pattern = _by_description(local_size, use_vmap, config, "allow_is_bidirectional_skip" in options)
            return PackedMask(q_length, pattern, None)
        call = None
    else:
        call = calls.current()
        if call is None and row and _pattern(mask_function).segments is not None:
            raise ValueError(
                f"attn_implementation={NAME!r} sees packed rows by a hook that is not there: call the model, not its "
                "forward, and set the name by from_pretrained or set_attn_implementation"
            )  # generate, too, makes masks before it calls the model, but none of packed rows
    if call is None or call.boundaries is None or not row or q_length != call.T:
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size,
            use_vmap=use_vmap, config=config, **options,
        )  # fmt: skip
    pattern = _pattern(mask_function)
    if attention_mask is not None and not call.masked and not bool(attention_mask.all()):
        pattern = pattern._replace(reason="padding that the model adds")
    if pattern.segments is not None and use_vmap and not _in_order(pattern.segments):  # perhaps the model's own
        pattern = pattern._replace(reason=pattern.reason or "segments that are not one after the other")
    return PackedMask(q_length, pattern, call)


def _in_order(segments):
    """Returns True if segment numbers do not decrease; waits for the device."""
    return bool((segments.diff() >= 0).all())


def _by_description(local_size, use_vmap, config, bidirectional):
    """Returns the :class:`_Pattern` of a row by the keywords that transformers passes beside the mask function."""
    reason = "a function that the model adds" if use_vmap else None
    if local_size is not None and local_size == getattr(config, "attention_chunk_size", None):
        reason = "chunked_overlay"
    if bidirectional:
        return _Pattern(local_size, local_size, reason=reason)
    return _Pattern(None if local_size is None else local_size - 1, 0, reason=reason)
