"""Counts what a forward of a model keeps for backward and multiplies, without memory for either.

The model is built on the meta device and its packed forward runs on fake tensors, which have shapes
and no numbers. Attention is the operator of the Triton kernels, as on a GPU. Autocast is that of the
CPU, since torch without CUDA cannot pretend to have a GPU: products are in bf16 under both.
"""

import copy
import logging
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .._terminal import reason_of
from . import dropout as dropouts
from . import files, folders, hub
from . import model as models
from .packing import Batch

_BY_LENGTH = ("dynamic", "longrope")  # rotary embeddings that read positions, of the same shapes


class Counted(NamedTuple):
    """A model and one forward and loss of it. Bytes are those of distinct storages.

    With checkpointing backward needs ``between``, and ``largest`` while it computes that layer again.
    Both are None for a model that cannot checkpoint.
    """

    parameters: int  # tied ones once
    outside: int  # parameters outside of the layers
    layer: int  # parameters of the largest layer
    head: tuple[int, int]  # [V, D]
    hidden: torch.dtype  # of the hidden states that the loss is given
    kept: int  # bytes that backward needs beside parameters and their copies
    copies: int  # bytes of the weights that autocast copies to bf16, which live until the forward ends
    between: int | None  # bytes of the layers' inputs, and of what is kept outside of the layers
    largest: int | None  # bytes that one layer keeps beside that
    products: int  # FLOPs of the forward's matrix products, the head left out
    attention: int  # FLOPs of the forward's attention: the pairs of tokens that see each other


def count(config, examples, dtype, autocast):
    """Returns :class:`Counted` of a packed row of ``examples``, with parameters in ``dtype``.

    ``examples`` says how many there are of each length, ``{length: number}``.

    Raises:
        ValueError: a model that the trainer refuses, or one that reads numbers in its forward.
    """
    name = config.model_type
    try:
        with _quiet(), hub.unasked():
            return _forward(_model_of(config, dtype), examples, autocast)
    except Exception as error:
        raise ValueError(f"model: {name} cannot be planned ({reason_of(error)})") from error


def read_config(path, trust_remote_code=False):
    """The transformers config at ``path``, a folder or a file. Weights need not be there."""
    from transformers import AutoConfig

    if str(path).startswith(hub.PREFIX):
        raise ValueError("model: expected a folder or a config; a plan fetches nothing from the hub")
    path, _ = folders.settings_of(path, trust_remote_code)
    try:
        with hub.unasked():
            return AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        file = path / files.CONFIG if path.is_dir() else path
        raise ValueError(f"model: {file} cannot be loaded ({reason_of(error)})") from error


@contextmanager
def _quiet():
    """Hold back torch's log of operators that fake tensors cannot take; the error is raised."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _model_of(config, dtype):
    from transformers import AutoModelForCausalLM

    from ..integrations import calls, register

    register()
    config = _of_any_length(dropouts.with_dropout(config, 0.0)[0])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=calls.NAME)
    return model.train()


def _of_any_length(config):
    """A copy of ``config`` whose rotary embeddings do not read how long a row is."""
    config = copy.deepcopy(config)
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    for kind in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if kind.get("rope_type") in _BY_LENGTH:
            kind["rope_type"] = "default"
    return config


def _numbers(module):
    return sum(p.numel() for p in module.parameters())


def _layers(model):
    """The layers that checkpointing computes again, none of them inside of another."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found, inside = [], set()
    for module in model.modules():  # from the outside in
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            found.append(module)
            inside.update(module.modules())
    return found


def _forward(model, examples, autocast):
    from torch._subclasses.fake_tensor import FakeTensorMode

    total, layers = _numbers(model), [_numbers(layer) for layer in _layers(model)]
    with FakeTensorMode():
        _give_shapes(model)
        batch, saved, watch = _batch(examples), Saved(model), _Watch(model, examples)
        cast = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
        with _kernels(batch), models.boundaries_given(model), cast, saved, watch:
            hidden = models.hidden_states(model, batch)
        saved.keep(hidden)  # which the loss does
        head = models.head(model)["linear_weight"]
    between, largest = saved.checkpointed(watch.copies)
    return Counted(
        parameters=total,
        outside=total - sum(layers),
        layer=max(layers, default=0),
        head=tuple(head.shape),
        hidden=hidden.dtype,
        kept=saved.bytes(watch.copies),
        copies=sum(storage.nbytes() for storage in watch.copies.values()),
        between=between,
        largest=largest,
        products=watch.products,
        attention=watch.attention,
    )


def _give_shapes(model):
    """Put fake tensors on the CPU in the place of parameters and buffers on the meta device."""
    made = {}

    def fake(tensor):
        if tensor not in made:
            like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            made[tensor] = torch.nn.Parameter(like) if isinstance(tensor, torch.nn.Parameter) else like
        return made[tensor]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: fake(t) for name, t in tensors.items() if t is not None})


