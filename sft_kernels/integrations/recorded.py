"""The operators that lazy logits record: views and selections of rows, casts, scales, a softcap, a softmax.

Each rule returns the recorded tensor, or ``NotImplemented`` if the real logits are needed. Rules say nothing about any
model; a step or an operation that is not recorded is right, and merely costs the real logits.
"""

import itertools
import math

import torch

from .heads import FirstClasses, JoinedHead, Noted
from .lazy import LOG_PROBS, LOGITS, PLOGP, PROBS, PX, RECORDED, LazyLogits, Origin, Values

aten = torch.ops.aten
_FP32 = torch.finfo(torch.float32)
_FORMATS = (torch.preserve_format, torch.contiguous_format)


def _records(*operators):
    def register(function):
        RECORDED.update(dict.fromkeys(operators, function))
        return function

    return register


def _viewed(x, function, *args, axis=None):
    view = x.rows.after(x.rows.axis if axis is None else axis, function, *args)
    return LazyLogits.like(function(x.fake, *args), x.source, view)


def _copied(x, op, dtype=None, memory_format=torch.preserve_format, **changes):
    """A tensor of its own whose values come from those of ``x`` by ``op``."""
    old = x.source
    fields = {"kind": old.kind, "scale": old.scale, "cap": old.cap, "factor": old.factor, **changes}
    fake = torch.empty_like(x.fake, dtype=dtype, memory_format=memory_format)
    return LazyLogits.like(fake, Values(old.head, x.rows, op=op, **fields), x.rows)


def _selected(x, axis, function, *args):
    """A copy of some rows of ``x``, at places that only the data say."""
    old = x.source
    view = x.rows.after(axis, function, *args)
    rows = function(torch.empty((*x.shape[:-1], 1), dtype=torch.uint8, device=x.device), *args)
    fake = x.fake.new_empty((*rows.shape[:-1], x.shape[-1]))
    values = Values(old.head, view, old.kind, old.scale, old.cap, old.factor, _recorded(function, x, *args))
    return LazyLogits.like(fake, values, view)


def _recorded(function, *inputs, **kwargs):
    return function, [_input(x) for x in inputs], kwargs


def _input(x):
    if isinstance(x, LazyLogits):
        return Origin(x.source, x.rows)
    return Noted(x) if isinstance(x, torch.Tensor) else x


def _dim(x, dim):
    return dim + x.dim() if dim < 0 else dim


def _last(x):
    """Returns True if the classes are the last dimension."""
    return x.rows.axis == x.dim() - 1


def _reshape(tensor, *lead):
    return tensor.reshape(*lead, tensor.shape[-1])


@_records(aten.view.default, aten._unsafe_view.default)
def _view(x, shape):
    V = x.shape[-1]
    if not _last(x) or not shape:
        return NotImplemented
    if x.is_contiguous() and shape[-1] == V:  # the common case, without a tensor on the meta device
        lead = list(shape[:-1])
        if -1 in lead:
            lead[lead.index(-1)] = x.numel() // (V * -math.prod(lead)) if x.numel() else 0
        if math.prod(lead) * V != x.numel():
            return NotImplemented  # torch says what is wrong
        strides, shape = None, (*lead, V)
    else:
        fake = x.fake.view(shape)
        strides, shape = fake.stride(), fake.shape
    if shape[-1] != V:
        return NotImplemented
    view = x.rows.after(len(shape) - 1, _reshape, *shape[:-1])
    return LazyLogits(x.source, view, shape, strides, x.dtype)


@_records(aten.slice.Tensor)
def _slice(x, dim=0, start=None, end=None, step=1):
    dim = _dim(x, dim)
    if dim != x.rows.axis:
        return _viewed(x, aten.slice.Tensor, dim, start, end, step)
    if (start or 0) != 0 or step != 1:
        return NotImplemented
    fake = x.fake.narrow(dim, 0, len(range(*slice(start, end).indices(x.shape[dim]))))
    old = x.source
    if fake.shape[dim] == x.shape[dim]:
        return _alias(x)
    if old.kind != LOGITS or fake.shape[dim] == 0:
        return NotImplemented
    head = FirstClasses(old.head, fake.shape[dim])
    return LazyLogits.like(fake, Values(head, x.rows, old.kind, old.scale, old.cap, whole=old), x.rows)


@_records(aten.select.int)
def _select(x, dim, index):
    dim = _dim(x, dim)
    if dim == x.rows.axis:
        return NotImplemented
    return _viewed(x, torch.Tensor.select, dim, index, axis=x.rows.axis - (dim < x.rows.axis))


@_records(aten.unsqueeze.default)
def _unsqueeze(x, dim):
    dim = dim + x.dim() + 1 if dim < 0 else dim
    return _viewed(x, torch.Tensor.unsqueeze, dim, axis=x.rows.axis + (dim <= x.rows.axis))


@_records(aten.squeeze.dim)
def _squeeze(x, dim):
    dim = _dim(x, dim)
    if dim == x.rows.axis:
        return NotImplemented
    gone = x.shape[dim] == 1 and dim < x.rows.axis
    return _viewed(x, torch.Tensor.squeeze, dim, axis=x.rows.axis - gone)


