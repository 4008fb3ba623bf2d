"""``sft-kernels verify``: is every implementation right on this machine?

Each op runs on each implementation, dtype and family of options, beside plain PyTorch in the same dtype, and both are
held against the float64 oracle by the one error budget (``_budget.py``). On a CPU, Triton's rows are interpreted, in a
process of their own.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import AdamW, KeptTokens, TokenStats, cross_entropy, linear_cross_entropy, packed_attention
from ._backend import Unavailable, implementations
from ._budget import compare
from .ops.adamw import reference as adamw_reference
from .ops.linear_cross_entropy.reference import linear_cross_entropy as linear_cross_entropy_reference
from .ops.packed_attention.reference import packed_attention as packed_attention_reference
from .ops.softmax_grad.composed import torch_cross_entropy
from .ops.softmax_grad.reference import masked_loss

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Quantity(NamedTuple):
    """One result of an op, the oracle's, and that of plain PyTorch."""

    x: torch.Tensor
    ref: object
    eager: torch.Tensor


class Row(NamedTuple):
    """One line of the table: the quantity that stands furthest into its budget."""

    op: str
    impl: str
    dtype: str
    options: str
    quantity: str
    error: float
    eager_error: float
    ratio: float  # error over allowed error; above 1 is a failure
    verdict: str  # "ok", "FAIL" or "absent"
    note: str = ""


# ---- the losses


def plain_cross_entropy(
    logits,
    target,
    weight=None,
    *,
    reduction="mean",
    label_smoothing=0.0,
    num_items=None,
    token_weight=None,
    softcap=None,
    logit_scale=None,
    z_loss=0.0,
    return_stats=False,
):
    """The PyTorch code that a user would write for :func:`cross_entropy`, in the dtype of its inputs.

    ``return_stats="tokens"`` also returns the values of each token, as a list.
    """
    if return_stats:
        options = {"reduction": reduction, "label_smoothing": label_smoothing, "num_items": num_items}
        options |= {"token_weight": token_weight, "softcap": softcap, "logit_scale": logit_scale, "z_loss": z_loss}
        return plain_cross_entropy(logits, target, weight, **options), plain_token_stats(
            logits, target, softcap, logit_scale
        )
    logits = _scaled_and_capped(logits, softcap, logit_scale)
    if weight is not None:
        weight = weight.to(logits.dtype)
    indices = not target.is_floating_point()
    target = target.long() if indices else target.to(logits.dtype)
    if num_items is None and token_weight is None and not z_loss:
        return torch_cross_entropy(logits, target, weight, reduction=reduction, label_smoothing=label_smoothing)

    losses = torch_cross_entropy(logits, target, weight, reduction="none", label_smoothing=label_smoothing)
    kept = target != -100 if indices else torch.ones_like(losses, dtype=torch.bool)
    of_target = torch.ones_like(losses)
    if weight is not None:
        of_target = weight[target.where(kept, 0)] if indices else target @ weight
    losses = losses + (z_loss * of_target * logits.logsumexp(-1) ** 2).where(kept, 0)
    if token_weight is not None:
        losses = losses * token_weight.to(losses.dtype)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if num_items is None:
        num_items = (of_target if indices else torch.ones_like(losses))[kept].sum()
    return losses.sum() / num_items


def plain_token_stats(logits, target, softcap=None, logit_scale=None):
    """Log-probability, logsumexp, entropy and prediction of each token in plain PyTorch."""
    logits = _scaled_and_capped(logits, softcap, logit_scale)
    kept = target != -100 if target.dim() == 1 else torch.ones_like(target[:, 0], dtype=torch.bool)
    labels = target.long().where(kept, 0) if target.dim() == 1 else target.argmax(1)
    log_p = logits.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    values = log_p.gather(1, labels[:, None])[:, 0], logits.logsumexp(1), entropy
    return [*(value.where(kept, 0) for value in values), logits.argmax(1).where(kept, -1)]


def plain_linear_cross_entropy(input, linear_weight, linear_bias, target, *, shift=0, **options):
    """The PyTorch code that a user would write for :func:`linear_cross_entropy` over ``[N, D]``; ``linear_bias`` may be
    None."""
    if shift:
        target = F.pad(target, (0, shift), value=-100)[shift:]
        if options.get("token_weight") is not None:
            options["token_weight"] = F.pad(options["token_weight"], (0, shift))[shift:]
    return plain_cross_entropy(F.linear(input, linear_weight, linear_bias), target, **options)


