"""Stand-ins for the libraries of ``examples/migration.md``: their signatures over plain PyTorch.

Each names the file and function that it was read from. They are right for batches that keep at
least one token. They do not copy what the libraries do without one, nor their mistakes. The
signatures of FlashAttention are those of ``tests/ops/flash_signatures.py``.
"""

import inspect
from itertools import pairwise
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..ops import flash_signatures


def _shape(logits, scale=None, softcap=None):
    logits = logits * (scale or 1)
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _shifted(labels, by, ignore_index=-100):
    moved = torch.full_like(labels, ignore_index)
    moved[..., : labels.shape[-1] - by] = labels[..., by:]
    return moved


def _losses(logits, labels, **options):
    """Returns the loss of each token, in the shape of ``labels``."""
    flat = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none", **options)
    return flat.view(labels.shape)


# liger-kernel 0.8.5


class CrossEntropyOutput(NamedTuple):
    """liger_kernel/transformers/functional.py, CrossEntropyOutput."""

    loss: torch.Tensor
    z_loss: torch.Tensor | None = None
    token_accuracy: torch.Tensor | None = None
    predicted_tokens: torch.Tensor | None = None


def _liger(logits, target, ce_weight, a):
    """liger_kernel/ops/cross_entropy.py, liger_cross_entropy_kernel: the z-loss has no class
    weight, and the number of kept tokens for its divisor."""
    u = _shape(logits, softcap=a.softcap)
    kept = target != a.ignore_index
    options = {"ignore_index": a.ignore_index, "label_smoothing": a.label_smoothing}
    losses = F.cross_entropy(u, target, ce_weight, reduction="none", **options)
    penalty = a.lse_square_scale * u.logsumexp(1).square() * kept
    if getattr(a, "use_token_scaling", False):  # liger_kernel/ops/fused_linear_cross_entropy.py
        losses = losses * u.detach().softmax(1).gather(1, target.clamp(min=0)[:, None])[:, 0]
    predicted = u.argmax(1)
    if a.reduction == "none":
        loss = losses + penalty
    else:
        penalty = penalty.sum()
        loss = losses.sum() + penalty
        if a.reduction == "mean":
            penalty = penalty / kept.sum()
            divisor = kept.sum() if ce_weight is None else ce_weight[target[kept]].sum()
            loss = losses.sum() / divisor + penalty
    if not (a.return_z_loss or a.return_token_accuracy or a.return_predicted_tokens):
        return loss
    accuracy = (predicted == target)[kept].to(u.dtype).mean()
    return CrossEntropyOutput(loss, penalty, accuracy, predicted.where(kept, -1))


class LigerFusedLinearCrossEntropyLoss:
    """liger_kernel/transformers/fused_linear_cross_entropy.py."""

    def __init__(
        self, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
        reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None,
        use_token_scaling=False, return_token_accuracy=False, return_predicted_tokens=False,
    ):  # fmt: skip
        self.a = SimpleNamespace(**locals())

    def forward(self, lin_weight, _input, target, bias=None):
        assert _input.dim() == 2
        return _liger(F.linear(_input, lin_weight, bias), target, self.a.ce_weight, self.a)

    __call__ = forward


class LigerCrossEntropyLoss:
    """liger_kernel/transformers/cross_entropy.py."""

    def __init__(
        self, weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
        reduction="mean", softcap=None, return_z_loss=False, return_token_accuracy=False,
        return_predicted_tokens=False,
    ):  # fmt: skip
        self.a = SimpleNamespace(**locals())

    def forward(self, _input, target):
        return _liger(_input, target, self.a.weight, self.a)

    __call__ = forward


def liger_fused_linear_cross_entropy(
    input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0,
    label_smoothing=0.0, reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None,
    use_token_scaling=False, return_token_accuracy=False, return_predicted_tokens=False,
    chunk_mem_const=1,
):  # fmt: skip
    """liger_kernel/transformers/functional.py."""
    a = SimpleNamespace(**locals())
    return _liger(F.linear(input, weight, bias), target, ce_weight, a)


def LigerForCausalLMLoss(
    hidden_states, lm_head_weight, labels, hidden_size, num_items_in_batch=None, ignore_index=-100,
    shift_labels=None, final_logit_softcapping=None, return_token_accuracy=False,
    return_predicted_tokens=False, **kwargs,
):  # fmt: skip
    """liger_kernel/transformers/model/loss_utils.py: the sum over the given number, or the mean."""
    if shift_labels is None:
        shift_labels = _shifted(labels, 1, ignore_index)
    loss = liger_fused_linear_cross_entropy(
        hidden_states.view(-1, hidden_size), lm_head_weight, shift_labels.view(-1),
        ignore_index=ignore_index, reduction="mean" if num_items_in_batch is None else "sum",
        softcap=final_logit_softcapping,
    )  # fmt: skip
    return loss if num_items_in_batch is None else loss / num_items_in_batch


