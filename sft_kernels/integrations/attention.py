"""``attn_implementation="sft_kernels"``: packed attention inside a Hugging Face model."""

import os
import sys

import torch
import torch.nn.functional as F

from ..ops.packed_attention.api import packed_attention
from ..ops.packed_attention.tiles import AttentionTiles
from . import calls
from .masks import GIVEN, NAME, PackedMask, current_call, packed_mask
from .once import once_a_forward

OLDEST = (5, 17)  # of transformers: its mask functions are described by keywords that packed_mask reads

# Arguments of attention that packed_attention does not compute.
_UNSUPPORTED = ("s_aux", "sinks", "position_bias")


def too_old():
    """Returns None, or a message that says which version of transformers is wanted."""
    import transformers

    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= OLDEST:
        return None
    return (
        f"attn_implementation={NAME!r} needs transformers >= {'.'.join(map(str, OLDEST))}, "
        f"found {transformers.__version__}"
    )


def register():
    """Make the name known to transformers, for attention and for masks; calling it again changes nothing.

    Importing ``sft_kernels.integrations`` does so if transformers is installed.

    Raises:
        ImportError: transformers is too old; the message says which version is wanted.
    """
    if message := too_old():
        raise ImportError(message)
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, packed_mask)
    AttentionInterface.register(GIVEN, _attention_of_boundaries)
    calls.watch_models()


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
    """The attention of one layer: (B, H, T, D) in, (B, T, H, D) and None out.

    One row without cache and padding is computed by :func:`sft_kernels.packed_attention`. Its examples' boundaries are
    ``cu_seq_lens_q``, if the model is called with them. Otherwise an example begins wherever ``position_ids`` do not go
    on by one; they are found once a forward, and the host waits for the device. Under ``torch.compile``, which cannot
    wait, ``cu_seq_lens_q`` is required. Windows come from the mask, not from ``sliding_window``.

    Any other call (a cache, several rows, padding) goes to transformers' own ``sdpa``, or to the model's ``eager`` if
    the layer has a softcap or attention sinks. So does one example in a row with dropout or with arguments that packed
    attention does not support.

    Raises:
        ValueError: several packed examples with dropout, attention sinks or a position bias, with a mask that packed
            attention does not compute, or in more than one row; ``output_attentions=True``.
    """
    if kwargs.get("output_attentions"):
        calls.refuse_output_attentions()
    options = {"scaling": scaling, "dropout": dropout, "is_causal": is_causal, "softcap": softcap}
    stock = {**options, "sliding_window": sliding_window, "position_ids": position_ids, **kwargs}
    one_row = query.shape[0] == 1 and query.shape[2] == key.shape[2]
    described = isinstance(attention_mask, PackedMask)
    if not described and (attention_mask is not None or cu_seq_lens_q is None):
        if cu_seq_lens_q is not None:
            raise ValueError(
                f"cu_seq_lens_q: attn_implementation={NAME!r} takes one packed row, without cache (use_cache=False) "
                f"and without padding; got query {tuple(query.shape)} and key {tuple(key.shape)}"
            )
        if attention_mask is None:
            lost = one_row and _is_causal(module, is_causal)
        else:
            lost = current_call.masked or len(query) == 1
        if lost and current_call.restarts:
            raise ValueError(
                f"position_ids: attn_implementation={NAME!r} cannot keep packed examples apart by positions that "
                "restart beside padding or a mask of the model's; leave padding out and pass cu_seq_lens_q, or pass a "
                "4-D attention_mask"
            )
        return _stock(module, query, key, value, attention_mask, stock)
    if not one_row:
        raise ValueError(
            f"attn_implementation={NAME!r} takes one packed row and no cache (use_cache=False), "
            f"got query {tuple(query.shape)} and key {tuple(key.shape)}"
        )
    if cu_seq_lens_q is None:
        cu_seq_lens_q, max_length_q = _boundaries(attention_mask, position_ids, query.shape[2]), None
    if reason := _unsupported(attention_mask, dropout, kwargs):
        if described and _is_one_example(cu_seq_lens_q, query.shape[2]):
            return _stock(module, query, key, value, attention_mask.real(), stock)
        raise ValueError(reason)
    if described:
        left, right = attention_mask.left, attention_mask.right
    else:
        left = None if sliding_window is None else sliding_window - 1
        right = 0 if _is_causal(module, is_causal) else left
    if torch.compiler.is_compiling():
        max_length_q = None  # an int that changes would compile anew
    features = query.shape[-1], value.shape[-1]
    if features[1] < features[0]:  # latent attention: zeros beside V add nothing to the other columns
        value = F.pad(value, (0, features[0] - features[1]))
    out = packed_attention(
        *(t[0].transpose(0, 1) for t in (query, key, value)),
        cu_seq_lens_q,
        max_length_q,
        tiles=_tiles(cu_seq_lens_q, query.shape[2], query.device) if _takes_tiles(query.device) else None,
        causal=right == 0,
        scale=scaling,
        window_size=(-1 if left is None else left, -1 if right is None else right),
        softcap=softcap,
    )
    return out[None, ..., : features[1]], None