def _scaled_and_capped(logits, softcap, logit_scale):
    if logit_scale is not None:
        logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def loss_oracle(tensors, target, *, upstream=1.0, of_stats=None, **options):
    """The oracle's loss and gradients for ``tensors``: logits, or hidden states, head and, perhaps, its bias.

    Given ``of_stats``, the upstream gradients of the tokens' values, these stand between loss and gradients.
    """
    tensors = [_numpy(t) for t in tensors]
    if of_stats is not None:
        options["of_stats"] = [_numpy(g) for g in of_stats]
    options = {name: _numpy(v) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    options["upstream"] = _numpy(upstream) if isinstance(upstream, torch.Tensor) else upstream
    target = _numpy(target) if target.is_floating_point() else target.cpu().numpy()
    if len(tensors) == 1:
        out = masked_loss(*tensors, target, **options)
        return out.loss, *([] if of_stats is None else out.tokens), out.dlogits
    hidden, weight, *bias = tensors
    out = linear_cross_entropy_reference(hidden, weight, target, linear_bias=bias[0] if bias else 0.0, **options)
    values = [] if of_stats is None else out.logits.tokens
    return out.loss, *values, out.dinput, out.dweight, *([out.dbias] if bias else [])


def gradients(function, tensors, upstream=1.0, of_stats=None):
    """``function`` of ``tensors``, and its gradients by each of them.

    Given ``of_stats``, the upstream gradients of the tokens' values, ``function`` returns ``(loss, values)``. The
    values stand between loss and gradients.
    """
    leaves = [t.detach().requires_grad_() for t in tensors]
    out, values = (function(*leaves), ()) if of_stats is None else function(*leaves)
    outputs = [out, *values[:3]]
    upstream = [torch.as_tensor(upstream).expand_as(out), *(of_stats or ())]
    upstream = [g.to(x.device, x.dtype) for g, x in zip(upstream, outputs, strict=True)]
    found = torch.autograd.grad(outputs, leaves, upstream)
    return out.detach(), *(value.detach() for value in values), *found


_N, _D, _V = 190, 48, 1009
_SCALARS = {"label_smoothing": 0.2, "softcap": 6.0, "logit_scale": 1.5, "z_loss": 1e-3}
_LOSS_FAMILIES = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "upstream": {"upstream": -3.7},
    "num_items": {"num_items": 333},
    "token_weight": {"token_weight": torch.linspace(-0.5, 2, _N)},
    "label_smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 4.0},
    "logit_scale": {"logit_scale": 0.25},
    "z_loss": {"z_loss": 1e-2},
    "softcap, logit_scale": {"softcap": 6.0, "logit_scale": 1.5},
    "softcap, z_loss": {"softcap": 6.0, "z_loss": 1e-2},
    "smoothing, z_loss": {"label_smoothing": 0.2, "z_loss": 1e-2},
    "scalars together": _SCALARS,
    "weight": {"weight": torch.linspace(0, 2, _V)},
    "weight, smoothing": {"weight": torch.linspace(0, 2, _V), "label_smoothing": 0.1},
    "probabilities": {"probabilities": True, "label_smoothing": 0.1},
    "nothing kept": {"masked": 1.0},
    "everything kept": {"masked": 0.0},
    "ignore_index": {"ignore_index": 3},
    "return_stats": {"stats": True},
    "token stats": {"stats": "tokens"},
}
_LINEAR_FAMILIES = _LOSS_FAMILIES | {
    "linear_bias": {"bias": True},
    "shift": {"shift": True, "token_weight": torch.linspace(-0.5, 2, _N)},
    "kept": {"kept": True},
    "tokens, one chunk": {"chunking": "tokens"},
    "tokens, chunks": {"chunking": "tokens", "max_logits_bytes": 25 * _V * 4, "bias": True},
    "vocab, one chunk": {"chunking": "vocab", "max_logits_bytes": _N * _V * 4},
    "tokens, token stats": {
        "chunking": "tokens",
        "max_logits_bytes": 80 * _V * 4,
        "stats": "tokens",
        "reduction": "none",
    },
    "vocab, token stats": {"chunking": "vocab", "max_logits_bytes": _N * 301 * 4, "stats": "tokens", **_SCALARS},
    "vocab, return_stats": {"chunking": "vocab", "max_logits_bytes": _N * 301 * 4, "stats": True},
    "vocab, chunks": {"chunking": "vocab", "max_logits_bytes": _N * 301 * 4, "bias": True, "label_smoothing": 0.1},
}
_LOOP = ("chunking", "max_logits_bytes")


