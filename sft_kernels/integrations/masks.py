"""The attention mask of ``attn_implementation="sft_kernels"``: a mark that only our attention reads.

transformers describes a mask as a function of positions before it builds one. A row that our attention computes gets a
:class:`PackedMask` instead of a tensor. A model that reads its mask itself meets an error, not a mask of None.
"""

import threading
from typing import NamedTuple

import torch

NAME = "sft_kernels"
GIVEN = f"{NAME}_boundaries_given"  # the same attention for a caller that always passes cu_seq_lens_q: no mask is made


class _Call(threading.local):
    """Facts of the model's call that is being computed."""

    restarts = False  # True if position_ids restart and the call has no cu_seq_lens_q
    masked = False  # True if the call has an attention_mask


current_call = _Call()


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
        causal: True if no token sees later ones.
        window: None, or the distance at which the last visible token stands: to the left, and without ``causal`` to
            the right too.
        segments: [1, T] segment numbers that transformers found in ``position_ids``, or None.
        reason: None, or what the mask says that packed attention does not compute.
        restarts: True if the model's call has position_ids that restart, and no cu_seq_lens_q.
        real: a function that builds transformers' own mask.
    """

    ndim = 4

    def __init__(self, T, causal, window, segments, reason, real):
        self.shape = (1, 1, T, T)
        self.causal = causal
        self.window = window
        self.segments = segments
        self.reason = reason
        self.real = real
        self._one_example = None
        self.restarts = not torch.compiler.is_compiling() and current_call.restarts

    def one_example(self):
        """Returns the boundaries [0, T] of a row that is one example."""
        if self._one_example is None:
            self._one_example = torch.tensor([0, self.shape[-1]], dtype=torch.int32)
        return self._one_example

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


class _Parts(NamedTuple):
    """The pieces that transformers combined into a mask function, by their names, with the values they hold."""

    held: dict
    unknown: tuple


# Factories of transformers.masking_utils whose masks packed attention computes, and what is read of each.
_KNOWN = {
    "causal_mask_function": (),
    "bidirectional_mask_function": (),
    "sliding_window_overlay": ("sliding_window",),
    "sliding_window_bidirectional_overlay": ("sliding_window",),
    "packed_sequence_mask_function": ("packed_sequence_mask",),
}
_COMBINE = {
    "and_masks": "mask_functions",
    "or_masks": "mask_functions",
    "remap_positions_for_packed_sequence": "mask_function",
}


def _parts(function):
    """Takes a mask function of transformers apart."""
    name = function.__qualname__.partition(".")[0]
    if function.__module__ != "transformers.masking_utils":
        return _Parts({}, (function.__qualname__,))
    held = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    if name in _COMBINE:
        inner = held[_COMBINE[name]].cell_contents
        inner = inner if isinstance(inner, tuple) else (inner,)
        if name == "or_masks":
            inner = [f for f in inner if not _allows_nothing(f)]
            if len(inner) > 1:
                return _Parts({}, (name,))
        found = [_parts(f) for f in inner]
        merged = {key: value for part in found for key, value in part.held.items()} | {name: []}
        return _Parts(merged, tuple(unknown for part in found for unknown in part.unknown))
    if name not in _KNOWN:
        return _Parts({}, (name,))
    return _Parts({name: [held[variable].cell_contents for variable in _KNOWN[name]]}, ())


def _allows_nothing(function):
    """Returns True for the mask of blocks (images, for example) of a row that has none; waits for the device."""
    if not function.__qualname__.startswith("blockwise_overlay."):
        return False
    held = dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))
    return not bool((held["block_sequence_ids"].cell_contents >= 0).any())


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
        A :class:`PackedMask` for one row without cache and padding. For any other call, the mask that transformers
        builds for ``sdpa``: a [B, 1, q, kv] bool tensor, or None.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    if isinstance(attention_mask, PackedMask):  # a model that hands the mask to the model inside
        return attention_mask
    mask_function = causal_mask_function if mask_function is None else mask_function
    described = {
        "batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset,
        "kv_offset": kv_offset, "mask_function": mask_function, "attention_mask": attention_mask,
        "local_size": local_size, "use_vmap": use_vmap, "config": config, **options,
    }  # fmt: skip
    one_row = batch_size == 1 and type(q_offset) is int and q_length == kv_length and q_offset == kv_offset == 0
    compiling = torch.compiler.is_compiling()
    if not one_row or (attention_mask is not None and (compiling or _is_padded(attention_mask, kv_length))):
        return sdpa_mask(**described)

    def real():
        return sdpa_mask(**{**described, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})

    if compiling:  # a mask function cannot be taken apart in a graph, but its description tells
        return _by_description(q_length, local_size, use_vmap, config, "allow_is_bidirectional_skip" in options, real)
    parts = _parts(mask_function)
    causal = "causal_mask_function" in parts.held
    (window,) = parts.held.get("sliding_window_overlay", [None])
    if window is not None:
        window -= 1  # transformers counts the token itself
    else:
        (window,) = parts.held.get("sliding_window_bidirectional_overlay", [None])
    (segments,) = parts.held.get("packed_sequence_mask_function", [None])
    unknown = list(parts.unknown)
    if "sliding_window_overlay" in parts.held and not causal:
        unknown.append("sliding_window_overlay without a causal mask")
    if segments is not None and "remap_positions_for_packed_sequence" not in parts.held:
        unknown.append("segment numbers of the model's own")  # which may come back to an earlier segment
    return PackedMask(q_length, causal, window, segments, ", ".join(unknown) or None, real)


def _is_padded(attention_mask, kv_length):
    """Returns True if the 2-D mask leaves a token out; waits for the device."""
    return attention_mask.shape[-1] != kv_length or not bool(attention_mask.all())


def _by_description(T, local_size, use_vmap, config, bidirectional, real):
    """The mask of a row by the keywords that transformers passes beside the mask function."""
    reason = "a function that the model adds" if use_vmap else None
    if local_size is not None and local_size == getattr(config, "attention_chunk_size", None):
        reason = "chunked_overlay"
    window = local_size if local_size is None or bidirectional else local_size - 1
    return PackedMask(T, not bidirectional, window, None, reason, real)
