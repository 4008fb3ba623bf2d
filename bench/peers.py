"""Ours and the others, one small adapter each.

Every adapter is ``load(device)``, which imports what it needs and returns the callable that its table says, or raises:
``ImportError`` where the peer is not installed, ``Absent`` where it cannot run here. The versions are those that
``bench/wheels.py`` pins; their real code is called by tests/bench/test_peers.py where it is installed. The adapters of
flash-attn 2 and 3, apex, bitsandbytes and torchao follow signatures as of 2026 that have been read, not run.
"""

import importlib.metadata
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import sft_kernels
from sft_kernels import _backend

from .timing import reason

LINEAR_LOSSES = {}  # name → load(device) → loss(hidden [N, D], weight [V, D], labels [N])
LOSSES = {}  # name → load(device) → Loss
OPTIMIZERS = {}  # name → load(device) → make(params, state_dtype, max_grad_norm) → step()
ATTENTIONS = {}  # name → load(device) → make(cu_seqlens, max_seqlen) → Attention
COMPILED = {"torch.compile", "FlexAttention"}
# Compile for half a minute and more before their first sample; our flash path may take flash-attn 4.
SLOW = COMPILED | {"QuACK", "flash-attn 4", "ours (flash)"}
DISTRIBUTIONS = {}  # name → the distribution whose version a row says; torch's own have none


class Absent(RuntimeError):
    """A peer that cannot run here, or cannot do what a cell asks; the message says why."""


class Loss(NamedTuple):
    loss: Callable[..., torch.Tensor]  # of logits [N, V] and labels [N]
    overwrites: bool = False  # leaves gradients where the logits were


def _as_given(*tensors):
    return tensors


class Attention(NamedTuple):
    """``pack(q, k, v)`` lays packed [T, H, D] tensors out as the peer wants them, which is not timed (a model would
    hold them so); ``unpack`` brings an output or gradient back to [T, H, D]. If it repeats key heads, so do the
    gradients."""

    attend: Callable[..., torch.Tensor]
    pack: Callable[..., Any] = _as_given
    unpack: Callable[[torch.Tensor], torch.Tensor] = lambda t: t
    backward: bool = True


def load(adapters, device):
    """``({name: what its adapter returns}, {name: why it is absent})``."""
    present, absent = {}, {}
    for name, adapter in adapters.items():
        try:
            present[name] = adapter(device)
        except (Absent, ImportError) as error:
            absent[name] = str(error).splitlines()[0]
        except Exception as error:  # libraries raise what they like where they do not fit the machine
            if name.startswith("ours"):
                raise
            absent[name] = reason(error)
    return present, absent


def version(name):
    """``"liger-kernel 0.8.5"`` for the row of that name, ``"torch 2.11.0"`` for torch's own; None where unknown."""
    if name.startswith("ours"):
        return None  # the results file has the commit
    distribution = DISTRIBUTIONS.get(name, "torch")
    try:
        return f"{distribution} {importlib.metadata.version(distribution).split('+')[0]}"
    except importlib.metadata.PackageNotFoundError:
        return None


def ours(op, adapt, device):
    """Adapters of every implementation of ``op`` (a name in ``_backend``): ``adapt(impl)`` makes one.

    What ``impl="auto"`` means on ``device`` is called "ours".
    """

    def adapter(impl):
        def load_implementation(device):
            try:
                _backend.resolve(op, impl, device)
            except _backend.Unavailable as error:
                raise Absent(str(error)) from error
            return adapt(impl)

        return load_implementation

    auto = _backend.resolve(op, device=device)
    named = {}
    for impl in _backend.implementations(op):
        try:
            default = _backend.resolve(op, impl, device) is auto
        except (_backend.Unavailable, ImportError):
            default = False
        named["ours" if default else f"ours ({impl})"] = adapter(impl)
    return dict(sorted(named.items()))  # "ours" first


def _peer(table, name, distribution=None):
    def register(adapter):
        table[name] = adapter
        if distribution is not None:
            DISTRIBUTIONS[name] = distribution
        return adapter

    return register


def _needs_cuda(device):
    if device.type != "cuda":
        raise Absent("runs on CUDA alone")


