"""Checks of models that attend by our name: as they take it, and before each forward."""

import functools
import inspect
import re
import sys
import weakref

import torch

from .masks import GIVEN, NAME, current_call
from .once import once_a_forward

_models = weakref.WeakValueDictionary()  # by id, which a graph may hold as a constant
_refusals = weakref.WeakKeyDictionary()  # of each model, by the kind of call


# Models that join neighbouring tokens outside their layers.
_MIXES = {"mobilebert": "its embedding of a token holds both neighbours', also those of another packed example"}


def watch_models():
    """Check models of transformers that are given our name; calling it again changes nothing.

    transformers accepts a registered name for any model, also for one whose attention never asks for it. So the method
    by which a model accepts a name is wrapped. For other names it does what it did.
    """
    from transformers import PreTrainedModel

    accept = PreTrainedModel.get_correct_attn_implementation
    if getattr(accept, "checks_our_name", False):
        return

    @functools.wraps(accept)
    def checked(self, requested_attention, *args, **kwargs):
        if requested_attention in (NAME, GIVEN):
            _check_class(type(self), self.config)
            _models[id(self)] = self
            if _before not in self._forward_pre_hooks.values():
                self.register_forward_pre_hook(_before, with_kwargs=True)
        return accept(self, requested_attention, *args, **kwargs)

    checked.checks_our_name = True
    PreTrainedModel.get_correct_attn_implementation = checked


def _check_class(model_class, config):
    """Refuse a class whose attention never asks for ours, or that carries a state over the row."""
    name = model_class.__name__
    other = (
        f"attn_implementation={NAME!r} does not support {name}, which computes its attention itself; "
        "use attn_implementation='eager'"
    )
    if _has_a_table_of_attentions(model_class):
        raise ValueError(other)
    if not _is_text(config) or "text" not in model_class.input_modalities:
        return  # the model of the text, inside or beside it, is asked itself
    if not model_class._can_set_attn_implementation():
        raise ValueError(other)
    if model_class._is_stateful:
        raise ValueError(
            f"attn_implementation={NAME!r} does not support {name}: its layers carry a state from one packed example "
            "into the next; use attn_implementation='sdpa' and one example a row"
        )


@functools.cache
def _has_a_table_of_attentions(model_class):
    """Returns True if the class's file looks attention classes up by their name, where ours would be a KeyError."""
    try:
        source = inspect.getsource(sys.modules[model_class.__module__])
    except (KeyError, OSError, TypeError):
        return False
    return re.search(r"_CLASSES\[\w*\.?_attn_implementation\]", source) is not None


def _is_text(config):
    return config.get_text_config() is config


def refuse_output_attentions():
    raise ValueError(
        f"output_attentions: attn_implementation={NAME!r} does not compute attention weights; "
        "use attn_implementation='eager'"
    )


def _before(model, args, kwargs):
    """Refuse a call that our attention cannot see to be wrong."""
    if model.config._attn_implementation not in (NAME, GIVEN):
        return
    compiling = torch.compiler.is_compiling()
    if not compiling:
        _models[id(model)] = model  # a copy of a model brings the hook alone
        kwargs = {**dict(zip(_arguments(type(model)), args, strict=False)), **kwargs}
        _check_mask(kwargs.get("attention_mask"))
    if kwargs.get("output_attentions"):
        refuse_output_attentions()
    mask, positions, boundaries = (kwargs.get(n) for n in ("attention_mask", "position_ids", "cu_seq_lens_q"))
    restarts = not compiling and boundaries is None and _restarts(model, positions, mask)
    if not compiling:
        current_call.restarts, current_call.masked = restarts, mask is not None
    if boundaries is None and not restarts:
        return
    if message := _refusal(id(model), positions is not None, boundaries is not None):
        raise ValueError(message)
    if compiling:
        types = (kwargs.get(name) for name in ("token_type_ids", "mm_token_type_ids"))
        if not _is_text(model.config) and any(given is not None for given in types):
            raise ValueError(
                f"token_type_ids: attn_implementation={NAME!r} cannot see under torch.compile what mask they make"
            )
    elif positions is not None and (first := first_position(model)) and positions.min() < first:
        raise ValueError(
            f"position_ids: {type(model).__name__} counts positions from {first}, got {int(positions.min())}"
        )


