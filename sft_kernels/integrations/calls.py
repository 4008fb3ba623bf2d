"""Calls of models that attend by our name: what each may do, and where its packed examples begin.

A forward pre-hook decides once a call, before anything is computed. Masks and layers go by that decision.
"""

import functools
import inspect
import re
import sys
import threading
import weakref
from contextlib import contextmanager, nullcontext

import torch
from torch._dynamo.eval_frame import skip_code

from ..ops.packed_attention.tiles import AttentionTiles
from . import rotary

NAME = "sft_kernels"
GIVEN = f"{NAME}_boundaries_given"  # the same attention for a caller that always passes cu_seq_lens_q: no mask is made

# Models that join tokens outside their layers.
_MIXES = {
    "blt": "it joins bytes to patches, also across the boundaries of packed examples",
    "mobilebert": "its embedding of a token holds both neighbours', also those of another packed example",
}

_models = weakref.WeakValueDictionary()  # by id, which a graph may hold as a constant
_refusals = weakref.WeakKeyDictionary()  # of each model: None, or why it takes no packed rows
_firsts = weakref.WeakKeyDictionary()  # of each model: the first position that it has an embedding for
_inside = weakref.WeakKeyDictionary()  # of each model, the models inside


class Call:
    """One forward of a model, and of the models inside it.

    Attributes:
        boundaries: ``[B + 1]`` of the packed examples, or None if the call is no packed row.
        max_length: a bound on the examples' lengths, or None.
        T: the number of tokens in the row.
        masked: True if the call has an attention_mask, which then has been looked at.
        own_rotary: True if rotary embeddings must be computed for each example alone.
    """

    def __init__(self, model, T, boundaries=None, max_length=None, masked=False, own_rotary=False):
        self.model, self.T, self.own_rotary = weakref.ref(model), T, own_rotary
        self.boundaries, self.max_length, self.masked = boundaries, max_length, masked
        self._tiles = None

    def tiles(self, device):
        """Returns the tiles of the row, built once a call."""
        if self._tiles is None:
            self._tiles = AttentionTiles.from_cu_seqlens(self.boundaries, self.T, device=device)
        return self._tiles


class _Running(threading.local):
    def __init__(self):
        self.calls = []  # [(model, call)], the outermost first


_running = _Running()


def current():
    """Returns the innermost :class:`Call` of this thread, or None."""
    return _running.calls[-1][1] if _running.calls else None


def for_recomputation():
    """The ``context_fn`` of a checkpoint: a layer that backward computes again sees the call that it was part of.

    Some layers (StableLM's, Nemotron's) do not hand the boundaries on to their attention, which then has them from the
    call alone. And the layers share its tiles again.
    """
    return nullcontext(), _again(current())


@contextmanager
def _again(call):
    _running.calls.append((None, call))
    try:
        yield
    finally:
        _running.calls.pop()


# ---- models that take the name


def watch_models():
    """Check models of transformers that are given our name; calling it again changes nothing.

    transformers accepts a registered name for any model, also for one whose attention never asks for it. So the methods
    by which a model takes a name are wrapped. For other names they do what they did.
    """
    from transformers import PreTrainedModel

    accept, change = PreTrainedModel.get_correct_attn_implementation, PreTrainedModel.set_attn_implementation
    if getattr(accept, "checks_our_name", False):
        return

    @functools.wraps(accept)
    def get_correct_attn_implementation(self, requested_attention, *args, **kwargs):
        if requested_attention in (NAME, GIVEN):
            _check_class(type(self), self.config)
            _watch(self)
        return accept(self, requested_attention, *args, **kwargs)

    @functools.wraps(change)
    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        if attn_implementation in (NAME, GIVEN):  # a class that cannot be set is only warned of by transformers
            _check_class(type(self), self.config)
        change(self, attn_implementation, *args, **kwargs)
        for model in self.modules():  # transformers asks one model for each configuration
            if isinstance(model, PreTrainedModel) and model.config._attn_implementation in (NAME, GIVEN):
                _watch(model)

    get_correct_attn_implementation.checks_our_name = True
    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation
    PreTrainedModel.set_attn_implementation = set_attn_implementation


def _watch(model):
    """Let the hooks see the calls of ``model``."""
    _models[id(model)] = model
    if _before not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_before, with_kwargs=True)
        model.register_forward_hook(_after, with_kwargs=True, always_call=True)


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