def _attention_of_boundaries(module, query, key, value, attention_mask, *, cu_seq_lens_q=None, **kwargs):
    """:func:`attention_forward` without a mask, whose windows are the layers' ``sliding_window``."""
    if cu_seq_lens_q is None:
        raise ValueError(f"cu_seq_lens_q: attn_implementation={GIVEN!r} needs them in each call")
    return attention_forward(module, query, key, value, attention_mask, cu_seq_lens_q=cu_seq_lens_q, **kwargs)


def _unsupported(mask, dropout, kwargs):
    """Returns None, or why packed attention cannot compute a layer."""
    if mask is not None and mask.reason:
        return f"attention_mask: attn_implementation={NAME!r} does not support a mask by {mask.reason}"
    if dropout:
        return f"dropout: attn_implementation={NAME!r} has none, the model asks for {dropout}"
    name = next((name for name in _UNSUPPORTED if kwargs.get(name) is not None), None)
    return name and f"{name}: attn_implementation={NAME!r} does not compute it"


def _is_one_example(cu_seqlens, T):
    return len(cu_seqlens) == 2 and not torch.compiler.is_compiling() and int(cu_seqlens[-1]) == T


def _is_causal(module, given):
    return getattr(module, "is_causal", True) if given is None else given


def _stock(module, query, key, value, mask, options):
    """The same layer by transformers' own attention. ``mask`` is None or [B, 1, q, kv], bool or additive."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if mask is not None and mask.dim() != 4:
        raise ValueError(f"attention_mask: expected 4 dimensions, got {mask.dim()}")
    if all(options.get(name) is None for name in ("softcap", "s_aux", "sinks")):
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise ValueError(f"{type(module).__name__} has a softcap or sinks, but no attention of its own for them")
    if mask is None and _is_causal(module, options["is_causal"]) and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    return eager(module, query, key, value, mask, **options)[0], None


def _boundaries(mask, position_ids, T):
    """``[B + 1]`` int32 of one row of ``T`` tokens, from transformers' segment numbers or from positions."""
    if torch.compiler.is_compiling():
        raise ValueError(
            f"cu_seq_lens_q: attn_implementation={NAME!r} needs the packed examples' boundaries under torch.compile, "
            "where position_ids do not do instead"
        )
    if mask.segments is not None:
        return _boundaries_of(mask.segments, 0)
    if position_ids is not None and position_ids.shape == (1, T):
        return _boundaries_of(position_ids)
    if mask.restarts:
        raise ValueError(
            f"cu_seq_lens_q: attn_implementation={NAME!r} needs the packed examples' boundaries; "
            "this model's layers do not receive position_ids of one row"
        )
    return mask.one_example()


@once_a_forward
def _boundaries_of(position_ids, step=1):
    """``[B + 1]`` int32: an example begins where the numbers [1, T] do not go on by ``step``."""
    position = position_ids[0]
    begins = torch.ones_like(position, dtype=torch.bool)
    begins[1:] = position[1:] != position[:-1] + step
    starts = begins.nonzero()[:, 0]
    return torch.nn.functional.pad(starts, (0, 1), value=len(position)).int()


def _takes_tiles(device):
    """Whether Triton will run, which takes tiles: the layers then share one list."""
    return device.type == "cuda" or os.environ.get("SFT_KERNELS_IMPL") == "triton"


@once_a_forward
def _tiles(cu_seqlens, T, device):
    return AttentionTiles.from_cu_seqlens(cu_seqlens, T, device=device)