# cut-cross-entropy, github.com/apple/ml-cross-entropy at d42911f


class VocabParallelOptions(NamedTuple):
    """cut_cross_entropy/vocab_parallel/utils.py; of the one rank that a test has."""

    start: int
    stop: int
    group: object = None
    reduce_e_grad: bool = True

    @classmethod
    def from_vocab(cls, vocab_size, group=None, reduce_e_grad=True):
        return cls(0, vocab_size, group, reduce_e_grad)


def cce_linear_cross_entropy(
    e, c, targets, bias=None, ignore_index=-100, softcap=None, reduction="mean", shift=0,
    return_lse=False, filter_eps="auto", accum_e_fp32=False, accum_c_fp32=False, filter_e_grad=True,
    filter_c_grad=True, impl="cce", vocab_parallel_options=None,
):  # fmt: skip
    """cut_cross_entropy/linear_cross_entropy.py and cce.py, without the filter of gradients."""
    assert impl in ("cce", "cce_exact", "torch_compile")
    u = _shape(F.linear(e, c, bias), softcap=softcap)
    labels = _shifted(targets, int(shift), ignore_index)
    losses, kept = _losses(u, labels, ignore_index=ignore_index), labels != ignore_index
    end = targets.shape[-1] - int(shift)
    total = losses.sum()
    loss = {"mean": total / kept.sum(), "sum": total, "none": losses[..., :end]}[reduction]
    return (loss, (u.logsumexp(-1) * kept)[..., :end]) if return_lse else loss


def cce_25_1_1(
    e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False,
    filter_eps="high", impl="cce",
):  # fmt: skip
    """cut-cross-entropy 25.1.1, cut_cross_entropy/linear_cross_entropy.py: the signature."""


# unsloth_zoo 2026.10.9

UNSLOTH_KWARGS = {  # unsloth_zoo/fused_losses/cross_entropy_loss.py, compute_fused_ce_loss
    "logit_scale_multiply", "logit_scale_divide", "logit_softcapping", "ignore_index",
    "label_smoothing", "logits_bias",
}  # fmt: skip


def unsloth_fused_ce_loss(
    trainer, hidden_states, lm_head_weight, lm_head_bias, labels, mask=None, n_items=None,
    scaling=None, target_gb=None, torch_compile=True, overwrite=False, shift_labels=True, **kwargs,
):  # fmt: skip
    """unsloth_zoo/fused_losses/cross_entropy_loss.py. A divisor of 0 counts as 1."""
    assert trainer is None
    if mask is not None:
        labels = labels.masked_fill(mask == 0, -100)
    if shift_labels:
        labels = _shifted(labels, 1)
    scale = (kwargs.get("logit_scale_multiply") or 1) / (kwargs.get("logit_scale_divide") or 1)
    logits = F.linear(hidden_states, lm_head_weight, lm_head_bias)
    losses = _losses(_shape(logits, scale, kwargs.get("logit_softcapping")), labels)
    return losses.sum() / ((labels != -100).sum() if n_items is None else n_items or 1)


def unsloth_masked_logprobs(hidden_states, lm_head, labels, mask=None, ignore_index=-100, **kwargs):
    """unsloth_zoo/fused_losses/chunked_logprob.py."""
    return -_losses(hidden_states @ lm_head.T, labels, ignore_index=ignore_index)


# apex, github.com/NVIDIA/apex at 6424da3


class FusedAdam:
    """apex/optimizers/fused_adam.py: fp32 moments; masters only of fp16 and fp32 parameters."""

    def __init__(
        self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
        weight_decay=0.0, amsgrad=False, set_grad_none=True, capturable=False, master_weights=False,
    ):  # fmt: skip
        assert (bias_correction, adam_w_mode, amsgrad) == (True, True, False)
        assert capturable or not master_weights
        self.params, self.master_weights = params, master_weights
        dtypes = [torch.promote_types(p.dtype, torch.float32) for p in params]
        self.wide = [p.detach().to(t, copy=True) for p, t in zip(params, dtypes, strict=True)]
        self.inner = torch.optim.AdamW(self.wide, lr, betas, eps, weight_decay)

    @torch.no_grad()
    def step(self):
        for p, wide in zip(self.params, self.wide, strict=True):
            wide.grad = p.grad.to(wide.dtype)
            if not self.master_weights:
                wide.copy_(p)
        self.inner.step()
        for p, wide in zip(self.params, self.wide, strict=True):
            p.copy_(wide)


