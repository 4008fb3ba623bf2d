"""``packed_attention``: attention over rows that hold many examples, each seeing itself alone."""

import contextlib
import math
import numbers
import operator

import torch

from ..._backend import Unavailable, checks_enabled, instead, named, resolve
from ..._checks import check_floating, check_tensor
from ..._plain import autocast_on, mode_of_fakes, untransformed, values_of, why_plain
from .segments import segment_lengths
from .tiles import AttentionTiles, check_boundaries


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
    softcap=None,
    tiles=None,
    return_lse=False,
    impl="auto",
):
    """Scaled dot-product attention within each segment ``[cu_seqlens[i], cu_seqlens[i + 1])`` of a packed row.

    ::

        z[i, j] = scale · query[i] · key[j]           a = softcap · tanh(z / softcap), or z without a softcap
        lse[i]  = log Σ_j exp a[i, j]                 j in the segment of i, within the window, j ≤ i if causal
        out[i]  = Σ_j exp(a[i, j] − lse[i]) value[j]

    Args:
        query: ``[T, Hq, D]``, fp16, bf16, fp32 or fp64. Like all other tensors it is neither sparse nor nested.
        key, value: ``[T, Hkv, D]`` of the same dtype and device; Hq is a multiple of Hkv (GQA: query head h reads h //
            (Hq / Hkv)).
        cu_seqlens: ``[B + 1]`` integers on the CPU or the device of ``query``, starting at 0 and never decreasing.
            Segments of length zero are allowed; rows from ``cu_seqlens[-1]`` on get zeros and zero gradients.
        max_seqlen: a bound on the segments' lengths. Without it ``impl="flash"`` reads it on the host, a sync a call.
        causal: whether a token sees only itself and what comes before.
        scale: of the scores; None means D^-½.
        window_size: ``(left, right)`` tokens seen on either side beside the token itself, -1 for no bound (flash-attn's
            convention); with ``causal`` nothing on the right is seen.
        softcap: positive bound of the scores, or None; flash-attn's 0.0 for none is refused.
        tiles: :class:`AttentionTiles` of ``cu_seqlens`` and T, on the device of ``query``, as a batch's layers share
            them; None builds them anew. Of use to ``impl="triton"``: the others go by ``cu_seqlens``.
        return_lse: whether to return the logsumexp too. It carries no gradient.
        impl: ``"auto"``, which is Triton on a GPU for what that carries (D to 256, in fp32 to 128; no fp64) and else
            torch, or an implementation's name. ``"flash"`` takes fp16 and bf16 on an NVIDIA GPU. Its gradients need not
            repeat to the bit but under ``torch.use_deterministic_algorithms``; those of the others always do.

    Under ``torch.func`` and ``vmap``, with forward-mode derivatives, on meta and fake tensors and in ``torch.export``
    this is plain torch. Where nothing may read ``cu_seqlens`` (a batch of them, meta, fake) scores are formed for the
    whole row, T² of them, and a NaN in one segment reaches the others.

    Returns:
        ``[T, Hq, D]`` in the dtype of ``query``; under autocast all three are cast first, as torch does for its own.
        With ``return_lse`` also ``[Hq, T]`` in fp32 (fp64 for fp64), −∞ in rows from ``cu_seqlens[-1]`` on.

    Raises:
        ValueError, TypeError: an argument of a wrong shape, dtype, device or range, by name; boundaries that do not
            start at 0, that decrease, pass T or are further apart than ``max_seqlen``; tiles of other boundaries. On a
            GPU ``impl="triton"`` reads boundaries only under ``SFT_KERNELS_CHECK=1``, ``impl="flash"`` also without
            ``max_seqlen``.
        RuntimeError: a named implementation cannot run here, with what it lacks.
    """
    _check_tensors(query, key, value, cu_seqlens)
    plain = why_plain(query, key, value, cu_seqlens)
    if plain:
        name, source = named("packed_attention", impl)
        if name == "flash":
            raise Unavailable(f"{source}='flash' does not support {plain}; {instead(source)}")
    implementation = resolve("packed_attention", impl, query.device, plain or _needs_torch(query))
    if max_seqlen is not None:
        max_seqlen = _checked_length(max_seqlen)
    if scale is not None and not (isinstance(scale, numbers.Real) and math.isfinite(scale)):
        raise ValueError(f"scale: expected a finite number or None, got {scale}")
    if softcap is not None and not isinstance(softcap, numbers.Real):
        raise TypeError(f"softcap: expected a number or None, got {type(softcap).__name__}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap: expected a positive number or None, got {softcap}")
    window = isinstance(window_size, tuple | list) and len(window_size) == 2
    if not window or any(not isinstance(size, int) or size < -1 for size in window_size):
        raise ValueError(f"window_size: expected (left, right), each -1 or more, got {window_size!r}")
    # Where reading them costs nothing or is asked for, else left to the implementation.
    lengths = segment_lengths(cu_seqlens, len(query), max_seqlen) if checks_enabled(cu_seqlens.device) else None
    if tiles is not None:
        _check_tiles(tiles, query, cu_seqlens)
    if causal:
        window_size = (window_size[0], 0)
    plainly = contextlib.nullcontext()
    if autocast_on(query.device):
        device = query.device.type
        cast = torch.get_autocast_dtype(device)
        query, key, value = (t if t.dtype == torch.float64 else t.to(cast) for t in (query, key, value))
        plainly = torch.autocast(device, enabled=False)
    if scale is not None and scale <= 0:  # torch scales its mask of −∞, flash-attn takes the maximum before the scale
        query, scale = (-query, -scale) if scale < 0 else (0 * query, 1.0)
    with mode_of_fakes(plain, query), plainly:
        out, lse = implementation(
            query,
            key,
            value,
            cu_seqlens,
            max_seqlen,
            lengths,
            tiles=tiles,
            scale=scale,
            window_size=tuple(window_size),
            softcap=softcap,
            return_lse=return_lse,
        )
    return (out, lse.detach()) if return_lse else out


