"""``attn_implementation="sft_kernels"``: packed attention inside a Hugging Face model."""

import os
import re
import sys
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F

from ..ops.packed_attention.api import packed_attention
from ..ops.packed_attention.tiles import AttentionTiles
from . import calls
from .calls import GIVEN, NAME
from .masks import PackedMask, packed_mask

OLDEST = (5, 17)  # of transformers: its mask functions are described by keywords that packed_mask reads

# Arguments of attention that packed_attention does not compute, and those that transformers' own ignores, too.
_UNSUPPORTED = ("s_aux", "sinks", "position_bias")
_SPARSE = ("indices", "block_indices")


def wanted():
    """Returns None, or a message that says which version of transformers is wanted."""
    try:
        found = version("transformers")
    except PackageNotFoundError:
        found = "none"
    numbers = tuple(int(part) for part in re.match(r"(\d+)?(?:\.(\d+))?", found).groups(default="0"))
    if numbers >= OLDEST:
        return None
    return f"attn_implementation={NAME!r} needs transformers >= {'.'.join(map(str, OLDEST))}, found {found}"


def register():
    """Make the name known to transformers, for attention and for masks; calling it again changes nothing.

    Importing ``sft_kernels.integrations`` does so if transformers is installed.

    Raises:
        ImportError: transformers is missing or too old; the message says which version is wanted.
    """
    if message := wanted():
        raise ImportError(message)
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionInterface.register(GIVEN, attention_forward)
    AttentionMaskInterface.register(NAME, packed_mask)
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
    **kwargs,
):
    """The attention of one layer: (B, H, T, D) in, (B, T, H, D) and None out.

    A packed row is computed by :func:`sft_kernels.packed_attention`. Its examples' boundaries are the ``cu_seq_lens_q``
    that the model is called with. Without them an example begins wherever the ``position_ids`` of the model's call do
    not go on by one; they are found once a call, and the host waits for the device. Inside a graph of
    ``torch.compile``, which cannot wait, ``cu_seq_lens_q`` is required. Windows come from the mask, not from
    ``sliding_window``.

    Any other call (one example without boundaries, a cache, several rows, padding) goes to transformers' own ``sdpa``,
    or to the model's ``eager`` if the layer has a softcap or attention sinks.

    Raises:
        ValueError: a packed row with dropout, attention sinks or a position bias, with a mask that packed attention
            does not compute, or one whose mask does not come from transformers' mask functions; a layer that chooses
            its keys (sparse attention).
    """
    if sparse := next((name for name in _SPARSE if kwargs.get(name) is not None), None):
        raise ValueError(f"{sparse}: attn_implementation={NAME!r} does not support sparse attention; use 'eager'")
    if isinstance(attention_mask, PackedMask):
        call = attention_mask.call
    else:
        call = calls.current()
        if not _is_packed(module, query, key, attention_mask, is_causal, cu_seq_lens_q, call):
            options = {"scaling": scaling, "dropout": dropout, "is_causal": is_causal, "softcap": softcap, **kwargs}
            return _stock(module, query, key, value, attention_mask, {**options, "sliding_window": sliding_window})
    if isinstance(attention_mask, PackedMask):
        left, right = attention_mask.left, attention_mask.right
    else:
        left = None if sliding_window is None else sliding_window - 1
        right = 0 if _is_causal(module, is_causal) else left
    if call is not None and (cu_seq_lens_q is None or isinstance(attention_mask, PackedMask)):
        cu_seq_lens_q, max_length_q = call.boundaries, call.max_length
    if cu_seq_lens_q is None:
        raise ValueError(f"cu_seq_lens_q: {calls.COMPILED}")
    _refuse_unsupported(attention_mask, dropout, kwargs)
    if torch.compiler.is_compiling():
        max_length_q = None  # an int that changes would compile anew
    features = query.shape[-1], value.shape[-1]
    if features[1] < features[0]:  # latent attention: zeros beside V add nothing to the other columns
        value = F.pad(value, (0, features[0] - features[1]))
    out = packed_attention(
        *(t[0].transpose(0, 1) for t in (query, key, value)),
        cu_seq_lens_q,
        max_length_q,
        tiles=_tiles(call, cu_seq_lens_q, query) if _takes_tiles(query.device) else None,
        causal=right == 0,
        scale=scaling,
        window_size=(-1 if left is None else left, -1 if right is None else right),
        softcap=softcap,
    )
    return out[None, ..., : features[1]], None


def _is_packed(module, query, key, mask, is_causal, cu_seqlens, call):
    """Returns True if a layer without a :class:`PackedMask` is packed, False if transformers' own attention serves.

    The former are layers of a vision tower, which has boundaries of its own, and all layers under :data:`GIVEN`.
    """
    row = query.shape[0] == 1 and query.shape[2] == key.shape[2]
    given = getattr(getattr(module, "config", None), "_attn_implementation", None) == GIVEN
    if row and mask is None and (cu_seqlens is not None or (given and call is not None)):
        return True
    if torch.compiler.is_compiling() or call is None:
        lost = cu_seqlens is not None
    else:
        lost = call.boundaries is not None and row and (_is_causal(module, is_causal) or query.shape[2] == call.T)
    if lost or given:
        raise ValueError(
            f"attention_mask: attn_implementation={NAME!r} takes packed rows whose mask transformers' mask functions "
            f"make; this model made its own, for query {tuple(query.shape)} and key {tuple(key.shape)}"
        )
    return False


def _refuse_unsupported(mask, dropout, kwargs):
    if mask is not None and mask.reason:
        raise ValueError(f"attention_mask: attn_implementation={NAME!r} does not support a mask by {mask.reason}")
    if dropout:
        raise ValueError(f"dropout: attn_implementation={NAME!r} has none, the model asks for {dropout}")
    if name := next((name for name in _UNSUPPORTED if kwargs.get(name) is not None), None):
        raise ValueError(f"{name}: attn_implementation={NAME!r} does not compute it")


def _is_causal(module, given):
    return getattr(module, "is_causal", True) if given is None else given


def _stock(module, query, key, value, mask, options):
    """The same layer by transformers' own attention. ``mask`` is None or [B, 1, q, kv], bool or additive."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if mask is not None and mask.dim() != 4:
        raise ValueError(f"attention_mask: expected 4 dimensions, got {mask.dim()}")
    if all(options.get(name) is None for name in ("softcap", "s_aux", "sinks")):
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    files = (sys.modules[c.__module__] for c in type(module).__mro__)
    eager = next((file.eager_attention_forward for file in files if hasattr(file, "eager_attention_forward")), None)
    if eager is None:
        raise ValueError(f"{type(module).__name__} has a softcap or sinks, but no attention of its own for them")
    if mask is None and _is_causal(module, options["is_causal"]) and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    return eager(module, query, key, value, mask, **options)[0], None


def _takes_tiles(device):
    """Returns True if Triton will run, which takes tiles: the layers then share one list."""
    return device.type == "cuda" or os.environ.get("SFT_KERNELS_IMPL") == "triton"


def _tiles(call, cu_seqlens, query):
    if call is not None and call.boundaries is cu_seqlens:
        return call.tiles(query.device)
    return AttentionTiles.from_cu_seqlens(cu_seqlens, query.shape[2], device=query.device)
