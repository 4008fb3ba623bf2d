"""What of a DTensor lies here, and over whom a norm is summed."""

import math
import sys

import torch.distributed as dist


def local(tensor):
    """This rank's shard of a DTensor, complete; any other tensor as it is."""
    shard = getattr(tensor, "_local_tensor", tensor)
    return shard.wait() if hasattr(shard, "wait") else shard  # the result of a collective that may still run


def is_sharded(tensor):
    return hasattr(tensor, "_local_tensor")


def aligned_gradient(p):
    """``p.grad``, and where it is a DTensor with the placements of ``p``: sums that are pending are carried out."""
    if is_sharded(p) and p.grad.placements != p.placements:
        p.grad = p.grad.redistribute(p.device_mesh, p.placements)
    return p.grad


def pieces(p):
    """Into how many different pieces ``p`` is cut over its mesh."""
    if not is_sharded(p):
        return 1
    sizes = zip(p.placements, p.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if not placement.is_replicate())


class Ranks:
    """The ranks over which a sum over all shards runs: those of the largest mesh among ``params``; nobody where none is
    a DTensor.

    Among them a parameter has as many copies as there are ranks for each of its pieces. A plain tensor beside DTensors
    counts as replicated.

    Raises:
        ValueError: a mesh that is no part of the largest.
    """

    def __init__(self, params):
        meshes = {p.device_mesh for p in params if is_sharded(p)}
        largest = max(meshes, key=lambda mesh: mesh.size(), default=None)
        self.size, self.groups = 1, []
        if largest is None:
            return
        ranks = set(largest.mesh.flatten().tolist())
        for mesh in meshes:
            if not ranks.issuperset(mesh.mesh.flatten().tolist()):
                raise ValueError(f"params: the norm runs over one mesh; got ranks {mesh.mesh} and {largest.mesh}")
        self.size = len(ranks)
        if self.size == dist.get_world_size():
            self.groups = [dist.group.WORLD]
        else:
            self.groups = [largest.get_group(i) for i in range(largest.ndim)]

    def copies(self, p):
        """How many of the ranks hold the same piece of ``p``."""
        return self.size // pieces(p)

    def sum_(self, tensor):
        """``tensor`` summed over the ranks in place, without a sync."""
        for group in self.groups:
            dist.all_reduce(tensor, group=group)
        return tensor


def zero_ranks():
    """Returns over how many ranks the ``ZeroRedundancyOptimizer`` that makes an optimiser now splits the parameters.

    0 if there is none. The parameters that a rank gets are plain tensors, and nothing about them says that there are
    more. So it is found among the callers; to be called while the optimiser is made.
    """
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = sys._getframe() if zero else None
    while frame is not None:
        if frame.f_globals is vars(zero):
            owner = frame.f_locals.get("self")
            if isinstance(owner, zero.ZeroRedundancyOptimizer):
                return owner.world_size
        frame = frame.f_back
    return 0


def are_flat_shards(params):
    """Returns True if ``params`` are the shards, in plain tensors, that ``FullyShardedDataParallel`` made of others."""
    marked = [p for p in params if getattr(p, "_fsdp_flattened", False)]
    whole = [getattr(p, "_unpadded_unsharded_size", None) for p in marked]
    if any(size is not None and p.numel() < size.numel() for p, size in zip(marked, whole, strict=True)):
        return True
    # With ``use_orig_params`` each parameter is a piece of the flat one, or, if that is not split, has its own shape.
    return bool(marked) and all(size is None and p.dim() == 1 for p, size in zip(marked, whole, strict=True))


def placement_in_whole(p):
    """How the row-major indices of this rank's shard of ``p`` become those of the whole.

    Returns ``(offset, maps)``: index ``i`` becomes ``i // L * G + i % L`` for each ``(L, G)`` in order, and then
    ``offset`` is added; for ``Shard(0)`` there are no maps. ``(0, [])`` for a plain tensor.

    Raises:
        ValueError: a placement that is neither ``Shard`` nor ``Replicate``.
    """
    from torch.distributed.tensor import Replicate, Shard

    if not is_sharded(p):
        return 0, []
    here, start = list(p.shape), [0] * p.dim()
    coordinate = p.device_mesh.get_coordinate()
    for placement, at, size in zip(p.placements, coordinate, p.device_mesh.shape, strict=True):
        if type(placement) not in (Shard, Replicate):
            raise ValueError(f"stochastic_rounding: expected DTensors of Shard and Replicate, got {placement}")
        if placement.is_shard():
            dim = placement.dim
            per_rank = -(-here[dim] // size)
            first = min(per_rank * at, here[dim])
            start[dim] += first
            here[dim] = min(per_rank, here[dim] - first)
    offset, maps, inner = 0, [], 1
    for dim in reversed(range(p.dim())):
        offset += start[dim] * inner
        if here[dim] != p.shape[dim] and any(n != 1 for n in here[:dim]):
            maps.append((max(1, here[dim] * inner), p.shape[dim] * inner))
        inner *= p.shape[dim]
    return offset, maps