def _loss_case(op, impl, dtype, device, options):
    linear = op == "linear_cross_entropy"
    options = dict(options)
    stats, bias, kept, probabilities = (options.pop(name, False) for name in ("stats", "bias", "kept", "probabilities"))
    masked, upstream = options.pop("masked", 0.6), options.pop("upstream", 1.0)
    ignore_index = options.pop("ignore_index", -100)
    loops = {name: options.pop(name) for name in _LOOP if name in options}

    random = torch.Generator().manual_seed(0)
    target = torch.randint(0, _V, (_N,), generator=random)
    target[torch.rand(_N, generator=random) < masked] = -100
    target[target == ignore_index] = -100
    if probabilities:
        target = torch.randn(_N, _V, generator=random).softmax(1)
    if options.get("reduction") == "none":
        upstream = torch.rand(_N, generator=random)
    shapes = [(_N, _D), (_V, _D), (_V,)][: 2 + bias] if linear else [(_N, _V)]
    tensors = [torch.randn(shape, generator=random) for shape in shapes]
    if linear:
        tensors[1] *= 2 * _D**-0.5
    tensors = [t.to(device, dtype) for t in tensors]
    if stats:  # every third label is the model's own answer
        logits = F.linear(*(t.double() for t in tensors)) if linear else tensors[0].double()
        target[::3] = logits.argmax(1).cpu()[::3].where(target[::3] != -100, -100)
    target = target.to(device)
    options = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    loops["kept"] = KeptTokens.from_labels(target.cpu()).to(device) if kept else None

    per_token, statistics = stats == "tokens", None
    of_stats = [torch.rand(_N, generator=random, device="cpu").sub_(0.5).to(device) for _ in range(3)]

    def ours(*leaves):
        nonlocal statistics
        call = {**options, "return_stats": stats, "impl": impl}
        labels = target
        if ignore_index != -100:
            call["ignore_index"], labels = ignore_index, target.where(target != -100, ignore_index)
        if linear:
            loss = linear_cross_entropy(*leaves[:2], labels, linear_bias=leaves[2] if bias else None, **loops, **call)
        else:
            loss = cross_entropy(*leaves, labels, **call)
        if stats is True:
            loss, statistics = loss
        return loss

    def plain(*leaves):
        call = {**options, "return_stats": per_token}
        if linear:
            return plain_linear_cross_entropy(*leaves[:2], leaves[2] if bias else None, target, **call)
        return plain_cross_entropy(*leaves, target, **call)

    of_stats = of_stats if per_token else None
    found, eager = (gradients(function, tensors, upstream, of_stats) for function in (ours, plain))
    ref = loss_oracle(tensors, target, upstream=upstream, of_stats=of_stats, **options)
    names = ("loss", *(TokenStats._fields if per_token else ()), "dinput", "dweight", "dbias")
    result = {name: Quantity(*each) for name, *each in zip(names, found, ref, eager, strict=False)}
    if per_token:  # a prediction is right or not
        result["prediction"] = Quantity(*(torch.as_tensor(t).double() for t in result["prediction"]))
    # The target's entries are so large that they would hide all others.
    if not linear and not per_token and not probabilities:
        off = torch.ones_like(found[1]).scatter(1, target.clamp(min=0)[:, None], 0)
        result["off target"] = Quantity(found[1] * off, ref[1] * _numpy(off), eager[1] * off)
    if stats is True:
        result |= _statistics(statistics, tensors, target)
    return result


