"""``attn_implementation="sft_kernels"``: packed attention inside a Hugging Face model."""

import os
import weakref

import torch

from ..ops.packed_attention.api import packed_attention
from ..ops.packed_attention.tiles import AttentionTiles

NAME = "sft_kernels"

# What a model may ask of its attention that packed_attention does not compute: refused, never ignored.
_UNSUPPORTED = ("s_aux", "sinks", "position_bias")


def register():
    """Make the name known to transformers, for attention and for masks; calling it again changes nothing.

    Importing ``sft_kernels.integrations`` does so where transformers is installed. Without the mask's registration
    transformers would hand every layer a mask of None and examples would see each other.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, flash_attention_mask)


def attention_forward(
    module,
    query,
    key,
    value,
    attention_mask,
    *,
    scaling=None,
    dropout=0.0,
    is_causal=None,
    sliding_window=None,
    softcap=None,
    cu_seq_lens_q=None,
    max_length_q=None,
    position_ids=None,
    **kwargs,
):
    """The attention of one layer over one packed row: (1, H, T, D) in, (1, T, H, D) out.

    The boundaries of the row's examples are ``cu_seq_lens_q``, which the model is called with. Without them an example
    begins wherever ``position_ids`` do not go on by one: found once a forward, for which the host waits for the device.
    Under ``torch.compile``, where it cannot, ``cu_seq_lens_q`` is required. ``sliding_window`` counts the token itself,
    as in transformers. A padding mask, dropout or attention sinks raise ``ValueError``.
    """
    if attention_mask is not None:
        raise ValueError("attention_mask: attn_implementation='sft_kernels' takes packed rows without padding masks")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            "attn_implementation='sft_kernels' takes one packed row and no cache (use_cache=False), "
            f"got query {tuple(query.shape)} and key {tuple(key.shape)}"
        )
    if dropout:
        raise ValueError(f"dropout: attn_implementation='sft_kernels' has none, the model asks for {dropout}")
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: attn_implementation='sft_kernels' does not compute it")
    if cu_seq_lens_q is None:
        cu_seq_lens_q, max_length_q = _boundaries(position_ids, query.shape[2]), None
    out = packed_attention(
        *(t[0].transpose(0, 1) for t in (query, key, value)),
        cu_seq_lens_q,
        max_length_q,
        tiles=_tiles(cu_seq_lens_q, query.shape[2], query.device) if _takes_tiles(query.device) else None,
        causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, -1),
        softcap=softcap,
    )
    return out[None], None


def once_a_forward(function):
    """``function(tensor, *rest)``, which is asked for again only where ``tensor`` is another object or was written to.

    The layers of a model are handed the same tensor. Only the last answer is kept, and no longer than its tensor lives.
    Nothing is kept or reused while a graph is traced or captured, wherever ``tensor`` lies: a replay must find its
    answer anew, in memory of its own. Nor is the answer for an inference tensor kept, which does not say whether it was
    written to.
    """
    last = None  # what was asked (the tensor as a weak reference), and the answer

    def wrapper(tensor, *rest):
        nonlocal last
        if torch.compiler.is_compiling() or tensor.is_inference() or _capturing():
            return function(tensor, *rest)
        known = last
        asked = (tensor._version, *rest)
        if known is None or known[0]() is not tensor or known[1] != asked:
            last = known = (weakref.ref(tensor, forget), asked, function(tensor, *rest))
        return known[2]

    def forget(reference):
        nonlocal last
        if last is not None and last[0] is reference:
            last = None

    return wrapper


def _capturing():
    """Returns True while the current stream is captured into a CUDA graph."""
    try:
        return torch.cuda.is_current_stream_capturing()
    except RuntimeError:  # a torch without CUDA cannot be asked
        return False


def _boundaries(position_ids, T):
    if position_ids is None or torch.compiler.is_compiling():
        raise ValueError(
            "cu_seq_lens_q: attn_implementation='sft_kernels' needs the packed examples' boundaries, which either the "
            "caller or the model's layers did not pass on; under torch.compile position_ids do not do instead"
        )
    if position_ids.shape != (1, T):
        raise ValueError(
            f"position_ids: expected shape [1, {T}] of one packed row, got {tuple(position_ids.shape)}; "
            "the boundaries can be passed as cu_seq_lens_q"
        )
    return _boundaries_of(position_ids)


@once_a_forward
def _boundaries_of(position_ids):
    """``[B + 1]`` int32: an example begins where the positions [1, T] do not go on by one."""
    position = position_ids[0]
    begins = torch.ones_like(position, dtype=torch.bool)
    begins[1:] = position[1:] != position[:-1] + 1
    starts = begins.nonzero()[:, 0]
    return torch.nn.functional.pad(starts, (0, 1), value=len(position)).int()


def _takes_tiles(device):
    """Whether Triton will run, which takes tiles: the layers then share one list."""
    return device.type == "cuda" or os.environ.get("SFT_KERNELS_IMPL") == "triton"


@once_a_forward
def _tiles(cu_seqlens, T, device):
    return AttentionTiles.from_cu_seqlens(cu_seqlens, T, device=device)