# ---- before and after each call


def _before(model, args, kwargs):
    """Decide what the call is; returns None, or the arguments of a packed call, completed."""
    if model.config._attn_implementation not in (NAME, GIVEN):
        return None
    if torch.compiler.is_compiling():
        return _before_a_graph(model, args, kwargs)
    return _before_eagerly(model, args, kwargs)


@torch.compiler.disable
def _before_eagerly(model, args, kwargs):
    _models[id(model)] = model  # a copy of a model brings the hooks alone
    outer = current()
    if outer is not None and _is_inside(model, outer.model()):
        _running.calls.append((model, outer))
        return None
    _running.calls.append((model, None))  # until it is decided; taken off by _after, whatever happens
    given = arguments_of(model, args, kwargs)
    call = _decide(model, given)
    _running.calls[-1] = (model, call)
    return None if call.boundaries is None else _completed(model, call, given, args, kwargs)


def _completed(model, call, given, args, kwargs):
    """Returns the arguments of a packed call with what it lacks, so that compiled parts of the model go by it, too."""
    accepted = parameters_of(type(model))
    filled = {"cu_seq_lens_q": call.boundaries, "attention_mask": None}
    if given.get("position_ids") is None:
        filled["position_ids"] = _positions(call.boundaries, call.T) + first_position(model)
    takes_all = _takes_any(type(model))
    filled = {name: value for name, value in filled.items() if takes_all or name in accepted}
    args = tuple(filled.pop(name, value) for name, value in zip(accepted, args, strict=False))
    return args, {**kwargs, **filled}


def _after(model, args, kwargs, output):
    if not torch.compiler.is_compiling() and _running.calls and _running.calls[-1][0] is model:
        _running.calls.pop()


def _watch_rotary(model):
    """Let :func:`_after_rotary` see the rotary modules of ``model``; returns False if there are none that it knows."""
    found = rotary.modules(model)
    for module in found:
        if _after_rotary not in module._forward_hooks.values():
            module.register_forward_hook(_after_rotary, with_kwargs=True)
    return bool(found)


def _after_rotary(module, args, kwargs, output):
    """Replace rotary embeddings of a packed row by those of each example alone."""
    if torch.compiler.is_compiling():
        return rotary.assert_short(module, args, kwargs)
    return _after_rotary_eagerly(module, args, kwargs)


@torch.compiler.disable
def _after_rotary_eagerly(module, args, kwargs):
    call = current()
    positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
    if call is not None:
        boundaries = call.boundaries if call.own_rotary else None
        if boundaries is not None and positions.shape[-1] != call.T:
            raise ValueError(rotary.message(rotary.limit(module.config)))
    elif module.config._attn_implementation in (NAME, GIVEN) and len(positions) == 1:  # a layer that is recomputed
        boundaries = _found(positions, None)
    else:
        boundaries = None
    return None if boundaries is None else rotary.by_example(module, args, kwargs, boundaries)


# Parts of a graph, or run as they are written, but no graphs of their own: is_compiling() would say the wrong thing.
for _hook in (_before, _after, _after_rotary):
    skip_code(_hook.__code__)


def _is_inside(model, outer):
    if outer not in _inside:
        _inside[outer] = weakref.WeakSet(m for m in outer.modules() if hasattr(m, "config"))
    return model in _inside[outer]


def arguments_of(model, args, kwargs):
    """Returns the arguments of a call of ``model`` by name."""
    return {**dict(zip(parameters_of(type(model)), args, strict=False)), **kwargs}


@functools.cache
def parameters_of(model_class):
    """Returns the names of the parameters of a class's forward, without ``self``."""
    return tuple(inspect.signature(model_class.forward).parameters)[1:]


@functools.cache
def _takes_any(model_class):
    kinds = (parameter.kind for parameter in inspect.signature(model_class.forward).parameters.values())
    return inspect.Parameter.VAR_KEYWORD in kinds


