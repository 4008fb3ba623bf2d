"""The sources of lazy logits: one call of an output head, or a combination that a model makes of it."""

import weakref

import torch
import torch.nn.functional as F


def history(enabled):
    """A key for what is computed with a history, or without (None).

    A checkpoint must save the same tensors in both of its passes. So neither may use what was kept outside of it, or in
    the other one.
    """
    if not enabled:
        return None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return "history" if hooks is None else weakref.ref(hooks[0])


class Noted:
    """A tensor that a record refers to, and its version: writing to it before it is read is an error."""

    def __init__(self, tensor):
        self._tensor, self._version = tensor, tensor._version
        self.node = tensor.grad_fn

    @property
    def tensor(self):
        if self._tensor._version != self._version:
            raise RuntimeError(
                f"logits: a tensor of shape {tuple(self._tensor.shape)} that they were combined with was written to"
                " before they were used; write to a clone of it"
            )
        return self._tensor


class HeadCall:
    """One call of an output head, ``hidden @ weight.T + bias``."""

    def __init__(self, state, hidden, weight, bias):
        self.state = state  # of the patched head: its counts
        self.token = object()  # by which the call's node is known
        self.hidden = hidden  # [..., D]
        self.classes = weight.shape[0]
        self.known = {}  # statistics of rows, by scale and softcap (``fused.py``)
        self.stats = {}  # statistics of every token of a view, with a history or without
        self.hooked = False  # True once a tensor of these logits has a hook
        self.counted = False  # True once the real logits were computed
        device = hidden.device.type
        self.autocast = None  # the dtype, if autocast was on
        if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
            self.autocast = torch.get_autocast_dtype(device)
        self.dtype = self.autocast or hidden.dtype
        self.eps = torch.finfo(self.dtype).eps  # of the coarsest rounding on the unpatched head's way
        if torch._C._current_graph_task_id() == -1:  # else a checkpoint runs again, and must do what it did before
            state.remembers = state.statistics_wanted
        self.remembers = state.remembers
        self.ranks = torch.nn.parallel.DistributedDataParallel._get_active_ddp_module()
        self._tensors = hidden, weight, bias
        self._versions = self._current_versions()

    def tensors(self):
        """Returns ``(hidden, weight, bias)`` with their autograd history."""
        if self._current_versions() != self._versions:
            raise RuntimeError(
                "logits: the head's weight or input was written to since the head was called (an optimizer step?);"
                " read logits before that, or call unpatch(model)"
            )
        weight = self._tensors[1]
        if weight.numel() and not weight.untyped_storage().size():
            raise RuntimeError(
                f"logits: the weight of {self.state.name} was freed when the head had run, as a fully sharded module"
                " does; compute the loss inside the model (labels=...), and shard the head with"
                " reshard_after_forward=False or together with the model around it"
            )
        return self._tensors

    def compute(self):
        """The real logits ``[..., V]``, without a history."""
        self.state.materialised += not self.counted
        self.counted = True
        return F.linear(*(t if t is None else t.detach().to(self.dtype) for t in self.tensors()))

    def stock_rows(self, select):
        """The unpatched head's logits ``[K, V]`` of the rows that ``select`` takes from hidden states."""
        return F.linear(select(self.hidden), *self.tensors()[1:])

    def add_to(self, tokens, ends):
        """Adds to ``tokens`` the calls to which a gradient flows, and to ``ends`` the nodes of what else they have."""
        if any(t is not None and t.requires_grad for t in self._tensors):
            tokens.add(self.token)

    def _current_versions(self):
        return [None if t is None else t._version for t in self._tensors]


class JoinedHead:
    """The logits of one or two calls, with what a model adds to them or multiplies them by, as one head.

    ::

        s x Wᵀ + t u Bᵀ + c = [s x, t u] [W, B]ᵀ + c        f ∘ (x Wᵀ + b) = x (f ∘ W)ᵀ + f ∘ b

    Two calls are a head and its low-rank adapter; c and f have a number for each class. The joined weight is a copy,
    [V, D + r]. If f is one number it multiplies x, and nothing is copied but x.
    """

    def __init__(self, calls, bias=None, factor=None, divisor=None):
        self.calls = calls  # (head, scale) pairs
        self.bias = bias  # c, V :class:`Noted` numbers of any shape, or None
        self.factor = factor  # f, likewise, or one number
        self.divisor = divisor  # 1 / f, one number
        first = calls[0][0]
        self.state, self.hidden, self.classes, self.ranks = first.state, first.hidden, first.classes, first.ranks
        self.autocast, self.remembers = first.autocast, first.remembers
        self.dtype = first.dtype
        for head, _ in calls:
            self.dtype = torch.promote_types(self.dtype, head.dtype)
        self.eps = max(head.eps for head, _ in calls)
        self.known, self.stats = {}, {}
        self.hooked = any(head.hooked for head, _ in calls)
        self._joined = {}  # by the key of the history

    def tensors(self):
        """Returns ``(hidden, weight, bias)`` of one head, through which all of its parts get their gradients."""
        key = history(torch.is_grad_enabled())
        if key not in self._joined:
            self._joined[key] = self._join()
        return self._joined[key]

    def add_to(self, tokens, ends):
        """As :meth:`HeadCall.add_to`."""
        for head, _ in self.calls:
            head.add_to(tokens, ends)
        ends.update(noted.node for noted in (self.bias, self.factor, self.divisor) if noted is not None)

    def _join(self):
        hidden, weight, bias = zip(*(head.tensors() for head, _ in self.calls), strict=True)
        scales = [scale for _, scale in self.calls]
        hidden = [x if s == 1 else x * s for x, s in zip(hidden, scales, strict=True)]
        bias = [b if s == 1 else b * s for b, s in zip(bias, scales, strict=True) if b is not None]
        if len(hidden) == 1:
            hidden, weight = hidden[0], weight[0]
        else:
            hidden = torch.cat([x.to(self.dtype) for x in hidden], -1)
            weight = torch.cat([w.to(self.dtype) for w in weight], 1)
        if self.bias is not None:
            bias.append(self.bias.tensor.reshape(-1))
        bias = sum(b.to(weight.dtype) for b in bias) if bias else None
        if self.divisor is not None or (self.factor is not None and self.factor.tensor.numel() == 1):
            hidden, bias = self._times_one_number(hidden), self._times_one_number(bias)
        elif self.factor is not None:
            factor = self.factor.tensor.reshape(-1).to(weight.dtype)
            weight = weight * factor[:, None]
            bias = None if bias is None else bias * factor
        return hidden, weight, bias

    def _times_one_number(self, tensor):
        if tensor is None:
            return None
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))  # the number may have more digits
        wide = wide / self.divisor.tensor.reshape(()) if self.factor is None else wide * self.factor.tensor.reshape(())
        return wide.to(tensor.dtype)


class FirstClasses:
    """The first ``classes`` of a head's logits: the others only pad its vocabulary."""

    def __init__(self, head, classes):
        self.head, self.classes = head, classes
        self.state, self.hidden, self.ranks = head.state, head.hidden, head.ranks
        self.autocast, self.remembers = head.autocast, head.remembers
        self.dtype, self.eps, self.hooked = head.dtype, head.eps, head.hooked
        self.known, self.stats = {}, {}

    def tensors(self):
        """Returns ``(hidden, weight, bias)``, the latter two of the first classes."""
        hidden, weight, bias = self.head.tensors()
        return hidden, weight[: self.classes], None if bias is None else bias[: self.classes]

    def add_to(self, tokens, ends):
        """As :meth:`HeadCall.add_to`."""
        self.head.add_to(tokens, ends)