# Losses.


@_peer(LINEAR_LOSSES, "unfused")
def _(device):
    return lambda x, w, y: F.cross_entropy(F.linear(x, w), y)


@_peer(LINEAR_LOSSES, "torch chunked")
def _(device):
    if not hasattr(F, "linear_cross_entropy"):
        raise Absent(f"torch {torch.__version__} has no linear_cross_entropy; 2.13 has")
    options = torch.nn.LinearCrossEntropyOptions()  # without options torch makes all logits
    return lambda x, w, y: F.linear_cross_entropy(x, w, y, options=options)


@_peer(LINEAR_LOSSES, "torch.compile")
def _(device):
    # Also what torch.compile makes of F.linear_cross_entropy, whose chunked path it does not trace.
    return torch.compile(lambda x, w, y: F.cross_entropy(F.linear(x, w), y), dynamic=False)


@_peer(LINEAR_LOSSES, "Liger", "liger-kernel")
def _(device):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    _needs_cuda(device)
    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda x, w, y: loss(w, x, y)


@_peer(LINEAR_LOSSES, "cut-cross-entropy exact", "cut-cross-entropy")
def _(device):
    from cut_cross_entropy import linear_cross_entropy

    _needs_cuda(device)
    return lambda x, w, y: linear_cross_entropy(x, w, y, filter_eps=None)


@_peer(LINEAR_LOSSES, "cut-cross-entropy filtered", "cut-cross-entropy")
def _(device):
    from cut_cross_entropy import linear_cross_entropy

    _needs_cuda(device)
    return lambda x, w, y: linear_cross_entropy(x, w, y)


@_peer(LINEAR_LOSSES, "QuACK", "quack-kernels")
def _(device):
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    _needs_cuda(device)
    return chunked_linear_cross_entropy


@_peer(LINEAR_LOSSES, "TRL chunked logprob", "trl")
def _(device):
    import trl.trainer.utils  # noqa: F401, its backward imports it, with datasets, accelerate and pandas
    from trl.kernels import ChunkedLogProbFunction

    def loss(x, w, y):  # what SFTTrainer computes by default ("nll"), less the entropy and accuracy that it logs
        kept = y != -100
        temperature, columns, softcap, scale = 1.0, 32768, None, 1.0
        logprobs = ChunkedLogProbFunction.apply(x[kept], w, None, y[kept], temperature, columns, softcap, scale, ())[0]
        return -logprobs.sum() / kept.sum()

    return loss


@_peer(LOSSES, "F.cross_entropy")
def _(device):
    return Loss(F.cross_entropy)


@_peer(LOSSES, "torch.compile")
def _(device):
    return Loss(torch.compile(lambda x, y: F.cross_entropy(x, y), dynamic=False))


@_peer(LOSSES, "Liger", "liger-kernel")
def _(device):
    from liger_kernel.transformers import LigerCrossEntropyLoss

    _needs_cuda(device)
    return Loss(LigerCrossEntropyLoss(), overwrites=True)


@_peer(LOSSES, "QuACK", "quack-kernels")
def _(device):
    from quack.cross_entropy import cross_entropy

    _needs_cuda(device)

    return Loss(cross_entropy)


# Optimisers: β = (0.9, 0.95), ε = 1e-8, decay 0.1, and clip_grad_norm_ before the step where a norm is asked for.

LR = 1e-4
ADAMW = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def _clipped(step, params, max_grad_norm):
    if max_grad_norm is None:
        return step

    def clip_and_step():
        torch.nn.utils.clip_grad_norm_(params, max_grad_norm)
        step()

    return clip_and_step


def _needs_state(params, state_dtype, only):
    if state_dtype != only:
        raise Absent(f"its moments are {only} for {params[0].dtype} parameters, not {state_dtype}")


def _torch_adamw(**path):
    def load_torch(device):
        def make(params, state_dtype, max_grad_norm):
            _needs_state(params, state_dtype, params[0].dtype)
            return _clipped(torch.optim.AdamW(params, LR, **ADAMW, **path).step, params, max_grad_norm)

        return make

    return load_torch


