"""Is a model's loss what this trainer computes? Asked once, on the first batch, of the model's own forward."""

from itertools import pairwise

import torch
import torch.nn.functional as F

from .. import linear_cross_entropy
from ..ops.softmax_grad.composed import torch_cross_entropy
from .model import head, hidden_states, stock_attention

_TOLERANCE = 1e-3  # relative; fp32 rounding stays far below, a leak or a changed logit far above
_SUSPECTS = ("logits_scale", "lm_head_multiplier")  # what else configs say of logits


class NotStock(ValueError):
    """The model does something that the trainer would leave out."""


def check_against_stock(model, batch):
    """Compare the packed batch's loss and gradients with the model's own logits, an example at a time, stock attention.

    First the head alone, on hidden states made 1000 times larger: a softcap that a fresh model never reaches shows
    there. Then the mean loss over the kept tokens, and every parameter's gradient. Compares in fp32 without dropout;
    the model is left as it was, without gradients. Raises :class:`NotStock` with what differs, and whatever the packed
    forward raises in training.
    """
    was_training = model.training
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise NotStock("model: output_router_logits adds a loss of its own, which this trainer leaves out")
    try:
        with torch.no_grad():
            hidden_states(model.train(), batch)  # attention with dropout is refused here, before the run has begun
    except (AttributeError, KeyError, TypeError) as error:
        raise NotStock(f"model: {type(model).__name__} does not take packed rows ({error!r})") from error
    model.eval()
    ours = linear_cross_entropy(hidden_states(model, batch), **head(model), shift=True, kept=batch.kept)
    ours.backward()
    gradients = _take_gradients(model)
    with stock_attention(model):
        _check_head(model, batch)
        stock = _stock_backward(model, batch)
    reference = _take_gradients(model)
    model.train(was_training)
    if not torch.isclose(ours.detach(), stock, rtol=_TOLERANCE, atol=0):
        raise NotStock(f"model: the packed loss is {float(ours):.6g}, the model's own is {float(stock):.6g}")
    # Some gradients are zero but for rounding (a key's bias, say); they are held to a thousandth of the whole.
    whole = float(torch.nn.utils.get_total_norm(reference.values()))
    for name, expected in reference.items():
        found = gradients.get(name)
        distance = float("inf") if found is None else float((found - expected).norm())
        if not distance <= _TOLERANCE * max(float(expected.norm()), 1e-3 * whole):
            raise NotStock(f"model: the gradient of {name} differs from the model's own by {distance:.3g}")


def _check_head(model, batch):
    """Whether the model's logits are those of :func:`~.model.head` and nothing else."""
    seen = {}

    def enlarge(module, args, output):
        seen["hidden"] = output.last_hidden_state = output.last_hidden_state * 1000
        return output

    start, end = batch.cu_seqlens[:2].tolist()
    hook = model.base_model.register_forward_hook(enlarge)
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


def _stock_backward(model, batch):
    """Sum over the examples of the stock loss over the batch's divisor, gradients accumulated in the model."""
    labels = torch.full_like(batch.input_ids[0], -100)
    labels[batch.kept.rows] = batch.kept.targets  # already at the place that predicts them
    total = torch.zeros((), device=labels.device)
    bounds = batch.cu_seqlens.tolist()
    for start, end in pairwise(bounds):
        if (labels[start:end] == -100).all():
            continue
        logits = model(input_ids=batch.input_ids[:, start:end], use_cache=False).logits[0]
        loss = torch_cross_entropy(logits.float(), labels[start:end], reduction="sum") / batch.kept.count
        loss.backward()
        total += loss.detach()
    return total


def _take_gradients(model):
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients
