"""``patch(model)``: a Hugging Face causal LM whose logits, in training, are lazy."""

import functools
import types
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..ops.linear_cross_entropy.head import why_not_a_matrix
from . import fused, recorded, watch  # noqa: F401  (what lazy logits do)
from .heads import HeadCall
from .lazy import LazyLogits


class HeadCounts(NamedTuple):
    """Counts of the events at the patched heads of a model since :func:`patch`."""

    calls: int  # of a head, in training
    fused: int  # losses and statistics that the fused op computed
    materialised: int  # calls whose real logits were computed


@dataclass
class HeadState:
    """The state of a patched head beside its parameters; copied and pickled with it."""

    name: str
    log: bool
    seen: int = 0  # calls in training mode, also of real logits
    calls: int = 0
    fused: int = 0
    materialised: int = 0
    checked: bool = False  # whether the first result was compared with the unpatched head's
    statistics_wanted: bool = False  # whether a trainer asks for more than the loss
    remembers: bool = False  # whether losses leave their statistics behind
    joined: bool = False  # whether the model may add another layer's result to this one's


class LazyHead(torch.nn.Linear):
    """An output head whose result, in training, is :class:`LazyLogits`.

    It stands between ``torch.nn.Linear`` and a class of the model's that extends it, so that what this class does
    around the product is still done.
    """

    stock = torch.nn.Linear  # the head's class without this one

    def forward(self, input):
        """The logits of ``input`` [..., D]: lazy if a gradient may follow, else real ones."""
        exporting = torch.compiler._is_exporting_flag  # up to torch 2.12 Dynamo takes is_exporting() for True
        training = self.training and torch.is_grad_enabled() and not exporting
        if torch.compiler.is_compiling():
            return _outside_of_graphs(self, input) if training else super().forward(input)
        return self._logits(input, training)

    def _logits(self, input, training):
        state = self._sft_kernels
        state.seen += self.training
        if training:
            weight, bias = self.weight, self.bias
            if _may_be_lazy(input, weight, state.joined):
                state.calls += 1
                return HeadCalled.apply(input, weight, bias, HeadCall(state, input, weight, bias))
        return super().forward(input)

    def __reduce_ex__(self, protocol):
        return _rebuild, (self.stock,), self.__getstate__()


class HeadCalled(torch.autograd.Function):
    """The head as a node of autograd: a gradient of the real logits becomes those of the head's inputs."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, call):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.dtype, ctx.token = call.dtype, call.token
        return LazyLogits.of(call)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:  # the fused op has computed past the logits
            return None, None, None, None
        hidden, weight, bias = ctx.saved_tensors
        grad = grad.to(ctx.dtype)
        rows, flat = hidden.reshape(-1, hidden.shape[-1]), grad.reshape(-1, grad.shape[-1])
        need_hidden, need_weight, need_bias, _ = ctx.needs_input_grad
        return (
            (grad @ weight.to(ctx.dtype)).to(hidden.dtype) if need_hidden else None,
            (flat.T @ rows.to(ctx.dtype)).to(weight.dtype) if need_weight else None,
            flat.sum(0).to(bias.dtype) if need_bias else None,
            None,
        )


@torch.compiler.disable
def _outside_of_graphs(head, input):
    """The head as ``torch.compile`` sees it: a graph ends here, and the code behind it runs as it is written."""
    return head._logits(input, True)


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _may_be_lazy(input, weight, joined):
    return (
        (input.requires_grad or weight.requires_grad or joined)
        and type(input) in _PLAIN
        and type(weight) in _PLAIN
        and input.dim() > 0
        and input.shape[-1] == weight.shape[1]
        and input.device == weight.device
        and (input.dtype == weight.dtype or torch.is_autocast_enabled(input.device.type))
        and not (input.is_meta or input.is_inference() or torch.jit.is_tracing())
        and not torch._C._are_functorch_transforms_active()
    )


class _OwnProduct(TorchFunctionMode):
    """Inside it, ``F.linear`` with a head's weight is that head's call."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def __torch_function__(self, func, types, args=(), kwargs=None):
        head, kwargs = self.head, kwargs or {}
        if func is F.linear and len(args) > 1 and args[1] is head.weight:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            if bias is head.bias:
                return head._logits(args[0], head.training and torch.is_grad_enabled())
        return func(*args, **kwargs)