@_records(aten.transpose.int)
def _transpose(x, a, b):
    a, b = _dim(x, a), _dim(x, b)
    return _viewed(x, torch.Tensor.transpose, a, b, axis={a: b, b: a}.get(x.rows.axis))


@_records(aten.t.default)
def _t(x):
    return _transpose(x, 0, 1) if x.dim() == 2 else NotImplemented


@_records(aten.permute.default)
def _permute(x, dims):
    dims = [_dim(x, dim) for dim in dims]
    return _viewed(x, torch.Tensor.permute, dims, axis=dims.index(x.rows.axis))


@_records(aten.split.Tensor)
def _split(x, size, dim=0):
    dim = _dim(x, dim)
    length = x.shape[dim]
    return _split_with_sizes(x, [min(size, length - i) for i in range(0, length, size)] if size > 0 else [], dim)


@_records(aten.split_with_sizes.default)
def _split_with_sizes(x, sizes, dim=0):
    dim = _dim(x, dim)
    if dim == x.rows.axis or not sizes or sum(sizes) != x.shape[dim] or min(sizes) < 0:
        return NotImplemented
    starts = itertools.accumulate(sizes, initial=0)
    return [
        _piece(x, x.rows.axis, torch.Tensor.narrow, dim, start, size)
        for start, size in zip(starts, sizes, strict=False)
    ]


@_records(aten.unbind.int)
def _unbind(x, dim=0):
    dim = _dim(x, dim)
    if dim == x.rows.axis:
        return NotImplemented
    axis = x.rows.axis - (dim < x.rows.axis)
    return [_piece(x, axis, torch.Tensor.select, dim, i) for i in range(x.shape[dim])]


def _piece(x, axis, function, *args):
    return LazyLogits.like(function(x.fake, *args), x.source, x.rows.after(axis, function, *args, pieces=x.rows))


@_records(aten.alias.default, aten.detach.default)
def _alias(x):
    return LazyLogits.like(x, x.source, x.rows)


@_records(aten.index.Tensor)
def _index(x, indices):
    if not _last(x) or any(isinstance(i, LazyLogits) for i in indices):
        return NotImplemented
    taken = sum(i.dim() if i is not None and i.dtype in (torch.bool, torch.uint8) else 1 for i in indices)
    if taken == x.dim() and indices[-1] is not None:
        return NotImplemented  # it selects classes
    indices = [i if i is None else i.clone() for i in indices]  # a mask may go on to be another one
    found = _selected(x, 0, aten.index.Tensor, indices)
    found.rows.axis = found.dim() - 1
    return found


@_records(aten.index_select.default)
def _index_select(x, dim, index):
    if not _last(x) or _dim(x, dim) == x.rows.axis:
        return NotImplemented
    return _selected(x, x.rows.axis, aten.index_select.default, _dim(x, dim), index.clone())


@_records(aten.clone.default)
def _clone(x, **kwargs):
    memory_format = kwargs.get("memory_format") or torch.preserve_format
    if memory_format not in _FORMATS:
        return NotImplemented
    return _copied(x, _recorded(aten.clone.default, x, **kwargs), memory_format=memory_format)


@_records(aten._to_copy.default)
def _to_copy(x, *, dtype=None, layout=None, device=None, pin_memory=None, non_blocking=False, memory_format=None):
    dtype = dtype or x.dtype
    same_device = device is None or torch.device(device) == x.device
    if not same_device or layout not in (None, torch.strided) or pin_memory or not dtype.is_floating_point:
        return NotImplemented
    if dtype.itemsize < 2 or (dtype.itemsize > 4 and x.source.head.dtype != dtype):
        return NotImplemented
    memory_format = memory_format or torch.preserve_format
    if memory_format not in _FORMATS:
        return NotImplemented
    op = _recorded(aten._to_copy.default, x, dtype=dtype, memory_format=memory_format)
    return _copied(x, op, dtype, memory_format)


def _number(value):
    """``value`` as a positive or negative float; None for what is no constant that the host knows."""
    if isinstance(value, torch.Tensor):
        if value.dim() or value.device.type != "cpu" or value.requires_grad or isinstance(value, LazyLogits):
            return None
        value = value.item()
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


@_records(aten.mul.Tensor, aten.mul.Scalar)
def _mul(x, other):
    if isinstance(other, LazyLogits):
        return _product(x, other)
    number = _number(other)
    if number is None and (_for_each_class(x, other) or _for_all(x, other)) and _uncapped(x):
        return _joined(x, aten.mul.Tensor, other, [(x.source.head, x.source.scale)], factor=Noted(other))
    return _scaled(aten.mul.Tensor, x, other, number)


@_records(aten.div.Tensor, aten.div.Scalar)
def _div(x, other):
    number = _number(other)
    if number is None and _for_all(x, other) and _uncapped(x):
        return _joined(x, aten.div.Tensor, other, [(x.source.head, x.source.scale)], divisor=Noted(other))
    return _scaled(aten.div.Tensor, x, other, 1 / number if number else None)


@_records(aten.neg.default)
def _neg(x):
    if x.source.kind == LOGITS:
        return NotImplemented
    return _copied(x, _recorded(aten.neg.default, x), factor=-x.source.factor)


def _scaled(function, x, other, by):
    if by is None:
        return NotImplemented
    op = _recorded(function, x, other.item() if isinstance(other, torch.Tensor) else other)
    if x.source.kind != LOGITS:
        return _copied(x, op, factor=x.source.factor * by)
    name = "scale" if x.source.cap is None else "cap"
    changed = getattr(x.source, name) * by
    if not _FP32.tiny <= changed <= _FP32.max:
        return NotImplemented  # the fused op takes positive numbers that fp32 can hold
    return _copied(x, op, **{name: changed})


@_records(aten.tanh.default)
def _tanh(x):
    if x.source.kind != LOGITS or x.source.cap is not None:
        return NotImplemented
    return _copied(x, _recorded(aten.tanh.default, x), cap=1.0)


@_records(aten.add.Tensor)
def _add(x, other, *, alpha=1):
    """The sum with an adapter's logits, or with a bias that is not the head's."""
    old = x.source
    if alpha != 1 or not _uncapped(x) or not _last(x):
        return NotImplemented
    call = (old.head, old.scale)
    if _for_each_class(x, other):
        return _joined(x, aten.add.Tensor, other, [call], bias=Noted(other))
    if not isinstance(other, LazyLogits) or other.shape != x.shape:
        return NotImplemented
    theirs = other.source
    whole = x.rows.parent is other.rows.parent is None
    alike = (theirs.kind, theirs.cap, theirs.written, theirs.head.autocast) == (LOGITS, None, None, old.head.autocast)
    if not whole or not alike:
        return NotImplemented
    return _joined(x, aten.add.Tensor, other, [call, (theirs.head, theirs.scale)])


def _uncapped(x):
    return x.source.kind == LOGITS and x.source.cap is None


def _for_all(x, other):
    """Returns True if ``other`` is a tensor of one number."""
    plain = isinstance(other, torch.Tensor) and not isinstance(other, LazyLogits)
    return plain and other.numel() == 1 and other.dim() <= x.dim() and other.device == x.device


def _for_each_class(x, other):
    """Returns True if ``other`` has one number for each class, and nothing for the rows."""
    if not isinstance(other, torch.Tensor) or isinstance(other, LazyLogits) or not _last(x):
        return False
    V = x.shape[-1]
    if other.dim() == 0:
        return False
    return other.numel() == V == other.shape[-1] and V > 1 and other.dim() <= x.dim() and other.device == x.device


def _joined(x, function, other, calls, **rest):
    dtype = torch.result_type(x.fake, other.fake if isinstance(other, LazyLogits) else other)
    if not other.is_floating_point() or dtype.itemsize > max(4, x.dtype.itemsize):
        return NotImplemented
    if isinstance(other, LazyLogits) and other.cut != x.cut:
        return NotImplemented
    if x.cut and torch.is_grad_enabled() and other.requires_grad and not isinstance(other, LazyLogits):
        return NotImplemented  # a gradient to ``other`` alone
    values = Values(JoinedHead(calls, **rest), x.rows, op=_recorded(function, x, other))
    return LazyLogits.like(torch.empty_like(x.fake, dtype=dtype), values, x.rows)


@_records(aten._log_softmax.default)
def _log_softmax(x, dim, half_to_float):
    return _normalised(aten._log_softmax.default, LOG_PROBS, x, dim, half_to_float)


@_records(aten._softmax.default)
def _softmax(x, dim, half_to_float):
    return _normalised(aten._softmax.default, PROBS, x, dim, half_to_float)


def _normalised(function, kind, x, dim, half_to_float):
    if x.source.kind != LOGITS or _dim(x, dim) != x.rows.axis:
        return NotImplemented
    dtype = torch.float32 if half_to_float else x.dtype
    return _copied(x, _recorded(function, x, dim, half_to_float), dtype, kind=kind)


@_records(aten.exp.default)
def _exp(x):
    if x.source.kind != LOG_PROBS or x.source.factor != 1:
        return NotImplemented
    return _copied(x, _recorded(aten.exp.default, x), kind=PROBS)


def _product(x, y):
    """p log p, or p x, of the same logits; their sum over the classes is an entropy."""
    a, b = x.source, y.source
    kind = {frozenset((PROBS, LOG_PROBS)): PLOGP, frozenset((PROBS, LOGITS)): PX}.get(frozenset((a.kind, b.kind)))
    same = x.rows is y.rows and a.head is b.head and (a.scale, a.cap) == (b.scale, b.cap) and b.written is None
    if kind is None or not same or x.cut != y.cut:  # one of them may be a constant for the gradient
        return NotImplemented
    op = _recorded(aten.mul.Tensor, x, y)
    return _copied(x, op, torch.promote_types(x.dtype, y.dtype), kind=kind, factor=a.factor * b.factor)
