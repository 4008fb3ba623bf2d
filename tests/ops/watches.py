"""Watches on what a loss does to a device: waits, launches, memory that is held."""

from typing import ClassVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class NoSync(TorchDispatchMode):
    """Raises where the host would wait for a value on the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        boolean = name in ("index", "index_put_") and any(
            isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in args[1]
        )
        assert not boolean, f"{name} by a mask"
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero"), name
        return function(*args, **(kwargs or {}))


class Launches(TorchDispatchMode):
    """Lists the operations that would be launched on a GPU, one that takes two launches twice."""

    _NONE: ClassVar = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "_unsafe_view", "alias"}
    _COPY_FIRST: ClassVar = {"masked_fill", "index_copy", "index_put"}

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not (function.is_view or name in self._NONE):
            casts = name == "sum" and args[0].dtype == torch.bool
            self.names += [name] * (2 if name in self._COPY_FIRST or casts else 1)
        return out


class Held(TorchDispatchMode):
    """Finds the most bytes that are held at once in memory taken within it, and those that are still held."""

    def __init__(self, given):
        super().__init__()
        self.given = {t.untyped_storage()._cdata for t in given}
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        for t in tree_leaves(out):
            storage = t.untyped_storage() if isinstance(t, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.given:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out

    def left(self):
        return sum(size for storage, size in self.alive.values() if not storage.expired())
