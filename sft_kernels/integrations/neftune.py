"""NEFTune: noise on the embeddings of a model in training (Jain et al., arXiv:2310.05914)."""

import math
import threading

import torch
import torch.nn.functional as F

from .calls import arguments_of, parameters_of


def neftune(model, alpha):
    """Add noise U(−1, 1) · alpha / √(L · d) to each token's embedding in training; returns a handle that ends it.

    L is the number of tokens in the token's own document and d the width of the embeddings. There is no noise in
    evaluation, under ``no_grad`` (so not in ``generate`` either), nor on padding. It is drawn in fp32 from torch's
    generator of the device, so that the same seed gives the same noise in every dtype, and cast to the embeddings'
    dtype. Nothing waits for the device.

    Documents are told apart by the arguments of the model around the embeddings, whoever calls it:

    - ``cu_seq_lens_q`` [B + 1]: their boundaries.
    - ``position_ids`` [B, T], if there are no boundaries, or [4, B, T] with the positions of text first: a document
      begins wherever they do not go on by one. Positions of images alone, [3, B, T], are left out.
    - ``attention_mask`` [B, T]: 0 is padding, and a document also ends where the mask changes. Masks of other shapes
      (4-D, block masks) are left out.

    Without any of them a row is one document. A model that is called with ``inputs_embeds`` gets no noise.

    Args:
        model: anything with ``get_input_embeddings()``; of a PEFT model its adapters are there already. Wrappers
            (DistributedDataParallel, ``fully_shard``, ``torch.compile``) come afterwards.
        alpha: the paper takes 5 to 15.

    Returns:
        A :class:`Noise`. ``remove()`` ends the noise, and so does leaving a ``with`` block.

    Raises:
        ValueError: ``alpha`` is not a positive finite number; the model has no input embeddings, or it has noise
            already: remove that first.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise ValueError(f"alpha: expected a positive finite number, got {alpha!r}")
    get = getattr(model, "get_input_embeddings", None)
    embedding = None if get is None else get()
    if not isinstance(embedding, torch.nn.Module) or isinstance(embedding, torch.nn.ModuleList):
        raise ValueError(f"model: {type(model).__name__} has no single layer of input embeddings to add noise to")
    if any(isinstance(getattr(hook, "__self__", None), Noise) for hook in embedding._forward_hooks.values()):
        raise ValueError("model: it has noise already; remove() that first")
    return Noise(model, embedding, float(alpha))


class Noise:
    """The hooks of :func:`neftune` on one model."""

    def __init__(self, model, embedding, alpha):
        self.alpha = alpha
        layers = [embedding]
        if isinstance(embedding, torch.nn.Embedding):  # an encoder-decoder calls layers that share its weight
            others = (m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not embedding)
            layers += [m for m in others if m.weight is embedding.weight]
        self._hooks = [layer.register_forward_hook(self._add) for layer in layers]
        for module in _around(model, layers):
            self._hooks += [
                module.register_forward_pre_hook(self._enter, with_kwargs=True),
                module.register_forward_hook(self._leave, always_call=True),
            ]

    def remove(self):
        """End the noise; calling it again changes nothing."""
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.remove()

    def _enter(self, module, args, kwargs):
        stale = next((i for i, call in enumerate(_running.calls) if call[:2] == (self, module)), None)
        if stale is not None:  # Ctrl-C ended that call
            del _running.calls[stale:]
        _running.calls.append((self, module, arguments_of(module, args, kwargs)))

    def _leave(self, module, args, output):
        if _running.calls and _running.calls[-1][:2] == (self, module):
            _running.calls.pop()

    def _add(self, embedding, args, output):
        if not (embedding.training and torch.is_grad_enabled() and output.numel()):
            return None
        *rows, T, d = output.shape
        lengths, kept = _documents(math.prod(rows), T, output.device, **self._arguments())
        scale = self.alpha / (lengths * d).float().sqrt() * kept
        noise = torch.empty_like(output, dtype=torch.float32, requires_grad=False).uniform_(-1, 1)
        return output + (noise * scale.expand(math.prod(rows), T).reshape(*rows, T, 1)).to(output.dtype)

    def _arguments(self):
        """Returns what the calls in progress say of documents. The innermost model has the last word."""
        found = dict.fromkeys(("cu_seq_lens_q", "position_ids", "attention_mask"))
        for owner, module, given in reversed(_running.calls):
            if owner is self:
                found = {name: given.get(name) if value is None else value for name, value in found.items()}
                if "attention_mask" in parameters_of(type(module)):
                    break
        return found


class _Running(threading.local):
    def __init__(self):
        self.calls = []  # [(noise, module, arguments)], the outermost first


_running = _Running()


def _around(model, layers):
    """Returns the modules of ``model`` that hold one of ``layers``, once each."""
    paths = [name.split(".") for name, m in model.named_modules(remove_duplicate=False) if m in layers]
    names = {".".join(path[:i]) for path in paths for i in range(len(path))}
    return {id(module): module for module in map(model.get_submodule, sorted(names))}.values()


def _documents(B, T, device, cu_seq_lens_q, position_ids, attention_mask):
    """Returns `(lengths, kept)`, which broadcast to [B, T]: tokens in each token's document, and False in padding."""
    begins = torch.zeros(1, T - 1, dtype=torch.bool, device=device)  # of all tokens but a row's first
    kept = torch.ones(1, T, dtype=torch.bool, device=device)
    if isinstance(cu_seq_lens_q, torch.Tensor):
        token = torch.arange(B * T, device=device)
        begins = torch.searchsorted(cu_seq_lens_q.to(token), token, right=True).view(B, T).diff() != 0
    elif isinstance(position_ids, torch.Tensor):
        positions = position_ids[0] if position_ids.dim() == 3 and len(position_ids) == 4 else position_ids
        if _are_of_tokens(positions, B, T):
            begins = positions.diff() != 1
    if isinstance(attention_mask, torch.Tensor) and _are_of_tokens(attention_mask, B, T):
        begins = begins | (attention_mask.diff() != 0)
        kept = attention_mask != 0
    number = F.pad(begins, (1, 0)).cumsum(-1)  # never falls within a row, so a search finds both ends of a document
    return torch.searchsorted(number, number, right=True) - torch.searchsorted(number, number), kept


def _are_of_tokens(values, B, T):
    return values.dim() == 2 and values.shape[0] in (1, B) and values.shape[1] == T