def _decide(model, given):
    """Returns the :class:`Call`, or raises ``ValueError`` for one that would be computed wrongly."""
    _refuse_weights(model, given)
    tokens = next((given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), None)
    mask, cu_seqlens = given.get("attention_mask"), given.get("cu_seq_lens_q")
    if _has_numbers(mask) and mask.max() > 1:
        raise ValueError(_SEGMENT_NUMBERS)
    if cu_seqlens is None:
        if other := next((name for name in ("cu_seq_lens_k", "cu_seqlens") if given.get(name) is not None), None):
            raise ValueError(f"cu_seq_lens_q: the boundaries are expected under this name, got {other}")
        cu_seqlens = _found(given.get("position_ids"), mask)
    elif not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"cu_seq_lens_q: expected a tensor of shape [B + 1], got {cu_seqlens!r}")
    if tokens is None or cu_seqlens is None:
        return Call(model, None if tokens is None else tokens.shape[1], masked=mask is not None)
    if message := _refuse_packed(model, given, tokens):
        raise ValueError(message)
    if mask is not None and not (mask.dim() == 2 and bool(mask.all())):
        raise ValueError(
            f"attention_mask: attn_implementation={NAME!r} takes packed rows without padding or masks of your own; "
            "leave padding out, or make it an example of its own"
        )
    positions = given.get("position_ids")
    if positions is not None and (first := first_position(model)) and positions.min() < first:
        raise ValueError(
            f"position_ids: {type(model).__name__} counts positions from {first}, got {int(positions.min())}"
        )
    own_rotary = False
    if limit := rotary.limit(model.config):
        reached = _positions(cu_seqlens, tokens.shape[1]) if positions is None else positions
        length = int(reached.max()) + 1
        own_rotary = length >= limit and _watch_rotary(model)  # at the limit, an earlier call's frequencies would stay
        if length > limit and not own_rotary:
            raise ValueError(rotary.message(limit))
    return Call(model, tokens.shape[1], cu_seqlens, given.get("max_length_q"), masked=True, own_rotary=own_rotary)


def _before_a_graph(model, args, kwargs):
    """The part of :func:`_before` that torch.compile can trace. Values are looked at as the graph runs."""
    given = arguments_of(model, args, kwargs)
    _refuse_weights(model, given)
    positions, cu_seqlens, mask = (given.get(n) for n in ("position_ids", "cu_seq_lens_q", "attention_mask"))
    tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    if _has_numbers(mask):
        torch._assert_async(mask.max() <= 1, _SEGMENT_NUMBERS)
    if cu_seqlens is None:
        if positions is not None and mask is not None and len(positions) == 1 and positions.shape[-1] > 1:
            raise ValueError(f"cu_seq_lens_q: {COMPILED}, and packed rows go without attention_mask")
        return None
    if message := _refuse_packed(model, given, tokens):
        raise ValueError(message)
    if mask is not None:
        raise ValueError("attention_mask: leave it out beside cu_seq_lens_q under torch.compile")
    if not _is_text(model.config) and any(given.get(n) is not None for n in ("token_type_ids", "mm_token_type_ids")):
        raise ValueError(f"token_type_ids: attn_implementation={NAME!r} cannot see under torch.compile what they mask")
    first, limit = _first_position(id(model)), rotary.limit(model.config)
    if positions is None:
        positions = _positions(cu_seqlens, tokens.shape[1]) + first
        kwargs = {**kwargs, "position_ids": positions}
    elif first:
        torch._assert_async(positions.min() >= first, f"position_ids: this model counts positions from {first}")
    if limit:
        torch._assert_async(positions.max() < limit, rotary.message(limit))
    return args, kwargs


_SEGMENT_NUMBERS = (
    "attention_mask: transformers reads each number other than 0 as 1, so that segment numbers are lost; "
    "pass position_ids that restart with each example, or cu_seq_lens_q"
)
COMPILED = (
    f"attn_implementation={NAME!r} needs the packed examples' boundaries under torch.compile, where position_ids do "
    "not do instead"
)


def _has_numbers(mask):
    return isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.dtype != torch.bool and mask.numel() > 0


def _refuse_weights(model, given):
    if given.get("output_attentions") or getattr(model.config, "output_attentions", False):
        raise ValueError(
            f"output_attentions: attn_implementation={NAME!r} does not compute attention weights; "
            "use attn_implementation='eager'"
        )