def _statistics(found, tensors, target):
    logits = tensors[0] if len(tensors) == 1 else F.linear(*tensors)
    log_p = logits[target != -100].log_softmax(1)
    rows = masked_loss(_numpy(tensors[0]) if len(tensors) == 1 else _numpy(tensors[0]) @ _numpy(tensors[1]).T,
                       target.cpu().numpy()).rows  # fmt: skip
    return {
        "kept": Quantity(found.kept.double(), float(rows.nll.size), torch.tensor(float(rows.nll.size))),
        "correct": Quantity(found.correct.double(), float(rows.correct.sum()), torch.tensor(float(rows.correct.sum()))),
        "nll_sum": Quantity(found.nll_sum, rows.nll.sum(), F.nll_loss(log_p, target[target != -100], reduction="sum")),
        "entropy_sum": Quantity(found.entropy_sum, rows.entropy.sum(), -(log_p.exp() * log_p).sum()),
        "max_lse": Quantity(found.max_lse, rows.lse.max(), logits[target != -100].logsumexp(1).amax()),
    }


# ---- AdamW

_SHAPES = ((301, 67), (1024,), (3, 5, 7), (1,), (0,))
_STEPS = 5
# The norm is about 145: clipped to 100 every gradient stays large enough for its square in fp16.
_ADAMW_FAMILIES = {
    "clip": {"max_grad_norm": 100.0},
    "no clip": {},
    "skip_nonfinite": {"max_grad_norm": 100.0, "skip_nonfinite": True},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True, "weight_decay": 0.0},
    "tensor lr": {"lr": torch.tensor(1e-2)},
    "a missing gradient": {"missing": True, "max_grad_norm": 100.0},
    "state_dtype": {"state_dtype": torch.float32, "max_grad_norm": 100.0},
    "master_weights": {"master_weights": "float32", "max_grad_norm": 100.0},
    "split masters": {
        "master_weights": "split",
        "state_dtype": torch.float32,
        "max_grad_norm": 100.0,
        "not_for": ("float16",),
    },
    # One step: what is rounded the other way stays inside the budget, and does not add up.
    "stochastic_rounding": {
        "stochastic_rounding": True,
        "state_dtype": torch.float32,
        "steps": 1,
        "not_for": ("float16",),
    },
    "update_stats": {"update_stats": True, "max_grad_norm": 100.0},
}


def _adamw_case(op, impl, dtype, device, options):
    options = dict(options)
    missing, steps = options.pop("missing", False), options.pop("steps", _STEPS)
    options.pop("not_for", None)
    common = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    common |= {name: options.pop(name) for name in ("lr", "weight_decay", "amsgrad", "maximize") if name in options}

    random = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=random).to(device, dtype) for shape in _SHAPES]
    leaves, plain = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    params, states = [_numpy(p) for p in start], [{} for _ in start]
    ours = AdamW(leaves, **common, **options, impl=impl)
    eager = AdamW.__base__(plain, **common, foreach=False)  # torch's, whatever the name torch.optim.AdamW stands for
    scalars = {name: float(common[name]) for name in ("lr", "eps", "weight_decay")}
    scalars |= {name: common.get(name, False) for name in ("amsgrad", "maximize")}
    clip = options.get("max_grad_norm")
    for step in range(steps):
        grads = [torch.randn(shape, generator=random).to(device, dtype) for shape in _SHAPES]
        if missing and step % 2:
            grads[0] = None
        bad = options.get("skip_nonfinite") and step == 2
        if bad:
            grads[1][7] = float("nan")
        for p, q, g in zip(leaves, plain, grads, strict=True):
            p.grad, q.grad = (None if g is None else g.clone() for _ in range(2))
        ours.step()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(plain, clip)
        if not bad:
            eager.step()
        params, states, *_ = adamw_reference.step(
            params,
            [None if g is None else _numpy(g) for g in grads],
            states,
            max_grad_norm=clip,
            skip_nonfinite=bool(bad),
            beta1=0.9,
            beta2=0.95,
            **scalars,
        )

    def flat(tensors):
        return torch.cat([torch.as_tensor(t).detach().flatten().cpu() for t in tensors])

    result = {"parameters": Quantity(flat(leaves), flat(params), flat(plain))}
    for name, key in (("exp_avg", "m"), ("exp_avg_sq", "v")):
        result[name] = Quantity(
            flat([ours.state[p][name] for p in leaves]),
            flat([state[key] for state in states]),
            flat([eager.state[p][name] for p in plain]),
        )
    return result


# ---- attention

