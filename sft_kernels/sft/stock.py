"""Is a model's loss what this trainer computes? Asked once, before the first step, of the model's own forward."""

import inspect
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

from .. import linear_cross_entropy
from ..integrations.rotary import forget_lengths
from ..ops.softmax_grad.composed import torch_cross_entropy
from .masking import IGNORE
from .model import causal_lm, checkpoint_in_evaluation, head, hidden_states, stock_attention, stock_implementation
from .packing import collate, lengths_of

_TOLERANCE = 1e-3  # relative; fp32 rounding stays far below, a leak or a changed logit far above
_LEAK = 1e-4  # of one token, between two rows computed alike: what rounding of another order leaves far below
_SUSPECTS = ("logits_scale", "lm_head_multiplier")  # what else configs say of logits
_LABELS = 256  # of an example: the model's own logits of a long one would need more memory than a training step
_EAGER = 1024  # tokens of an example up to which eager attention, whose weights are all kept, is asked for gradients


class NotStock(ValueError):
    """The model does something that the trainer would leave out."""


def batch_to_check(model, examples, row_tokens, pad_id):
    """The batch that :func:`check_against_stock` is asked about, whatever the order of ``examples``.

    One row: the shortest example, the longest one, the one of middle length, more if there is room, and padding. So
    there is an example before and behind the longest one, and a single example is its own neighbour. A neighbour that
    does not fit is cut to its last tokens. The row has ``row_tokens`` tokens, or up to a quarter more (in rows of less
    than 512, up to 145 more) if the longest example fills it: the check needs about the memory of a micro-batch of one
    row in fp32.

    Labels are thinned to 256 an example. With stock attention that keeps its weights, [tokens, tokens] for each layer,
    examples of more than 1024 tokens have none, so that their hidden states are compared and their gradients are not.
    """
    by_length = np.argsort(lengths_of(examples), kind="stable").tolist()
    longest, last = examples[by_length[-1]], len(by_length) - 1
    room = row_tokens - len(longest.input_ids)
    most = _EAGER if stock_implementation(model) == "eager" else row_tokens
    neighbours = []
    for number, i in enumerate((0, last // 2, last // 4, last * 3 // 4)):
        neighbour = examples[by_length[i]]
        if number < 2:  # these two are always there
            fits = len(neighbour.input_ids) <= min(room - 1, most)
            neighbour = neighbour if fits else _end_of(neighbour, min(most, max(64, row_tokens // 8)))
        elif neighbour in neighbours or len(neighbour.input_ids) >= min(room, most):
            continue
        neighbours.append(neighbour)
        room -= len(neighbour.input_ids)
    row = [_thinned(example, most) for example in (neighbours[0], longest, *neighbours[1:])]
    tokens = sum(len(example.input_ids) for example in row)
    return collate([row], max(row_tokens, tokens + 16), pad_id)


def _end_of(example, tokens):
    """The last tokens of an example, each of them with a label."""
    ids = example.input_ids[-tokens:]
    return example._replace(input_ids=ids, labels=[IGNORE, *ids[1:]])


def _thinned(example, most):
    kept = [i for i, label in enumerate(example.labels) if label != IGNORE]
    stay = set(kept[:: -(-len(kept) // _LABELS) or 1]) if len(example.input_ids) <= most else ()
    return example._replace(labels=[label if i in stay else IGNORE for i, label in enumerate(example.labels)])


def check_against_stock(model, batch):
    """Compare the packed batch's loss and gradients with the model's own logits, an example at a time, stock attention.

    First the head alone, on hidden states made 1000 times larger: a softcap that a fresh model never reaches shows
    there. Then the mean loss over the kept tokens, every parameter's gradient, and each example's hidden states: those
    that it has alone, and that its neighbours' tokens do not move.
    Compares in fp32 without dropout; the model is left as it was, without gradients. Raises :class:`NotStock` with what
    differs, and whatever the packed forward raises in training.
    """
    was_training = model.training
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise NotStock("model: output_router_logits adds a loss of its own, which this trainer leaves out")
    try:
        with _in_fp32(model):
            with torch.no_grad():
                packed_hidden_states(model.train(), batch)  # attention with dropout is refused here
            checkpoint_in_evaluation(model.eval())
            hidden = hidden_states(model, batch)
            ours = linear_cross_entropy(hidden, **head(model), shift=True, kept=batch.kept)
            if not torch.isfinite(ours):
                raise NotStock(_not_finite(model))
            ours.backward()
            gradients = _take_gradients(model)
            moved = _moved_by_neighbours(model, batch, hidden.detach())
            with stock_attention(model):
                _check_head(model, batch)
                checkpoint_in_evaluation(model)
                stock, from_alone = _stock_backward(model, batch, hidden.detach())
            moved += from_alone
            reference = _take_gradients(model)
            _compare(model, (ours.detach(), gradients), (stock, reference), moved)
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)


def packed_hidden_states(model, batch):
    """:func:`~.model.hidden_states`, with :class:`NotStock` for a model that does not know its arguments."""
    try:
        return hidden_states(model, batch)
    except (AttributeError, KeyError, TypeError) as error:
        raise NotStock(f"model: {type(model).__name__} does not take packed rows ({error!r})") from error


def _not_finite(model):
    found = next((name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()), None)
    cause = f"its weight {found} holds NaN or infinite numbers" if found else "its weights are finite"
    return f"model: its loss on the first examples is not finite; {cause}"


@contextmanager
def _in_fp32(model):
    """Parameters and buffers of fp16 and bf16 in fp32 as long as the block runs; the way back is exact.

    Tensors of other classes stay as they are: a quantised one may claim a dtype that it does not store.
    """
    tensors = [t for t in (*model.parameters(), *model.buffers()) if type(t.data) is torch.Tensor]
    lower = [(t, t.dtype) for t in tensors if t.dtype in (torch.float16, torch.bfloat16)]
    for tensor, _ in lower:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in lower:
            tensor.grad = None
            tensor.data = tensor.data.to(dtype)


def _compare(model, ours, stock, moved):
    """Raise for the first difference. ``ours`` and ``stock`` are losses and gradients, ``moved`` the hidden states."""
    name = type(model).__name__
    leaks = [(tokens, distance) for tokens, distance, most in moved if not distance <= most]
    reason = ""
    if leaks:
        tokens, share = max(leaks, key=lambda leak: leak[1])
        reason = (
            f"{name} computes other hidden states for an example of {tokens} tokens in a packed row than for the "
            f"example alone, by {share:.2%}: examples see each other, or something depends on the lengths of all"
        )
    reason = f"{reason}{_hint(model)}".removeprefix("; ")
    (loss, gradients), (expected_loss, reference) = ours, stock
    if not torch.isclose(loss, expected_loss, rtol=_TOLERANCE, atol=0):
        message = f"the packed loss is {float(loss):.6g}, the model's own is {float(expected_loss):.6g}"
        raise NotStock(f"model: {message}; {reason}".rstrip("; "))
    # Some gradients are zero but for rounding (a key's bias, say); they are held to a thousandth of the whole.
    whole = float(torch.nn.utils.get_total_norm(reference.values()))
    for parameter, expected in reference.items():
        found = gradients.get(parameter)
        distance = float("inf") if found is None else float((found - expected).norm())
        if not distance <= _TOLERANCE * max(float(expected.norm()), 1e-3 * whole):
            message = f"the gradient of {parameter} differs from the model's own by {distance:.3g}"
            raise NotStock(f"model: {message}; {reason}".rstrip("; "))
    if leaks:
        raise NotStock(f"model: {reason}")


def _hint(model):
    """Returns a proposal to use our attention, for a model with another one."""
    from ..integrations.calls import GIVEN, NAME

    name = model.config._attn_implementation
    if name in (NAME, GIVEN):
        return ""
    return f"; its attention is {name!r}, use attn_implementation={NAME!r}, which keeps examples apart or says why not"


def _check_head(model, batch):
    """Raise :class:`NotStock` if the model's logits are not those of :func:`~.model.head`."""
    seen = {}

    def enlarge(module, args, output):
        seen["hidden"] = output.last_hidden_state = output.last_hidden_state * 1000
        return output

    start, end = batch.cu_seqlens[:2].tolist()
    forget_lengths(model)
    hook = causal_lm(model).base_model.register_forward_hook(enlarge)
    try:
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids[:, start:end], use_cache=False).logits
            if "hidden" not in seen:
                raise NotStock(
                    f"model: {type(model).__name__} does not compute its logits from its base model's output"
                )
            expected = _logits(seen["hidden"], **head(model))
    finally:
        hook.remove()
    if logits.shape != expected.shape or not float((logits - expected).norm()) <= _TOLERANCE * float(expected.norm()):
        config = model.config.get_text_config()
        found = {name: getattr(config, name) for name in _SUSPECTS if getattr(config, name, None) is not None}
        hint = f" (its config says {', '.join(f'{k}={v}' for k, v in found.items())})" if found else ""
        raise NotStock(
            f"model: {type(model).__name__} does something else to its logits than scale and cap them{hint}; "
            "this trainer's loss would leave that out"
        )


def _logits(hidden, linear_weight, linear_bias, logit_scale, softcap):
    logits = F.linear(hidden, linear_weight, linear_bias)
    if logit_scale is not None:
        logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _stock_backward(model, batch, packed):
    """Returns ``(loss, moved)``: the sum of the examples' stock losses over the batch's divisor, and of each example
    ``(tokens, distance, most)``: how far ``packed``, its hidden states in the row, are from those alone, and how far
    they may be.

    Gradients are accumulated in the model. An example without labels is asked for hidden states alone. Padding, which
    is one token again and again, is left out.
    """
    labels = torch.full_like(batch.input_ids[0], -100)
    labels[batch.kept.rows] = batch.kept.targets  # already at the place that predicts them
    total, moved, seen = torch.zeros((), device=labels.device), [], {}
    base = causal_lm(model).base_model
    hook = base.register_forward_hook(lambda module, args, output: seen.update(hidden=output.last_hidden_state))
    try:
        for start, end in pairwise(batch.cu_seqlens.tolist()):
            ids = batch.input_ids[:, start:end]
            where = (labels[start:end] != -100).nonzero()[:, 0]
            forget_lengths(model)
            if len(where):
                logits = _logits_at(model, ids, where)
                loss = torch_cross_entropy(logits.float(), labels[start:end][where], reduction="sum")
                (loss := loss / batch.kept.count).backward()
                total += loss.detach()
            elif (ids == ids[0, 0]).all():
                continue
            else:
                with torch.no_grad():
                    base(input_ids=ids, use_cache=False)
            alone = seen.pop("hidden").detach()
            moved.append((end - start, _distance(packed[:, start:end], alone), _TOLERANCE))
    finally:
        hook.remove()
    return total, moved


@torch.no_grad()
def _moved_by_neighbours(model, batch, hidden):
    """How far hidden states move with the tokens of other examples, as ``(tokens, distance, most)`` of each.

    Every second example is changed. Both rows are computed in the same way, so that even a weak leak stands out.
    """
    bounds = [*pairwise(batch.cu_seqlens.tolist())]
    ids, rows = batch.input_ids.clone(), model.get_input_embeddings().weight.shape[0]
    for start, end in bounds[::2]:
        ids[:, start:end] = (ids[:, start:end] + 1) % rows
    changed = hidden_states(model, batch._replace(input_ids=ids))
    return [(end - start, _distance(changed[:, start:end], hidden[:, start:end]), _LEAK) for start, end in bounds[1::2]]


def _distance(found, expected):
    """The largest distance of a token's hidden states, relative to their norm, or to a tenth of the mean norm."""
    norms = expected.norm(dim=-1)
    floor = (0.1 * norms.mean()).clamp(min=torch.finfo(norms.dtype).tiny)  # padding may be nothing but zeros
    return float(((found - expected).norm(dim=-1) / norms.maximum(floor)).max())


def _logits_at(model, ids, where):
    """The model's logits [n, V] at some tokens of an example. Many models can leave the others out."""
    if "logits_to_keep" in inspect.signature(causal_lm(model).forward).parameters:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=where).logits[0]
        if len(logits) == len(where):
            return logits
    return model(input_ids=ids, use_cache=False).logits[0, where]


def _take_gradients(model):
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients
