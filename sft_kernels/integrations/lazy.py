"""Logits that exist only if somebody reads them: a tensor that stands for ``hidden @ weight.T + bias``.

A :class:`LazyLogits` has the shape, dtype and device of the logits and knows how they came about. Views, selections of
rows, casts, scales and a softcap are recorded. Losses and statistics (``fused.py``) read the record and run the fused
op. Any other operation computes the real logits, once a call of the head, and goes on with them.

Two levels share the work. Below autograd (``__torch_dispatch__``) every operation arrives as one of a few ATen
operators, however it was spelled, and autograd records its usual nodes. So a gradient of the real logits flows back
through these nodes to the head's own. Above autograd (``__torch_function__``) losses and statistics are caught whole.
"""

import logging
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_leaves, tree_map

from .heads import Noted

aten = torch.ops.aten
_LOG = logging.getLogger("sft_kernels.integrations")

# What a lazy tensor stands for, x being the logits after scale and softcap.
LOGITS, LOG_PROBS, PROBS, PLOGP, PX = "x", "log p", "p", "p log p", "p x"


class View:
    """Which rows of a head's logits a tensor shows: one more step behind ``parent``, or all of them."""

    __slots__ = ("axis", "parent", "pieces", "step")

    def __init__(self, axis, parent=None, step=None, pieces=None):
        self.axis = axis  # the dimension of the classes
        self.parent = parent
        self.step = step  # (function, *args), which also means something for tensors with another number of classes
        self.pieces = pieces  # the view that this one is a piece of, whose other pieces will be asked for too

    def after(self, axis, *step, pieces=None):
        """This view after one more step."""
        return View(axis, self, step, pieces)

    def of(self, tensor, base=None):
        """This view of ``tensor``, which is shaped as ``base`` (None: as the logits) but for the number of classes."""
        view, steps = self, []
        while view is not base and view.parent is not None:
            steps.append(view.step)
            view = view.parent
        for function, *args in reversed(steps):
            tensor = function(tensor, *args)
        return tensor


class Values:
    """The values that a family of views shares: how they come from the logits, and they themselves once computed."""

    __slots__ = ("_written", "base", "cap", "factor", "head", "kind", "op", "real", "scale", "whole")

    def __init__(self, head, base, kind=LOGITS, scale=1.0, cap=None, factor=1.0, op=None, whole=None):
        self.head = head
        self.base = base  # the view that ``real`` is laid out as
        self.kind = kind
        self.scale = scale  # x = scale · logit, or with a cap
        self.cap = cap  # x = cap · tanh(scale · logit)
        self.factor = factor  # of ``kind``, which is no longer logits
        self.op = op  # (function, inputs, kwargs); None for the head's own logits
        self.whole = whole  # the values of which these are the first classes, in the same memory
        self.real = None
        self._written = None

    @property
    def written(self):
        """The values since somebody may have written to them: nothing is lazy any more. None before that."""
        return self._written if self.whole is None else self.whole.written

    @property
    def shaping(self):
        """``(logit_scale, softcap)`` as the fused op takes them."""
        scale = self.scale if self.cap is None else self.scale * self.cap
        return None if math.isclose(scale, 1, rel_tol=1e-12) else scale, self.cap


class Origin(NamedTuple):
    """An input of a recorded operation."""

    values: Values
    view: View


def realize(values, view):
    """The real tensor behind ``values``, as ``view`` shows it."""
    if values.whole is not None:
        return view.of(_first_classes(values, realize(values.whole, values.base)), values.base)
    return _unwritten(values, view) if values.written is None else view.of(values.written, values.base)


def _unwritten(values, view):
    """The same as it was before anybody wrote to it, which is what earlier copies are made of."""
    if values.whole is not None:
        return view.of(_first_classes(values, _unwritten(values.whole, values.base)), values.base)
    if values.real is None:
        values.real = _evaluate(values, lambda head: head.compute(), _unwritten)
    return view.of(values.real, values.base)