# FlashAttention, and torch's copy of it


def _attend(q, k, v, bounds, causal, window_size, scale, softcap):
    """Returns ``(out, lse)``, [T, Hq, D] and [Hq, T]. A bound of -1 or None bounds nothing."""
    outs, lses = [], []
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    left, right = window_size
    for start, end in pairwise(bounds.tolist()):
        scores = torch.einsum("ihd,jhd->hij", q[start:end], k[start:end])
        scores = _shape(scores, scale or q.shape[2] ** -0.5, softcap)
        ahead = torch.arange(end - start) - torch.arange(end - start)[:, None]  # j − i
        hidden = (ahead > 0) & causal
        if left not in (-1, None):
            hidden |= ahead < -left
        if right not in (-1, None):
            hidden |= ahead > right
        scores = scores.masked_fill(hidden, -torch.inf)
        outs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[start:end]))
        lses.append(scores.logsumexp(-1).detach())
    return torch.cat(outs), torch.cat(lses, 1)


def _varlen(record, result):
    """Returns a function of the signature of ``record``; it returns ``result(a, out, lse)``."""
    signature = inspect.signature(record)

    def function(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        assert bound.arguments.keys() <= flash_signatures.MODELLED
        bound.apply_defaults()
        a = SimpleNamespace(**bound.arguments)
        if "cu_seqlens_q" in signature.parameters:
            qkv, bounds = (a.q, a.k, a.v), a.cu_seqlens_q
            causal, scale, softcap = a.causal, a.softmax_scale, a.softcap
        else:
            qkv, bounds = (a.query, a.key, a.value), a.cu_seq_q
            causal, scale, softcap = False, a.scale, None
        return result(a, *_attend(*qkv, bounds, causal, a.window_size, scale, softcap))

    return function


# v2.8.3, flash_attn/flash_attn_interface.py
flash_attn_2 = _varlen(
    flash_signatures.flash_attn_2,
    lambda a, out, lse: (out, lse, None) if a.return_attn_probs else out,
)
# 4.0.0b36, flash_attn/cute/interface.py
flash_attn_4 = _varlen(
    flash_signatures.flash_attn_4,
    lambda a, out, lse: (out, lse if a.return_lse or out.requires_grad else None),
)
# torch 2.12 and 2.13, torch/nn/attention/varlen.py
varlen_attn = _varlen(
    flash_signatures.varlen_attn_2_12,
    lambda a, out, lse: (out, lse) if a.return_aux and a.return_aux.lse else out,
)


def flash_attn_varlen_qkvpacked_func(
    qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
    return_attn_probs=False,
):  # fmt: skip
    """v2.8.3, flash_attn/flash_attn_interface.py."""
    return _attend(*qkv.unbind(1), cu_seqlens, causal, window_size, softmax_scale, softcap)[0]


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """v2.8.3, flash_attn/flash_attn_interface.py: [B, S, H, D]."""
    bounds = torch.arange(len(q) + 1) * q.shape[1]
    flat = (t.flatten(0, 1) for t in (q, k, v))
    out = _attend(*flat, bounds, causal, window_size, softmax_scale, softcap)[0]
    return out.unflatten(0, q.shape[:2])


LIGER = {
    "FLCE": LigerFusedLinearCrossEntropyLoss,
    "liger_fused_linear_cross_entropy": liger_fused_linear_cross_entropy,
    "LigerForCausalLMLoss": LigerForCausalLMLoss,
    "LigerCrossEntropyLoss": LigerCrossEntropyLoss,
}
OF_SECTION = {  # of the page: the names of the left column
    "Liger": LIGER,
    "cut-cross-entropy": {
        "linear_cross_entropy": cce_linear_cross_entropy,
        "VocabParallelOptions": VocabParallelOptions,
    },
    "unsloth": {
        "fused_ce": unsloth_fused_ce_loss,
        "unsloth_masked_logprobs": unsloth_masked_logprobs,
    },
    "apex": {"FusedAdam": FusedAdam},
    "flash-attn 2 and 3": {
        "varlen": flash_attn_2,
        "flash_attn_varlen_qkvpacked_func": flash_attn_varlen_qkvpacked_func,
        "flash_attn_func": flash_attn_func,
    },
    "flash-attn 4": {"varlen": flash_attn_4},
    "torch's attention": {"varlen_attn": varlen_attn},
}