OPTIMIZERS["torch fused"] = _torch_adamw(fused=True)
OPTIMIZERS["torch foreach"] = _torch_adamw(foreach=True)


@_peer(OPTIMIZERS, "apex", "apex")
def _(device):
    from apex.optimizers import FusedAdam

    _needs_cuda(device)

    def make(params, state_dtype, max_grad_norm):
        _needs_state(params, state_dtype, torch.float32)
        return _clipped(FusedAdam(params, LR, adam_w_mode=True, **ADAMW).step, params, max_grad_norm)

    return make


@_peer(OPTIMIZERS, "bitsandbytes", "bitsandbytes")
def _(device):
    from bitsandbytes.optim import AdamW32bit

    _needs_cuda(device)

    def make(params, state_dtype, max_grad_norm):
        _needs_state(params, state_dtype, torch.float32)
        return _clipped(AdamW32bit(params, LR, **ADAMW).step, params, max_grad_norm)

    return make


@_peer(OPTIMIZERS, "torchao", "torchao")
def _(device):
    from torchao.optim import _AdamW  # the one whose moments are not quantised

    _needs_cuda(device)

    def make(params, state_dtype, max_grad_norm):
        _needs_state(params, state_dtype, params[0].dtype)
        return _clipped(_AdamW(params, LR, **ADAMW).step, params, max_grad_norm)

    return make


# Attention, causal.


@_peer(ATTENTIONS, "padded SDPA")
def _(device):
    def make(cu_seqlens, max_seqlen):
        lengths = cu_seqlens.diff()
        inside = torch.arange(max_seqlen, device=device) < lengths[:, None]  # [B, max_seqlen]

        def pad(t):
            padded = t.new_zeros(*inside.shape, *t.shape[1:])
            padded[inside] = t.detach()
            return padded.transpose(1, 2).requires_grad_(t.requires_grad)  # [B, H, max_seqlen, D]

        def attend(q, k, v):  # padding stands on the right, where the causal mask hides it
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

        return Attention(attend, lambda *qkv: tuple(map(pad, qkv)), lambda t: t.transpose(1, 2)[inside])

    return make


VARLEN = "FlashAttention-2 (torch varlen)"
VARLEN_REPEATED = "FlashAttention-2 (torch varlen, key heads repeated)"


def _varlen(repeats):
    """``load`` of torch's own copy of FlashAttention-2. torch 2.12 has ``enable_gqa``. 2.11 has no such argument and no
    check: its kernels take fewer key heads, says their source. Only where they do not, heads are repeated, not timed.
    """

    def load_varlen(device):
        from torch.nn.attention.varlen import varlen_attn

        _needs_cuda(device)
        told = "enable_gqa" in inspect.signature(varlen_attn).parameters

        def make(cu_seqlens, max_seqlen):
            def attend(q, k, v):
                options = {"enable_gqa": True} if told and q.shape[1] != k.shape[1] else {}
                return varlen_attn(
                    q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(-1, 0), **options
                )

            def repeated(q, k, v):
                each = q.shape[1] // k.shape[1]
                k, v = (t.detach().repeat_interleave(each, 1).requires_grad_(t.requires_grad) for t in (k, v))
                return q, k, v

            return Attention(attend, repeated) if repeats else Attention(attend)

        if not repeats:
            return make
        if _is_right(load_varlen_as_given, device):
            raise Absent(f"not needed: {VARLEN} is right")
        return make

    return load_varlen


load_varlen_as_given = _varlen(repeats=False)
ATTENTIONS[VARLEN] = load_varlen_as_given
ATTENTIONS[VARLEN_REPEATED] = _varlen(repeats=True)


@cache
def _is_right(load_attention, device):
    from . import right  # which imports this module

    found = right.checked(right.attention_error, load_attention(device), device, torch.bfloat16)
    return found.get("error", float("inf")) <= 1


def _flash(import_function, **options):
    def load_flash(device):
        function = import_function()
        _needs_cuda(device)

        def make(cu_seqlens, max_seqlen):
            bounds = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
            bounds |= {"max_seqlen_q": max_seqlen, "max_seqlen_k": max_seqlen}

            def attend(q, k, v):
                out = function(q, k, v, causal=True, **bounds, **options)
                return out[0] if isinstance(out, tuple) else out

            return Attention(attend)

        return make

    return load_flash