def _first_classes(values, tensor):
    return tensor.narrow(values.base.axis, 0, values.head.classes)


def stock_rows(values, select):
    """``values`` of the rows ``[K, V]`` that ``select`` takes from hidden states, as unpatched code computes them."""
    if values.whole is not None:
        return stock_rows(values.whole, select)[:, : values.head.classes]
    if values.op is not None and values.op[0] in (aten.index.Tensor, aten.index_select.default):
        return stock_rows(values.op[1][0].values, select)  # ``select`` has taken them already
    found = _evaluate(values, lambda head: head.stock_rows(select), lambda values, view: stock_rows(values, select))
    return found.reshape(-1, found.shape[-1])  # a bias may have brought more dimensions


def _evaluate(values, of_head, of_input):
    if values.op is None:
        return of_head(values.head)
    function, inputs, kwargs = values.op
    return function(*(_input(x, of_input) for x in inputs), **kwargs)


def _input(x, of_input):
    if isinstance(x, Origin):
        return of_input(*x)
    return x.tensor if isinstance(x, Noted) else x


def coarsest(values):
    """The epsilon of the coarsest dtype to which ``values`` were rounded on their way."""
    if values.op is None:  # also of the first classes
        return values.head.eps
    _, inputs, kwargs = values.op
    found = [coarsest(x.values) for x in inputs if isinstance(x, Origin)]
    if "dtype" in kwargs:
        found.append(torch.finfo(kwargs["dtype"]).eps)
    return max(found)


class LazyLogits(torch.Tensor):
    """Stands for logits, or what becomes of them, that are not in memory. See the module.

    Its strides are those that the real tensor would have, so that torch itself tells views from copies.
    """

    @staticmethod
    def __new__(cls, values, view, shape, strides, dtype):
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=dtype, device=values.head.hidden.device
        )

    def __init__(self, values, view, shape, strides, dtype):
        self.source, self.rows = values, view
        self.cut = False  # True if no gradient may flow to the head: somebody has detached the logits

    @classmethod
    def of(cls, head):
        """The logits of a :class:`HeadCall`."""
        shape = (*head.hidden.shape[:-1], head.classes)
        view = View(len(shape) - 1)
        return cls(Values(head, view), view, shape, None, head.dtype)

    @classmethod
    def like(cls, fake, values, view):
        """A tensor with the layout of ``fake``."""
        return cls(values, view, fake.shape, fake.stride(), fake.dtype)

    @property
    def fake(self):
        """The tensor's layout, on the meta device."""
        return torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta")

    def __repr__(self, **_):
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    def __reduce_ex__(self, protocol):
        return self.materialise().detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), self.materialise().detach().clone())

    def materialise(self):
        """The real tensor, with the gradient that the logits have."""
        with torch._C.DisableTorchFunctionSubclass():
            return RealTensor.apply(self, False)

    @classmethod
    @torch.compiler.disable
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            catch = CAUGHT.get(func)
            if catch is not None:
                found = catch(*args, **(kwargs or {}))
                if found is not NotImplemented:
                    return found
            return func(*args, **(kwargs or {}))

    @classmethod
    @torch.compiler.disable
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            record = RECORDED.get(func)
            if record is not None and isinstance(args[0], LazyLogits) and args[0].source.written is None:
                found = record(*args, **kwargs)
                if found is not NotImplemented:
                    cut = args[0].cut or func is torch.ops.aten.detach.default or not torch.is_grad_enabled()
                    for x in found if isinstance(found, list) else [found]:
                        x.cut = cut
                    return found
            return _on_real(func, args, kwargs)


# ---- above autograd: functions that are caught whole, by the function. ``fused.py`` adds the losses and statistics.

CAUGHT = {}


class RealTensor(torch.autograd.Function):
    """The real tensor behind a lazy one, shared with whoever writes to it."""

    @staticmethod
    def forward(ctx, lazy, written):
        return (_exposed(lazy) if written else realize(lazy.source, lazy.rows)).detach()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _on_memory(function, written):
    """A function that reads its tensor's memory; where ``written``, its caller may also write there."""

    def catch(x, *args, **kwargs):
        return function(RealTensor.apply(x, written), *args, **kwargs) if isinstance(x, LazyLogits) else NotImplemented

    return catch


for _name in ("tolist", "item", "__format__", "__contains__", "__bool__", "__float__", "__int__"):
    CAUGHT[getattr(torch.Tensor, _name)] = _on_memory(getattr(torch.Tensor, _name), False)
for _name in (
    "numpy",
    "data_ptr",
    "untyped_storage",
    "__array__",
    "__dlpack__",
    "share_memory_",
    "pin_memory",
    "apply_",
    "map_",
    "map2_",
):
    CAUGHT[getattr(torch.Tensor, _name)] = _on_memory(getattr(torch.Tensor, _name), True)


def _register_hook(x, *args, **kwargs):
    """A hook of torch's own (wrappers of distributed training have such) only waits for the backward: the fused op
    runs it, with None for the gradient. Any other hook wants the gradient: the logits must be real.
    """
    hook = args[0] if args else kwargs.get("hook")
    if (getattr(getattr(hook, "func", hook), "__module__", None) or "").split(".")[0] == "torch":
        x.source.head.hooked = True
    else:
        _exposed(x)
    return NotImplemented


def _retain_grad(x):
    """Somebody wants the gradient by the logits: they must be real."""
    _exposed(x)
    return NotImplemented


def _set_data(x, value):
    raise NotImplementedError("logits: .data cannot be set on lazy logits; use logits.copy_(…)")


CAUGHT[torch.Tensor.data.__set__] = _set_data
CAUGHT[torch.Tensor.register_hook] = _register_hook
CAUGHT[torch.Tensor.retain_grad] = _retain_grad


# ---- below autograd: operators by their rules in ``recorded.py``; any other on the real tensors

RECORDED = {}
_GIVES_MEMORY = {getattr(torch.ops.aten.set_, name) for name in torch.ops.aten.set_.overloads()}


def _on_real(func, args, kwargs):
    for x in tree_leaves((args, kwargs)):
        if isinstance(x, LazyLogits) and x.source.head.state.log and x.source.real is x.source.written is None:
            _log(func, x)
    schema = func._schema
    if args and isinstance(args[0], LazyLogits) and (torch.Tag.inplace_view in func.tags or func in _GIVES_MEMORY):
        name = schema.name.split("::")[1]
        raise NotImplementedError(
            f"logits: {name} changes a tensor's shape or memory in place; use a copy of lazy logits"
        )
    aliases = any(returned.alias_info is not None for returned in schema.returns) or schema.is_mutable
    real = _exposed if aliases else lambda x: realize(x.source, x.rows)
    plain_args, plain_kwargs = tree_map(lambda x: real(x) if isinstance(x, LazyLogits) else x, (args, kwargs))
    found = func(*plain_args, **plain_kwargs)
    if schema.is_mutable and args and isinstance(args[0], LazyLogits) and schema.arguments[0].is_write:
        return args[0]
    return found


def _exposed(x):
    """The real tensor behind ``x``, given to somebody who may write to it: from now on nothing of it is lazy."""
    values = x.source
    while values.whole is not None:
        values = values.whole
    if values.written is None:
        realize(values, values.base)
        values._written, values.real = values.real, None
    return realize(x.source, x.rows)


def _log(func, x):
    """Say which operator wants the real logits, and from which line."""
    frame = sys._getframe(1)
    here, torch_folder = Path(__file__).parent, Path(torch.__file__).parent
    while frame.f_back and any(folder in Path(frame.f_code.co_filename).parents for folder in (here, torch_folder)):
        frame = frame.f_back
    _LOG.warning("%s needs real logits %s: %s:%d", func, tuple(x.shape), frame.f_code.co_filename, frame.f_lineno)
