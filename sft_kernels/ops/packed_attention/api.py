"""``packed_attention``: attention over rows that hold many examples, each seeing itself alone."""

import torch

from ..._backend import resolve


def packed_attention(
    query,
    key,
    value,
    cu_seqlens,
    max_seqlen=None,
    *,
    causal=True,
    scale=None,
    window_size=(-1, -1),
    impl="auto",
):
    """Scaled dot-product attention within each segment ``[cu_seqlens[i], cu_seqlens[i + 1])`` of a packed row.

    ::

        out[i] = Σ_j softmax_j(scale · query[i] · key[j]) value[j],   j in the segment of i, within the window, j ≤ i if
        causal

    Args:
        query: ``[T, Hq, D]``, floating point.
        key, value: ``[T, Hkv, D]`` of the same dtype and device; Hq is a multiple of Hkv (GQA: query head h reads h //
            (Hq / Hkv)).
        cu_seqlens: ``[B + 1]`` integers, starting at 0 and never decreasing. Segments of length zero are allowed; rows
            from ``cu_seqlens[-1]`` on get zeros and zero gradients.
        max_seqlen: a bound on the segments' lengths.
        causal: whether a token sees only itself and what comes before.
        scale: of the scores; None means D^-½.
        window_size: ``(left, right)`` tokens seen on either side beside the token itself, -1 for no bound (flash-attn's
            convention); with ``causal`` nothing on the right is seen.
        impl: ``"auto"`` or an implementation's name.

    Returns:
        ``[T, Hq, D]`` in the dtype of ``query``; under autocast all three are cast first, as torch does for its own.

    Raises:
        ValueError, TypeError: an argument of a wrong shape, dtype or device, by name; boundaries that do not start at
            0, that decrease, pass T or are further apart than ``max_seqlen``.
    """
    implementation = resolve("packed_attention", impl)
    if query.dim() != 3:
        raise ValueError(f"query: expected shape [T, H, D], got {tuple(query.shape)}")
    if not query.is_floating_point():
        raise TypeError(f"query: expected floating point, got {query.dtype}")
    device = query.device.type
    if torch.is_autocast_enabled(device):
        cast = torch.get_autocast_dtype(device)
        query, key, value = (t if t.dtype == torch.float64 else t.to(cast) for t in (query, key, value))
    T, Hq, D = query.shape
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dim() != 3 or tensor.shape[0] != T or tensor.shape[2] != D or tensor.shape[1] != key.shape[1]:
            raise ValueError(
                f"{name}: expected shape [{T}, Hkv, {D}] as query, one for key and value, got {tuple(tensor.shape)}"
            )
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}: expected {query.dtype} as query, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name}: expected device {query.device} as query, got {tensor.device}")
    if key.shape[1] == 0 or Hq % key.shape[1]:
        raise ValueError(f"query: expected a multiple of the {key.shape[1]} key heads, got {Hq} heads")
    if len(window_size) != 2 or any(not isinstance(size, int) or size < -1 for size in window_size):
        raise ValueError(f"window_size: expected (left, right), each -1 or more, got {window_size!r}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(f"cu_seqlens: expected shape [B + 1], got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected int32 or int64, got {cu_seqlens.dtype}")
    return implementation(
        query, key, value, cu_seqlens, max_seqlen, causal=causal, scale=scale, window_size=window_size
    )