_BOUNDS = (0, 37, 37, 38, 101, 165)
_T, _HEADS, _HEAD_DIM = 170, 4, 64
_ATTENTION_FAMILIES = {
    "causal": {},
    "full": {"causal": False},
    "GQA": {"key_heads": 2},
    "MQA, full": {"key_heads": 1, "causal": False},
    "window": {"window_size": (20, -1)},
    "window, full": {"window_size": (9, 12), "causal": False},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.0},
    "softcap, window, GQA": {"softcap": 5.0, "window_size": (30, -1), "key_heads": 2},
}


def plain_packed_attention(query, key, value, cu_seqlens, *, causal, scale, window_size, softcap):
    """The PyTorch code that a user would write: all scores of the row, masked; also their logsumexp."""
    T = query.shape[0]
    at = torch.arange(T, device=query.device)
    bounds = torch.as_tensor(cu_seqlens, device=query.device)
    segment = torch.bucketize(at, bounds[1:], right=True)
    ahead = at[None] - at[:, None]
    left, right = (size if size >= 0 else T for size in window_size)
    seen = (segment[None] == segment[:, None]) & (ahead >= -left) & (ahead <= (min(right, 0) if causal else right))
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    scores = torch.einsum("ihd,jhd->hij", query, key) * (query.shape[2] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    out = torch.einsum("hij,jhd->ihd", scores.softmax(-1), value)
    tail = (at >= bounds[-1])[:, None]
    return out.masked_fill(tail[..., None], 0), scores.logsumexp(-1).masked_fill(tail.T, float("-inf"))


def _attention_case(op, impl, dtype, device, options):
    options = {"causal": True, "scale": None, "window_size": (-1, -1), "softcap": None} | options
    key_heads = options.pop("key_heads", _HEADS)
    random = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(_T, heads, _HEAD_DIM, generator=random).to(device, dtype)
        for heads in (_HEADS, key_heads, key_heads)
    ]
    dout = torch.randn(_T, _HEADS, _HEAD_DIM, generator=random).to(device, dtype)
    cu_seqlens = torch.tensor(_BOUNDS, dtype=torch.int32, device=device)
    lse = {}

    def ours(*leaves):
        out, lse["x"] = packed_attention(*leaves, cu_seqlens, max(_BOUNDS), return_lse=True, impl=impl, **options)
        return out

    def plain(*leaves):
        out, lse["eager"] = plain_packed_attention(*leaves, _BOUNDS, **options)
        return out

    found, eager = gradients(ours, tensors, dout), gradients(plain, tensors, dout)
    ref = packed_attention_reference(*map(_numpy, tensors), _BOUNDS, _numpy(dout), **options)
    refs = (ref.out, ref.dquery, ref.dkey, ref.dvalue)
    names = ("out", "dquery", "dkey", "dvalue")
    result = {name: Quantity(*each) for name, *each in zip(names, found, refs, eager, strict=True)}
    return result | {"lse": Quantity(lse["x"], ref.lse, lse["eager"])}


# ---- the table

OPS = {
    "cross_entropy": ("softmax_grad", _loss_case, _LOSS_FAMILIES),
    "linear_cross_entropy": ("softmax_grad", _loss_case, _LINEAR_FAMILIES),
    "adamw": ("adamw", _adamw_case, _ADAMW_FAMILIES),
    "packed_attention": ("packed_attention", _attention_case, _ATTENTION_FAMILIES),
}


def verify(ops=None, impls=None, dtypes=None, *, device="cpu", smoke=False):
    """Yield a :class:`Row` for each op, implementation, dtype and family of options; ``smoke`` takes the first family.

    ``None`` means all there are. An implementation that cannot do here what is asked is a row of its own, "absent", one
    for each reason.
    """
    for op in ops or OPS:
        core, case, families = OPS[op]
        for impl in implementations(core):
            if impls is not None and impl not in impls:
                continue
            if impl == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
                yield from _interpreted(op, dtypes, smoke)
                continue
            reasons = set()
            for dtype in dtypes or DTYPES:
                for family in [*families][: 1 if smoke else None]:
                    if dtype in families[family].get("not_for", ()):
                        continue
                    row = _row((op, impl, dtype, family), case, DTYPES[dtype], device, families[family])
                    if row.verdict != "absent" or row.note not in reasons:
                        yield row
                    if row.verdict == "absent":
                        reasons.add(row.note)