def _refuse_packed(model, given, tokens):
    """Returns None, or why this call of the model cannot be a packed row, from shapes and names alone."""
    if len(tokens) != 1:
        return (
            f"cu_seq_lens_q, position_ids: attn_implementation={NAME!r} takes one packed row, got {len(tokens)} rows; "
            "join them to one"
        )
    if any(given.get(name) is not None for name in ("past_key_values", "cache")):
        return f"past_key_values: attn_implementation={NAME!r} takes packed rows without a cache"
    if given.get("encoder_hidden_states") is not None:
        return f"encoder_hidden_states: attn_implementation={NAME!r} does not support cross-attention of packed rows"
    if given.get("position_ids") is None and not _is_text(model.config):
        return f"position_ids: {type(model).__name__} needs them beside cu_seq_lens_q, restarting with each example"
    return _refusal(id(model))


@torch._dynamo.assume_constant_result
def _refusal(key):
    """Returns None, or why the model with this id cannot keep packed examples apart."""
    model = _models.get(key)
    if model is None:
        return f"attn_implementation={NAME!r} does not know this copy of a model; call it once without torch.compile"
    if model not in _refusals:
        _refusals[model] = _find_refusal(model)
    return _refusals[model]


def _find_refusal(model):
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        return f"cu_seq_lens_q: attn_implementation={NAME!r} does not support encoder-decoders"
    if reason := _MIXES.get(model.config.model_type):
        return f"attn_implementation={NAME!r} does not support {name}: {reason}"
    if not _is_text(model.config):
        text = model.config.get_text_config()
        model = next((m for m in model.modules() if getattr(m, "config", None) is text), model)
    if not any("position_ids" in parameters_of(type(m)) for m in model.modules() if hasattr(m, "config")):
        return f"position_ids: {name} takes none, so that positions would not restart with each packed example"
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


# ---- positions


def _found(positions, mask):
    """Returns the boundaries of examples whose positions restart between tokens that ``mask`` keeps, or None."""
    if positions is None or isinstance(mask, dict) or (isinstance(mask, torch.Tensor) and mask.dim() == 4):
        return None  # a mask that is ready says itself who sees whom
    if positions.dim() == 3 and len(positions) == 4:  # those of text, then those of images
        positions = positions[0]
    if positions.dim() not in (2, 3):
        raise ValueError(f"position_ids: expected shape [1, T], got {tuple(positions.shape)}")
    if positions.shape[-1] <= 1:  # decoding
        return None
    kept = True
    if isinstance(mask, torch.Tensor) and mask.shape[-1] == positions.shape[-1]:
        kept = mask.bool()[:, 1:] & mask.bool()[:, :-1]
    if positions.dim() == 3:  # an image's tokens share a position, and nothing goes back within an example
        if bool(((positions[0].diff() < 0) & kept).any()):
            raise ValueError(
                "position_ids: positions of images say too little of where packed examples begin; pass cu_seq_lens_q, "
                "or [4, 1, T] with the positions of text first"
            )
        return None
    jumps = (positions.diff() != 1) & kept
    if len(positions) > 1:
        return _starts(jumps.any(0)) if bool(jumps.any()) else None  # several rows, which are refused
    boundaries = _starts(jumps[0])
    return boundaries if len(boundaries) > 2 else None


def boundaries_of(positions):
    """``[B + 1]`` int32: an example begins where the positions [1, T] do not go on by one."""
    return _starts(positions[0].diff() != 1)


def _starts(jumps):
    starts = jumps.nonzero()[:, 0] + 1
    return torch.nn.functional.pad(torch.nn.functional.pad(starts, (1, 0)), (0, 1), value=len(jumps) + 1).int()


def _positions(boundaries, T):
    """Positions [1, T] that restart at each boundary."""
    row = torch.arange(T, device=boundaries.device)
    example = torch.searchsorted(boundaries, row.to(boundaries.dtype), right=True) - 1
    return (row - boundaries[example])[None]


def first_position(model):
    """Returns the first position that ``model`` has an embedding for."""
    if model not in _firsts:
        name = re.compile(r"(wpe|position_embeddings?|embed_positions)$")
        tables = [m for path, m in model.named_modules() if name.search(path)]
        paddings = [getattr(table, "padding_idx", None) for table in tables]
        _firsts[model] = max((padding + 1 for padding in paddings if padding is not None), default=0)
    return _firsts[model]


@torch._dynamo.assume_constant_result
def _first_position(key):
    return first_position(_models[key])