def _batch(examples):
    """The examples laid end to end, as :func:`~.packing.collate` does, without labels."""
    number = sum(examples.values())
    tokens = torch.zeros(1, sum(length * each for length, each in examples.items()), dtype=torch.long)
    bounds = torch.zeros(number + 1, dtype=torch.int32)
    return Batch(tokens, tokens.clone(), bounds, max(examples), None, None, number, 1)


@contextmanager
def _kernels(batch):
    """Let packed attention take the GPU's kernels for tensors without numbers.

    By itself it leaves them to torch, which forms the scores of all pairs of a row. The tiles are
    shared by the layers, as on a GPU.
    """
    from ..ops.packed_attention import api, triton_impl
    from ..ops.packed_attention.tiles import AttentionTiles

    tiles = AttentionTiles.from_cu_seqlens(batch.cu_seqlens, batch.tokens)

    def attend(*tensors, **options):
        return triton_impl.packed_attention(*tensors, **{**options, "tiles": tiles})

    before, api.resolve = api.resolve, lambda *_, **__: attend
    try:
        yield
    finally:
        api.resolve = before


class Saved(saved_tensors_hooks):
    """Notes the storages that autograd keeps for backward, and in which layer of ``model``.

    Parameters and buffers, which are there anyway, are left out.
    """

    def __init__(self, model):
        super().__init__(self.keep, lambda tensor: tensor)
        self.model, self.layer = model, None
        self.anyway = {_key(t) for t in (*model.parameters(), *model.buffers())}
        self.storages = {}  # held, so that none gets the address of another
        self.inputs = set()  # keys of the layers' inputs
        self.of = {None: set()}  # keys of what is kept, by layer

    def __enter__(self):
        self.handles = []
        for layer in _layers(self.model):
            self.of[layer] = set()
            self.handles.append(layer.register_forward_pre_hook(self._into, with_kwargs=True))
            self.handles.append(layer.register_forward_hook(self._out_of))
        return super().__enter__()

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()
        return super().__exit__(*error)

    def keep(self, tensor):
        self._note(tensor, self.of[self.layer])
        return tensor

    def bytes(self, leave_out=()):
        """The bytes that are kept, without those of the keys in ``leave_out``."""
        return self._sum(set().union(*self.of.values()) - set(leave_out))

    def checkpointed(self, leave_out=()):
        """Returns ``(between, largest)`` as in :class:`Counted`, without the keys in ``leave_out``."""
        between, *layers = ({*keys} - set(leave_out) for keys in self.of.values())
        between |= self.inputs
        if not layers:
            return None, None
        return self._sum(between), max(self._sum(keys - between) for keys in layers)

    def _note(self, tensor, keys):
        key = _key(tensor)
        if key not in self.anyway:
            self.storages[key] = tensor.untyped_storage()
            keys.add(key)

    def _sum(self, keys):
        return sum(self.storages[key].nbytes() for key in keys)

    def _into(self, layer, args, kwargs):
        self.layer = layer
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, torch.Tensor):
                self._note(given, self.inputs)

    def _out_of(self, layer, args, output):
        self.layer = None


class _Watch(TorchDispatchMode):
    """Counts the FLOPs of products and attention, and notes the copies of weights in bf16."""

    def __init__(self, model, examples):
        super().__init__()
        self.weights, self.examples = {_key(p) for p in model.parameters()}, examples
        self.products, self.attention, self.copies = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        from torch.utils.flop_counter import flop_registry

        if func is torch.ops.aten._grouped_mm.default:  # of experts; torch does not count it, nor pretend it in fp32
            out = args[0].new_empty(len(args[0]), args[1].shape[-1])
            self.products += 2 * out.numel() * args[0].shape[-1]
            return out
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16 and _key(args[0]) in self.weights:
            self.copies[_key(out)] = out.untyped_storage()
        elif func is torch.ops.sft_kernels.packed_attention.default:
            query, _, value, *_, window, _ = args
            pairs = sum(_pairs(length, *window) * number for length, number in self.examples.items())
            self.attention += 2 * pairs * query.shape[1] * (query.shape[2] + value.shape[2])
        elif flops := flop_registry.get(func._overloadpacket):
            self.products += flops(*args, **(kwargs or {}), out_val=out)
        return out


def _pairs(length, left, right):
    """The pairs of a query and a key that it sees, in an example of ``length``."""
    if right != 0:
        return length**2
    window = min(length, left + 1 if left >= 0 else length)
    return window * (window + 1) // 2 + (length - window) * window


def _key(tensor):
    return tensor.untyped_storage()._cdata