def _row(names, case, dtype, device, options):
    op, impl, *_ = names
    try:
        quantities = case(op, impl, dtype, device, options)
    except Unavailable as reason:
        return Row(*names, "", *[float("nan")] * 3, "absent", str(reason))
    except Exception as error:
        return Row(*names, "", *[float("nan")] * 3, "FAIL", f"{type(error).__name__}: {error}")
    worst = None
    for quantity, (x, ref, eager) in quantities.items():
        try:
            found = compare(x, ref, eager, output_dtype=x.dtype)
        except AssertionError as error:
            return Row(*names, quantity, *[float("nan")] * 3, "FAIL", str(error))
        ratio = found.error / found.allowed if found.allowed else (float("inf") if found.error else 0.0)
        row = Row(*names, quantity, found.error, found.eager_error, ratio, "ok" if found.ok else "FAIL")
        if worst is None or not row.ratio <= worst.ratio:
            worst = row
    return worst


def _interpreted(op, dtypes, smoke):
    """The rows of Triton's implementation of ``op`` on the CPU: a process imports triton interpreting, or compiling."""
    command = [sys.executable, "-m", "sft_kernels.verify", "--ops", op, "--impls", "triton", "--json", "-"]
    command += ["--dtypes", *(dtypes or DTYPES), *(["--smoke"] if smoke else [])]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    try:
        return [Row(**row) for row in json.loads(done.stdout)["rows"]]
    except ValueError:
        reason = f"the interpreting process ended with status {done.returncode}: {done.stderr.strip()[-300:]}"
        return [Row(op, "triton", "", "", "", *[float("nan")] * 3, "FAIL", reason)]


def main(argv=None):
    """Print the table; returns 1 where a row fails, or where an implementation asked for by name is absent, else 0."""
    description = "Holds every implementation on this machine against a float64 oracle."
    parser = argparse.ArgumentParser(prog="sft-kernels verify", description=description)
    parser.add_argument("--ops", nargs="+", choices=[*OPS], help="all without it")
    parser.add_argument("--impls", nargs="+", choices=["torch", "triton", "cuda", "flash"], help="all without it")
    parser.add_argument("--dtypes", nargs="+", choices=[*DTYPES], help="all without it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="one family of options each")
    parser.add_argument("--json", metavar="FILE", help="also write the rows; - writes nothing else to the output")
    args = parser.parse_args(argv)
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {error}")

    rows = []
    with contextlib.redirect_stdout(open(os.devnull, "w") if args.json == "-" else sys.stdout):
        print(f"{'':59} {'furthest off':12} {'error':>9} {'plain':>9} {'of budget':>9}")
        for row in verify(args.ops, args.impls, args.dtypes, device=args.device, smoke=args.smoke):
            rows.append(row)
            print(_line(row), flush=True)
            if args.json not in (None, "-"):
                _write(Path(args.json), args.device, rows)
        count = {verdict: sum(row.verdict == verdict for row in rows) for verdict in ("ok", "FAIL", "absent")}
        print(f"\n{count['ok']} within the budget, {count['FAIL']} failed, {count['absent']} absent")
    if args.json == "-":
        print(json.dumps(_document(args.device, rows)))
    missing = set(args.impls or ()) - {row.impl for row in rows if row.verdict != "absent"}
    for impl in sorted(missing):
        print(f"sft-kernels verify: {impl} was asked for and runs nothing here", file=sys.stderr)
    return 1 if count["FAIL"] or missing else 0


def _document(device, rows):
    return {"torch": torch.__version__, "device": device, "rows": [row._asdict() for row in rows]}


def _write(path, device, rows):
    """Replace the file after every row: a run that is killed leaves the rows it had, and no half of a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(_document(device, rows), indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _line(row):
    figures = " " * 29 if row.note else f"{row.error:9.1e} {row.eager_error:9.1e} {row.ratio:9.0%}"
    line = f"{row.op:20} {row.impl:6} {row.dtype:8} {row.options:22} {row.quantity:12} {figures} {row.verdict}"
    return f"{line}  {row.note}" if row.note else line


def _numpy(tensor):
    return tensor.detach().double().cpu().numpy()


if __name__ == "__main__":
    sys.exit(main())