def _needs_torch(query):
    """Returns what our own kernels do not support of a call with ``query``, or None if they support all of it."""
    if query.dtype == torch.float64:
        return "float64 tensors"
    if query.shape[2] > (128 if query.dtype == torch.float32 and not autocast_on(query.device) else 256):
        return "head dimensions above 256 (in float32 above 128)"
    if not query.is_cuda:
        return None
    reason = _too_old(query.device)
    if reason is None and query.shape[2] > 128:
        reason = _too_small_for_wide_heads(query.device)
    return reason


def _too_old(device):
    gpu = torch.cuda.get_device_properties(device)
    return f"GPUs of compute capability {gpu.major}.{gpu.minor}" if gpu.major < 8 else None


def _too_small_for_wide_heads(device):
    gpu = torch.cuda.get_device_properties(device)
    return f"head dimensions above 128 on {gpu.name}" if gpu.shared_memory_per_block_optin < 163 << 10 else None


# A compiler need not look inside; see _backend.py. It hands a constant function no sizes, which may be symbolic.
_too_old._dynamo_marked_constant = _too_small_for_wide_heads._dynamo_marked_constant = True


def _check_tiles(tiles, query, cu_seqlens):
    if not isinstance(tiles, AttentionTiles):
        raise TypeError(f"tiles: expected AttentionTiles or None, got {type(tiles).__name__}")
    if tiles.total_tokens != len(query):
        raise ValueError(f"tiles: expected those of {len(query)} tokens as query, got those of {tiles.total_tokens}")
    lists = tiles.lists
    check_tensor("tiles", lists)
    if lists.dtype != torch.int32:
        raise TypeError(f"tiles: expected int32, got {lists.dtype}")
    if lists.dim() != 3 or (lists.shape[0], lists.shape[2]) != (2, 3) or not lists.is_contiguous():
        raise ValueError(f"tiles: expected contiguous lists of shape [2, n, 3], got {tuple(lists.shape)}")
    if lists.device != query.device:
        raise ValueError(f"tiles: expected device {query.device} as query, got {lists.device}")
    if checks_enabled(cu_seqlens.device) and checks_enabled(query.device):
        _check_lists(tiles, cu_seqlens)


def _check_lists(tiles, cu_seqlens):
    """Raise for lists of other boundaries, as far as both may be read."""
    (bounds, one_each), (lists, batched) = values_of(cu_seqlens), values_of(tiles.lists)
    if bounds is None or lists is None:
        return
    with untransformed():
        bounds = bounds.reshape(-1, bounds.shape[-1])
        lists = lists.reshape(-1, *lists.shape[-3:])
        if one_each and batched and len(bounds) != len(lists):  # by several vmaps
            return
        for i in range(max(len(bounds), len(lists))):
            of, given = bounds[i if one_each else 0], lists[i if batched else 0]
            same = AttentionTiles.from_cu_seqlens(of, tiles.total_tokens, device=given.device, block=tiles.block)
            if not torch.equal(same.lists, given):
                raise ValueError("tiles: expected those of cu_seqlens, got those of other boundaries")


def _check_tensors(query, key, value, cu_seqlens):
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_floating(name, tensor)
    if query.dim() != 3 or query.shape[2] == 0:
        raise ValueError(f"query: expected shape [T, H, D], got {tuple(query.shape)}")
    T, Hq, D = query.shape
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dim() != 3 or tensor.shape[0] != T or tensor.shape[2] != D or tensor.shape[1] != key.shape[1]:
            raise ValueError(
                f"{name}: expected shape [{T}, Hkv, {D}] as query, one for key and value, got {tuple(tensor.shape)}"
            )
        # Under autocast only fp64 is not cast, so it goes with itself alone.
        if tensor.dtype != query.dtype and (
            torch.float64 in (query.dtype, tensor.dtype) or not autocast_on(query.device)
        ):
            raise TypeError(f"{name}: expected {query.dtype} as query, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name}: expected device {query.device} as query, got {tensor.device}")
    if key.shape[1] == 0 or Hq % key.shape[1]:
        raise ValueError(f"query: expected a multiple of the {key.shape[1]} key heads, got {Hq} heads")
    check_boundaries(cu_seqlens)
    if cu_seqlens.device != query.device and cu_seqlens.device.type != "cpu":
        raise ValueError(f"cu_seqlens: expected device cpu or {query.device} as query, got {cu_seqlens.device}")


def _checked_length(max_seqlen):
    try:
        length = operator.index(max_seqlen)
    except TypeError as error:
        raise TypeError(f"max_seqlen: expected an integer or None, got {max_seqlen!r}") from error
    if length < 0:
        raise ValueError(f"max_seqlen: expected at least 0, got {length}")
    return length