def _around(forward):
    """The ``forward`` of a class of the model's, which may multiply by the weight without its parent's ``forward``."""

    @functools.wraps(forward)
    def lazy_forward(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        with _OwnProduct(self):
            return forward(self, *args, **kwargs)

    return lazy_forward


_CLASSES = {}


def _lazy_class(stock):
    """The class of a patched head whose class was ``stock``."""
    if stock not in _CLASSES:
        bases, fields = (stock, LazyHead), {"stock": stock}
        if stock is torch.nn.Linear:
            bases = (LazyHead,)
        elif stock.forward is not torch.nn.Linear.forward:
            fields["forward"] = _around(stock.forward)
        _CLASSES[stock] = type(f"Lazy{stock.__name__}", bases, fields)
    return _CLASSES[stock]


def _stock_class(kind):
    """``kind`` without :class:`LazyHead`. Others may have extended it since, as ``fully_shard`` does."""
    if "stock" in vars(kind):
        return kind.stock
    bases = tuple(_stock_class(base) if issubclass(base, LazyHead) else base for base in kind.__bases__)
    return type(kind.__name__, bases, {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")})


def _rebuild(stock):
    kind = _lazy_class(stock)
    return kind.__new__(kind)


def patch(model, *, log_materialised=False):
    """Make the logits of a causal LM lazy in training; returns the model.

    The output head's result becomes a tensor that stands for ``hidden @ weight.T + bias``. A cross-entropy on it, in
    the model or in the trainer, runs :func:`sft_kernels.linear_cross_entropy`; so do ``log_softmax`` with ``nll_loss``
    or ``gather``, ``logsumexp``, ``argmax`` and the entropy. Any other operation computes the real logits, once a
    call, with the right gradients. In evaluation, and without gradients, the head is as before. Parameters, their names
    and ``save_pretrained`` are untouched.

    The first result is compared with the unpatched head's on a few rows. A model that is trained without its head being
    called gets a warning, once: its trainer multiplies by the head's weight itself.

    Attention is left as it is. Importing ``sft_kernels.integrations`` has made ``attn_implementation="sft_kernels"``
    known to transformers: give it to ``from_pretrained``, or to ``model.set_attn_implementation``.

    Under ``torch.compile`` a graph ends at the head, and losses run as they are written. Under ``fully_shard`` the
    head's weight must be there when the loss is computed: ``reshard_after_forward=False``, as accelerate has it.

    Args:
        model: anything with ``get_output_embeddings()``, perhaps inside DistributedDataParallel, ``torch.compile`` or a
            PEFT model. Adapters on the head are part of it: patch after they are there. A second call patches what has
            been added since.
        log_materialised: log each operation that computes real logits, with the line that asked for it, as a warning of
            the logger ``sft_kernels.integrations``.

    Raises:
        TypeError: the head is no linear layer, or its weight is quantised, or split over ranks by anything but
            ``fully_shard``.
        ValueError: the model has no output head.
    """
    model = _inner(model)
    layers = _linear_layers(model)
    for name, layer in layers.items():
        if not isinstance(layer, LazyHead):
            layer._sft_kernels = HeadState(f"{type(model).__name__}.{name}", log_materialised)
            _set_class(layer, _lazy_class(type(layer)))
        layer._sft_kernels.log = log_materialised
        layer._sft_kernels.joined = len(layers) > 1
    watch.start(model, layers.values())
    return model


def unpatch(model):
    """Undo :func:`patch`; returns the model."""
    model = _inner(model)
    for layer in _patched(model):
        _set_class(layer, _stock_class(type(layer)))
        del layer._sft_kernels
    watch.stop(model)
    return model


def head_counts(model):
    """:class:`HeadCounts` of all patched heads of ``model``, added up."""
    states = [layer._sft_kernels for layer in _patched(_inner(model))]
    return HeadCounts(*(sum(getattr(state, name) for state in states) for name in HeadCounts._fields))


def _inner(model):
    """The model inside wrappers of training."""
    while not hasattr(model, "get_output_embeddings"):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None:
            raise ValueError(
                f"model: {type(model).__name__} has no get_output_embeddings(), so no output head is known"
            )
        model = inner
    return model


def _patched(model):
    return [layer for layer in model.modules() if isinstance(layer, LazyHead)]


def _linear_layers(model):
    """The linear layers of the output head that give logits, by name: one, or those that an adapter adds up.

    A model that names no head, or names one without a linear layer (an embedding that is tied to it), has those of the
    models inside it, or all its linear layers with as many outputs as the vocabulary has words.
    """
    heads = _named_heads(model)
    layers = [module for head in heads for module in head.modules() if isinstance(module, torch.nn.Linear)]
    if not layers:
        sizes = [len(head.weight) for head in heads if isinstance(getattr(head, "weight", None), torch.Tensor)]
        sizes = sizes or [getattr(getattr(model, "config", None), "vocab_size", None)]
        linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        layers = [module for module in linear if len(module.weight) in sizes]
    if not layers:
        found = ", ".join(f"a {type(head).__module__}.{type(head).__qualname__}" for head in heads)
        if not found:
            raise ValueError(f"model: {type(model).__name__} has no output head")
        raise TypeError(
            f"model: the output head of {type(model).__name__} is {found}, not a torch.nn.Linear;"
            " call sft_kernels.cross_entropy on its logits instead"
        )
    names = {id(module): name for name, module in model.named_modules()}
    layers = {names.get(id(layer), type(layer).__name__): layer for layer in layers}
    for name, layer in layers.items():
        if not _is_fully_sharded(model, layer.weight):
            _check_layer(name, layer)
    classes = max(layer.weight.shape[0] for layer in layers.values())  # out_features may say something else
    return {name: layer for name, layer in layers.items() if layer.weight.shape[0] == classes}


def _named_heads(model):
    """Returns the results of ``get_output_embeddings``: of the model, or if that is None of the models inside."""
    head = model.get_output_embeddings()
    if head is not None:
        return [head]
    inside = [module for module in model.modules() if hasattr(module, "get_output_embeddings")]
    heads = {id(head): head for head in (module.get_output_embeddings() for module in inside) if head is not None}
    return list(heads.values())


def _is_fully_sharded(model, weight):
    """Returns True if ``weight`` is split over ranks now and whole whenever its layer is called."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    return isinstance(weight, DTensor) and any(isinstance(module, FSDPModule) for module in model.modules())


def _check_layer(name, layer):
    """Raise ``TypeError`` for a linear layer whose weight is not simply a matrix."""
    if reason := why_not_a_matrix(layer.weight):
        raise TypeError(
            f"model: the head {name} is a {type(layer).__name__} with {reason}, or, if it is split over ranks, call"
            " linear_cross_entropy with a process_group"
        )


def _set_class(layer, kind):
    before, layer.__class__ = type(layer).forward, kind
    for name in ("_old_forward", "forward"):  # accelerate keeps the forward that it found, and puts it back as it was
        method = vars(layer).get(name)
        if isinstance(method, types.MethodType) and method.__func__ is before:
            setattr(layer, name, types.MethodType(kind.forward, layer))