def _flash_4():
    from flash_attn.cute import flash_attn_varlen_func

    return flash_attn_varlen_func


def _flash_3():
    from flash_attn_interface import flash_attn_varlen_func

    return flash_attn_varlen_func


def _flash_2():
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


_peer(ATTENTIONS, "flash-attn 4", "flash-attn-4")(_flash(_flash_4))
_peer(ATTENTIONS, "flash-attn 3", "flash-attn-3")(_flash(_flash_3))
_peer(ATTENTIONS, "flash-attn 2", "flash-attn")(_flash(_flash_2))
_peer(ATTENTIONS, "flash-attn 2 deterministic", "flash-attn")(_flash(_flash_2, deterministic=True))


@_peer(ATTENTIONS, "FlexAttention")
def _(device):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def make(cu_seqlens, max_seqlen):
        torch.compiler.reset()  # every mask compiles anew, and past a handful Dynamo would go on uncompiled, unsaid
        compiled = torch.compile(flex_attention, dynamic=False)
        T = int(cu_seqlens[-1])
        example = torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1, device=device), cu_seqlens.diff())

        def seen(b, h, i, j):
            return (example[i] == example[j]) & (j <= i)

        mask = create_block_mask(seen, None, None, T, T, device=device)  # once a batch, for every layer: not timed

        def pack(*qkv):
            return tuple(t.detach().transpose(0, 1)[None].requires_grad_(t.requires_grad and cuda) for t in qkv)

        def attend(q, k, v):
            return compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

        cuda = device.type == "cuda"  # on the CPU it has no backward, and refuses tensors that want one
        return Attention(attend, pack, lambda t: t[0].transpose(0, 1), backward=cuda)

    return make


# Ours.


def linear_losses(device):
    """Ours and the peers of ``linear_cross_entropy``."""

    def adapt(impl):
        return lambda x, w, y: sft_kernels.linear_cross_entropy(x, w, y, impl=impl)

    return ours("softmax_grad", adapt, device) | {"ours, KeptTokens": _counted} | LINEAR_LOSSES


def _counted(device):
    """Ours as a collator serves it: the kept tokens were counted on the host, so that nothing waits for the device."""

    def loss(x, w, kept):
        kept = kept if isinstance(kept, sft_kernels.KeptTokens) else count(kept)
        return sft_kernels.linear_cross_entropy(x, w, kept=kept)

    def count(y):
        return sft_kernels.KeptTokens.from_labels(y.cpu()).to(y.device)

    loss.count = count
    return loss


def losses(device):
    """Ours and the peers of ``cross_entropy``."""

    def adapt(impl):
        return Loss(lambda x, y: sft_kernels.cross_entropy(x, y, impl=impl))

    return ours("softmax_grad", adapt, device) | LOSSES


def optimizers(device):
    """Ours and the peers of ``AdamW``."""

    def adapt(impl):
        def make(params, state_dtype, max_grad_norm):
            state = {} if state_dtype == params[0].dtype else {"state_dtype": state_dtype}
            return sft_kernels.AdamW(params, LR, **ADAMW, max_grad_norm=max_grad_norm, impl=impl, **state).step

        return make

    return ours("adamw", adapt, device) | OPTIMIZERS


def attentions(device):
    """Ours and the peers of ``packed_attention``."""

    def adapt(impl):
        def make(cu_seqlens, max_seqlen):
            tiles = None
            if cu_seqlens.is_cuda:  # once a batch, for every layer: not timed
                tiles = sft_kernels.AttentionTiles.from_cu_seqlens(cu_seqlens, int(cu_seqlens[-1]))
            return Attention(
                lambda q, k, v: sft_kernels.packed_attention(
                    q, k, v, cu_seqlens, max_seqlen=max_seqlen, tiles=tiles, impl=impl
                )
            )

        return make

    return ours("packed_attention", adapt, device) | ATTENTIONS
