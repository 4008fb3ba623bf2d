"""``attn_implementation="sft_kernels"``: packed attention inside a Hugging Face model."""

from ..ops.packed_attention.api import packed_attention

NAME = "sft_kernels"

# What a model may ask of its attention that packed_attention does not compute: refused, never ignored.
_UNSUPPORTED = ("s_aux", "sinks", "position_bias")


def register():
    """Make the name known to transformers, for attention and for masks; calling it again changes nothing.

    Without the mask's registration transformers would hand every layer a mask of None and examples would see each
    other.
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
    **kwargs,
):
    """The attention of one layer over one packed row: (1, H, T, D) in, (1, T, H, D) out.

    The model must be called with ``cu_seq_lens_q``, the boundaries of the row's examples. ``sliding_window`` counts the
    token itself, as in transformers. A padding mask, dropout or attention sinks raise ``ValueError``.
    """
    if cu_seq_lens_q is None:
        raise ValueError(
            "cu_seq_lens_q: attn_implementation='sft_kernels' needs the packed examples' boundaries, "
            "which either the caller or the model's layers did not pass on"
        )
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
    out = packed_attention(
        *(t[0].transpose(0, 1) for t in (query, key, value)),
        cu_seq_lens_q,
        max_length_q,
        causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, -1),
        softcap=softcap,
    )
    return out[None], None