def _restarts(model, positions, mask):
    """Returns True if the positions of a row restart between tokens that ``mask`` keeps; waits for the device."""
    prepared = isinstance(mask, dict) or (isinstance(mask, torch.Tensor) and mask.dim() == 4)
    if positions is None or prepared:
        return False
    if positions.dim() == 2:
        if positions.shape[1] == 1:  # decoding
            return False
        if not isinstance(mask, torch.Tensor) or mask.shape[-1] != positions.shape[1]:
            return _jump(positions)
        kept = mask.bool()
        return bool(((positions.diff() != 1) & kept[:, 1:] & kept[:, :-1]).any())
    # Positions of images and words, which the model around the text's expands from those that it is given.
    return _is_text(model.config) and current_call.restarts


@once_a_forward
def _jump(positions):
    return bool((positions.diff() != 1).any())


@functools.cache
def _arguments(model_class):
    return tuple(inspect.signature(model_class.forward).parameters)[1:]


def _check_mask(mask):
    """Refuse a 2-D mask of segment numbers, which transformers would read as a mask of ones."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or mask.dtype == torch.bool or not mask.numel():
        return
    if mask.max() > 1:
        raise ValueError(
            "attention_mask: transformers reads each number other than 0 as 1, so that segment numbers are lost; "
            "pass position_ids that restart with each example, or cu_seq_lens_q"
        )


@torch._dynamo.assume_constant_result
def _refusal(key, positions, boundaries):
    """Returns None, or why the model with this id cannot keep packed examples apart.

    ``positions`` and ``boundaries`` say if the call has position_ids and cu_seq_lens_q.
    """
    model = _models.get(key)
    if model is None:
        return None
    known = _refusals.setdefault(model, {})
    if (positions, boundaries) not in known:
        known[positions, boundaries] = _find_refusal(model, positions, boundaries)
    return known[positions, boundaries]


def _find_refusal(model, positions, boundaries):
    if not _is_text(model.config):
        return None
    name = type(model).__name__
    if model.config.is_encoder_decoder and boundaries:
        return f"cu_seq_lens_q: attn_implementation={NAME!r} does not support encoder-decoders"
    if not any("position_ids" in _arguments(type(m)) for m in model.modules() if hasattr(m, "config")):
        return f"position_ids: {name} takes none, so that positions would not restart with each packed example"
    if boundaries and not positions and _position_tables(model):
        return f"position_ids: {name} needs them beside cu_seq_lens_q, restarting with each packed example"
    if model.config.model_type in _MIXES:
        return f"attn_implementation={NAME!r} does not support {name}: {_MIXES[model.config.model_type]}"
    if layer := _layer_without_attention(model):
        return (
            f"attn_implementation={NAME!r} does not support {name}: {layer} mixes tokens without attention, "
            "across the boundaries of packed examples; use one example a row"
        )
    return None


def _layer_without_attention(model):
    """Returns None if every layer asks transformers' AttentionInterface, else a name for the first that does not."""
    asks = {m for m in model.modules() if "get_interface" in inspect.unwrap(type(m).forward).__code__.co_names}
    if not asks:
        return "each layer"
    for name, layers in model.named_modules():
        if not isinstance(layers, torch.nn.ModuleList):
            continue
        without = [i for i, layer in enumerate(layers) if asks.isdisjoint(layer.modules())]
        if without and len(without) < len(layers):
            return f"{name}.{without[0]}"
    return None


def _position_tables(model):
    """Returns the modules of ``model`` that look positions up in a table."""
    name = re.compile(r"(wpe|position_embeddings?|embed_positions)$")
    return [m for path, m in model.named_modules() if name.search(path) and _is_table(m)]


def _is_table(module):
    return isinstance(module, torch.nn.Embedding) or hasattr(module, "padding_idx")


def first_position(model):
    """Returns the first position that ``model`` has an embedding for."""
    paddings = [getattr(m, "padding_idx", None) for m in _position_tables(model)]
    return max((padding + 1 for padding in paddings if padding is not None), default=0)
