"""Rotary embeddings that change with the longest position of a row: each packed example gets its own.

Two kinds of transformers do so, past the length that the model was first trained with. ``longrope`` takes other
frequencies. ``dynamic`` takes frequencies of the longest length, and keeps them until a short row comes.
"""

import torch

_KINDS = ("longrope", "dynamic")
_ARGUMENTS = ("x", "position_ids", "layer_type")


def limit(config):
    """Returns None, or the length up to which no example changes the rotary embeddings of its row."""
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    kinds = [
        parameters,
        *(value for value in parameters.values() if isinstance(value, dict)),
    ]  # one, or one a layer type
    limits = []
    for kind in kinds:
        if _depends_on_length(kind.get("rope_type")):
            own = kind.get("original_max_position_embeddings"), getattr(text, "max_position_embeddings", None)
            limits += [length for length in own if length]
    return min(limits, default=None)


def message(limit):
    """Returns the reason why a row with a longer example is refused."""
    return (
        f"position_ids: with this model's rotary embeddings an example of more than {limit} tokens would change all "
        "others of its row; pack only shorter ones"
    )


def modules(model):
    """Returns the modules of ``model`` whose rotary embeddings :func:`by_example` can compute."""
    return [module for module in model.modules() if _is_rotary(module)]


def forget_lengths(model):
    """Leave the rotary embeddings of ``model`` as they were before its first call."""
    for module in modules(model):
        kinds = module.rope_type if isinstance(module.rope_type, dict) else {None: module.rope_type}
        for layer_type, kind in kinds.items():
            _forget_length(module, kind, layer_type)


def by_example(module, args, kwargs, boundaries):
    """Returns the output of the rotary ``module`` with each example computed as if it were alone, or None.

    None stands for a module whose embeddings do not depend on the row's length. Examples within the limit share one
    call, as do examples of one length.
    """
    given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
    layer_type = given.get("layer_type")
    kind = module.rope_type if layer_type is None else module.rope_type[layer_type]
    if not _depends_on_length(kind):
        return None
    positions = given.pop("position_ids")
    outputs, order = [], []
    for where in _of_one_length(positions, boundaries, limit(module.config)):
        _forget_length(module, kind, layer_type)
        output = module.forward(position_ids=positions[..., where], **given)
        outputs.append(output if isinstance(output, tuple) else (output,))
        order.append(where)
        if any(part.shape[-2] != len(where) for part in outputs[-1]):
            raise ValueError(message(limit(module.config)))
    _forget_length(module, kind, layer_type)
    back = torch.cat(order).argsort()
    whole = tuple(torch.cat(parts, -2).index_select(-2, back) for parts in zip(*outputs, strict=True))
    return whole if isinstance(output, tuple) else whole[0]


def assert_short(module, args, kwargs):
    """Let a compiled graph stop at a packed row that :func:`by_example` would have to compute."""
    given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
    positions = given["position_ids"]
    if positions.dim() == 2 and positions.shape[0] == 1 and positions.shape[1] > 1:
        length = limit(module.config)
        packed = (positions.diff() != 1).any()
        torch._assert_async(~(packed & (positions.max() >= length)), message(length))


def _of_one_length(positions, boundaries, limit):
    """Returns lists of tokens, as tensors of indices: the examples within ``limit``, then one list for each length."""
    T = positions.shape[-1]
    row = torch.arange(T, device=positions.device)
    example = torch.searchsorted(boundaries.to(row), row, right=True)
    highest = positions.reshape(-1, T).amax(0)
    longest = torch.zeros(len(boundaries) + 1, dtype=highest.dtype, device=highest.device)
    longest = longest.scatter_reduce(0, example, highest, "amax").clamp(min=limit - 1)
    of_token = longest[example].cpu()
    return [(of_token == length).nonzero()[:, 0].to(positions.device) for length in of_token.unique()]


def _forget_length(module, kind, layer_type):
    """Put the frequencies of short rows back. ``longrope`` chooses them anew in each call."""
    if kind is None or "dynamic" not in kind:
        return
    prefix = "" if layer_type is None else f"{layer_type}_"
    original = getattr(module, f"{prefix}original_inv_freq")
    module.register_buffer(f"{prefix}inv_freq", original, persistent=False)
    setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _depends_on_length(kind):
    return isinstance(kind, str) and any(name in kind for name in _KINDS)


def _is_rotary(module):
    """Returns True if transformers' ``dynamic_rope_update`` wraps the module's forward."""
    function = type(module).forward
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is not None and "dynamic_frequency_update" in code.co_freevars:
            return hasattr(module, "rope_type") and hasattr(module, "config")
        function = getattr(function, "__wrapped__", None)
    return False
